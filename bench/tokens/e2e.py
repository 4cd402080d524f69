"""Token merging alone, on the CPU, end to end: dense weights and fewer tokens against the best dense build.

    python -m bench.tokens.e2e --model vit_base_patch16_224 --batch 8 --dtype fp32 bf16

The model is a timm model with random weights. Dense builds are eager, ``torch.compile`` and ``torch.compile`` with
freezing; merged ones have ``Config(pattern="dense", tome_r=r, tome_method="tome")`` and the same three forms.
All builds of a (batch, dtype) are interleaved in one run under ``torch.no_grad()``. The ratio of an r is the fastest
dense median divided by the fastest merged median of the same dtype. Beside it is the ratio of multiply-accumulates
(dense / executed), which it would equal if time were proportional to arithmetic; "of MACs" is the quotient of the two.

Every compiled merged build is compared with the transformed module run eagerly in fp32. In fp32 the relative RMS
difference must stay below 1e-5. In bf16, rounding also changes which of several nearly equally similar tokens are
merged; there the difference may be at most 1.5 times that of the transformed module run eagerly in bf16.
Otherwise the build is reported as WRONG and the exit status is 1.

``--parts`` instead times what merging adds to a block: matching and merging, and attention with log(size) as a bias, as
an extra key channel, written out, and without it. It also times what fewer tokens save in the linear layers: their time
at the token counts of all blocks, relative to a time proportional to the number of tokens.

With ``--threads 1`` the clock is the processor time of that thread, which is valid on a shared machine, too.

Results go into tome_e2e.json and tome_parts.json, one record per (model, depth, batch, dtype, threads).
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpcompile
from bench import common
from bench.cpu.e2e import Built, create, dense_builds, keep, title
from mpcompile.kernels import ops
from mpcompile.kernels.token_merge import reference
from mpcompile.passes.merge_tokens.insert import MergeTokens
from mpcompile.passes.merge_tokens.schedules.stream import counts

NAME, PARTS = "tome_e2e", "tome_parts"
BLOCKS = 12  # the models whose linear layers --parts times
FORMS = ("eager", "compile", "compile freezing")


def merged_builds(model: nn.Module, x: Tensor, dtype: str, r: int, forms: list[str]) -> Built:
    """One transformed model in the given forms, of ``FORMS``."""
    config = mpcompile.Config(pattern="dense", tome_r=r, tome_method="tome")
    pipeline = mpcompile.Pipeline([MergeTokens()])
    gm = mpcompile.transform(model, x, config, pipeline=pipeline)
    macs = gm.plan.macs
    facts = {
        "tome_r": r,
        "tokens": gm.plan.tokens,
        "macs_dense": macs.dense,
        "macs_executed": macs.executed,
        "macs_matching": macs.matching,
    }
    exact = mpcompile.transform(copy.deepcopy(model).float(), x.float(), config, pipeline=pipeline)(x.float())
    rounding = common.relative_rms(gm(x), exact)
    bound = common.TOLERANCE["fp32"] if dtype == "fp32" else 1.5 * rounding
    built: Built = {f"merge {r} eager": (functools.partial(gm, x), facts)} if "eager" in forms else {}
    for suffix in [form for form in forms if form != "eager"]:
        run, seconds = common.compiled_dense(gm, x, freezing=suffix == FORMS[2])
        error = common.relative_rms(run(x), exact)
        more = {"compile_s": seconds, "relative_rms": error, "eager_rms": rounding, "correct": error < bound}
        built[f"merge {r} {suffix}"] = functools.partial(run, x), {**facts, **more}
    return built


def block(args: argparse.Namespace, batch: int, dtype: str) -> dict[str, Any]:
    """Build and time everything for one batch size and dtype."""
    model, x = create(args, batch, dtype)
    built = dense_builds(model, x)
    dense = list(built)
    for r in args.tome_r:
        print(f"batch {batch}, {dtype}: building {r} tokens merged per block", file=sys.stderr, flush=True)
        built |= merged_builds(model, x, dtype, r, args.forms)
    env = common.environment()
    calls = {name: run for name, (run, _) in built.items()}
    seconds = common.interleave(calls, args.rounds, args.warmup, f"batch {batch}, {dtype}", args.clock)
    env["load average at the end"] = common.environment()["load average"]
    ms = {name: common.quartiles(times, 1e3) for name, times in seconds.items()}
    best = min(dense, key=lambda name: ms[name]["median"])
    builds = {name: {"dense": name in dense, "ms": ms[name], **facts} for name, (_, facts) in built.items()}
    summary = {}
    for r in args.tome_r:
        fastest = min((n for n, b in builds.items() if b.get("tome_r") == r), key=lambda name: ms[name]["median"])
        macs = builds[fastest]["macs_dense"] / builds[fastest]["macs_executed"]
        ratio = ms[best]["median"] / ms[fastest]["median"]
        summary[str(r)] = {"build": fastest, "ratio": ratio, "macs_ratio": macs, "of_macs": ratio / macs}
    key = {"model": args.model, "depth": args.depth, "batch": batch, "dtype": dtype, "threads": args.threads}
    return {**key, "rounds": args.rounds, "best_dense": best, "environment": env, "r": summary, "builds": builds}


def show(record: dict[str, Any]) -> None:
    """Print the tables of one record: all builds, and each r against the best dense build."""
    lines = []
    for name, build in record["builds"].items():
        ms = build["ms"]
        error = f"{build['relative_rms']:.1e} ({build['eager_rms']:.1e})" if "relative_rms" in build else ""
        mark = " *" if name == record["best_dense"] else ""
        wrong = "" if build.get("correct", True) else " WRONG"
        lines.append([name + mark, f"{ms['median']:,.1f} [{ms['q1']:,.1f}, {ms['q3']:,.1f}]", error + wrong])
    print(f"\n{title(record)} (* best dense)\n" + common.table(lines, ["build", "ms [quartiles]", "rel. RMS (eager)"]))
    rows = [
        [r, s["build"], common.ratio_text(s["ratio"]), f"{s['macs_ratio']:.2f}x", f"{s['of_macs']:.2f}"]
        for r, s in record["r"].items()
    ]
    print("\n" + common.table(rows, ["r", "fastest build", "vs best dense", "MACs", "of MACs"]), flush=True)


def attention_variants(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways to add log(size) (B, N, 1) to attention."""

    def bias(size: Tensor) -> Tensor:
        return size.log().transpose(-1, -2).unsqueeze(1)

    def written_out(size: Tensor) -> Tensor:
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias(size).to(q.dtype)
        return logits.softmax(-1) @ v

    return {
        "attention without sizes": lambda size: F.scaled_dot_product_attention(q, k, v),
        "attention, bias": lambda size: F.scaled_dot_product_attention(q, k, v, attn_mask=bias(size).to(q.dtype)),
        "attention, key channel": lambda size: reference._attention_by_channel(
            q, k, v, bias(size), 0.0, q.shape[-1] ** -0.5
        ),
        "attention, written out": written_out,
        "attention, as the pass makes it": lambda size: ops.token_attention(q, k, v, size, 0, 0.0, None, False),
    }


def linear_scaling(module: nn.Module, x: Tensor, tokens: list[int], args: argparse.Namespace) -> float:
    """Time of a block's linear layers by number of tokens, relative to a time proportional to that number."""
    layers = [module.attn.qkv, module.attn.proj, module.mlp.fc1, module.mlp.fc2]
    given = {layer: torch.randn(*x.shape[:2], layer.in_features, dtype=x.dtype) for layer in layers}

    def run(count: int) -> None:
        for layer in layers:
            layer(given[layer][:, :count].contiguous())

    calls = {str(count): functools.partial(run, count) for count in tokens}
    seconds = common.interleave(calls, args.rounds, args.warmup, clock=args.clock)
    medians = {count: common.quartiles(seconds[str(count)])["median"] for count in tokens}
    return sum(medians[count] for count in tokens) / (medians[tokens[0]] * sum(tokens) / tokens[0])


def parts(args: argparse.Namespace, batch: int, dtype: str) -> dict[str, Any]:
    """Time what merging adds to one block, compiled, and the whole dense block for comparison."""
    model, images = create(argparse.Namespace(**{**vars(args), "depth": 1}), batch, dtype)
    dense, module = common.DTYPES[dtype], model.blocks[0]
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    heads, (_, tokens, channels) = module.attn.num_heads, x.shape
    q, k, v = module.attn.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    size, residual = torch.randint(1, 6, (batch, tokens, 1)).float(), torch.randn_like(x)
    one = torch.ones(channels, dtype=dense)

    def join(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, F.layer_norm(total, (channels,), one, one)

    def join_and_merge(x: Tensor) -> tuple[Tensor, Tensor]:
        total = ops.token_merge(x + residual, k, size, args.tome_r[0], 1)[0]
        return total, F.layer_norm(total, (channels,), one, one)

    calls = {"block, eager": functools.partial(module, x)}
    todo: dict[str, tuple[Callable[..., Any], Tensor]] = {
        "block": (module, x),
        "addition and norm": (join, x),
        "addition, merge and norm": (join_and_merge, x),
        **{name: (call, size) for name, call in attention_variants(q, k, v).items()},
    }
    for name, (call, argument) in todo.items():
        run = torch.compile(call, dynamic=False)
        run(argument)
        calls[name] = functools.partial(run, argument)
    seconds = common.interleave(calls, args.rounds * 4, args.warmup, clock=args.clock)
    ms = {name: common.quartiles(times, 1e3) for name, times in seconds.items()}
    whole = min(ms["block"]["median"], ms["block, eager"]["median"])
    share = (ms["addition, merge and norm"]["median"] - ms["addition and norm"]["median"]) / whole
    key = {"model": args.model, "depth": args.depth, "batch": batch, "dtype": dtype, "threads": args.threads}
    scaling = {str(r): linear_scaling(module, x, counts(tokens, 1, [r] * BLOCKS)[:-1], args) for r in args.tome_r}
    print(f"\n{title(key)}: matching and merge take {share:.2%} of a block's time")
    text = ", ".join(f"{value:.3f} at r = {r}" for r, value in scaling.items())
    print(f"linear layers at the tokens of {BLOCKS} blocks, over time in proportion to tokens: {text}")
    print(
        common.table([[n, f"{t['median']:.2f} [{t['q1']:.2f}, {t['q3']:.2f}]"] for n, t in ms.items()], ["part", "ms"])
    )
    found = {"tome_r": args.tome_r[0], "merge_share": share, "linear_scaling": scaling, "ms": ms}
    return {**key, **found, "environment": common.environment()}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks; the model's own by default")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="images per call (8)")
    parser.add_argument("--dtype", nargs="+", choices=list(common.DTYPES), help="(fp32 bf16)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--tome-r", type=int, nargs="+", metavar="R", help="tokens merged per block (8 13 16)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed calls of each build (15)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="untimed calls before those (%(default)s)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms of merged builds (all)")
    parser.add_argument("--parts", action="store_true", help="time the parts of one block instead")
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    args.clock = time.thread_time if args.threads == 1 else time.perf_counter
    if args.quick and args.depth is None:
        args.depth = 2
    full = {"batch": [8], "dtype": ["fp32", "bf16"], "tome_r": [8, 13, 16], "rounds": 15}
    common.fill(args, full, {"batch": [1], "dtype": ["fp32"], "tome_r": [8], "rounds": 3})
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    print(common.describe(common.environment()))
    name, measure = (PARTS, parts) if args.parts else (NAME, block)
    wrong = 0
    for batch, dtype in itertools.product(args.batch, args.dtype):
        record = measure(args, batch, dtype)
        torch._dynamo.reset()
        gc.collect()
        _, path = keep(name, record, args.out)
        if not args.parts:
            show(record)
            wrong += sum(not build.get("correct", True) for build in record["builds"].values())
    print(f"figures: {path}")
    if wrong:
        print(f"{wrong} builds are WRONG: see relative_rms", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
