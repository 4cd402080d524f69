"""Whole models on the CPU: masked and merged builds against the best dense build of the same dtype.

    python -m bench.cpu.e2e --model vit_base_patch16_224 --batch 1 8 --dtype fp32 bf16

The model is a timm model with random weights, which do not affect run time. Dense builds are eager, ``torch.compile``
and ``torch.compile`` with freezing; for models with convolutions beyond the stem also eager and compiled with freezing
channels last. Sparse builds are ``mpcompile.transform`` (magnitude masks), then ``torch.compile`` with the ``mpsparse``
backend and ``frozen`` weights; models with convolutions take their input in both memory formats.

A block is one (batch, dtype): its builds are interleaved in one run under ``torch.no_grad()``. The ratio of a build is
the median of the block's best dense build divided by its own median; below 1 is printed as "slower". The MAC column,
executed / dense, is the share of the work that masks and merging leave. Engine "auto" chooses by timings stored in the
cache folder. If those were made on a busy machine, they are wrong: name another folder in MPCOMPILE_CACHE. (--quick
uses a folder of its own.)

Every compiled sparse build is compared with the transformed module run eagerly in fp32, on at least 16 images. The
relative RMS difference must stay below 1e-5 (fp32). In bf16, rounding changes which of several nearly equally similar
tokens are merged, in some images; there the difference must stay below 1.5 times that of the transformed module run
eagerly in bf16. Otherwise the build is reported as WRONG and the exit status is 1.

Results go into cpu_e2e.json, one record per (model, depth, batch, dtype, threads). A later run replaces a whole record
of the same key, because figures of two runs are not interleaved, and keeps all others.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import mpcompile
from bench import common
from mpcompile.backend import compiled_graphs, mpsparse

NAME = "cpu_e2e"
KEY = ("model", "depth", "batch", "dtype", "threads")
CHECKED = 16  # images on which the outputs of a build are checked
Built = dict[str, tuple[Callable[[], Any], dict[str, Any]]]  # name -> call, facts


def create(args: argparse.Namespace, batch: int, dtype: str) -> tuple[nn.Module, Tensor]:
    """The model and its input."""
    torch.manual_seed(0)
    extra = {} if args.depth is None else {"depth": args.depth}
    model = timm.create_model(args.model, **extra).eval()
    size = resolve_model_data_config(model)["input_size"]
    return model.to(common.DTYPES[dtype]), torch.randn(batch, *size).to(common.DTYPES[dtype])


def convolutional(model: nn.Module) -> bool:
    """True if the model has convolutions beyond the stem."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def dense_builds(model: nn.Module, x: Tensor) -> Built:
    """All common ways to run a dense model."""
    built: Built = {"dense eager": (functools.partial(model, x), {})}
    for name, freezing in (("dense compile", False), ("dense compile freezing", True)):
        run, seconds = common.compiled_dense(model, x, freezing=freezing)
        built[name] = functools.partial(run, x), {"compile_s": seconds}
    if convolutional(model):
        # A copy, since the weights change their format.
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        form = x.contiguous(memory_format=torch.channels_last)
        built["dense eager channels_last"] = functools.partial(last, form), {}
        run, seconds = common.compiled_dense(last, form, freezing=True)
        built["dense compile freezing channels_last"] = functools.partial(run, form), {"compile_s": seconds}
    return built


def engines_of(graphs: list[Any]) -> dict[str, int]:
    """The number of layers on each engine, from the decision of lowering."""
    records = [record for graph in graphs for record in graph.plan.passes if record.name == "lower"]
    names = [entry["engine"] for record in records for entry in record.decision["engines"].values()]
    return dict(collections.Counter(names))


def sparse_builds(args: argparse.Namespace, model: nn.Module, x: Tensor, dtype: str, pattern: str, r: int) -> Built:
    """One transformed model, compiled, in both memory formats if it is convolutional."""
    name = f"{pattern}" + (f" merge {r}" if r else "")
    facts: dict[str, Any] = {"pattern": pattern, "tome_r": r, "engine": args.engine}
    config = mpcompile.Config(pattern=pattern, tome_r=r, score="magnitude", engine=args.engine)
    start = time.perf_counter()
    try:
        gm = mpcompile.transform(model, x, config)
    except mpcompile.MPCompileError as error:
        print(f"{name}: refused: {error}")
        return {}
    macs = gm.plan.macs
    facts |= {"transform_s": time.perf_counter() - start, "macs_dense": macs.dense, "macs_executed": macs.executed}
    facts["macs_ratio"] = macs.executed / macs.dense
    checked = [x, *(torch.randn_like(x) for _ in range(1, -(-CHECKED // len(x))))]
    reference = copy.deepcopy(gm).float()
    exact = torch.cat([reference(part.float()) for part in checked])
    allowed = common.TOLERANCE["fp32"]
    if dtype != "fp32":
        allowed = 1.5 * common.relative_rms(torch.cat([gm(part) for part in checked]), exact)
    compiled = torch.compile(gm, backend=mpsparse, options={"engine": args.engine, "frozen": True}, dynamic=False)
    forms = {"": x}
    if convolutional(model):
        forms[" channels_last"] = x.contiguous(memory_format=torch.channels_last)
    built: Built = {}
    for suffix, form in forms.items():
        before = set(compiled_graphs())
        start = time.perf_counter()
        compiled(form)
        seconds = time.perf_counter() - start
        graphs = [graph for graph in compiled_graphs() if graph not in before]
        order = torch.channels_last if suffix else torch.contiguous_format
        found = torch.cat([compiled(part.contiguous(memory_format=order)) for part in checked])
        error = common.relative_rms(found, exact)
        built[name + suffix] = (
            functools.partial(compiled, form),
            {
                **facts,
                "compile_s": seconds,
                "relative_rms": error,
                "allowed_rms": allowed,
                "correct": error < allowed,
                "engines": engines_of(graphs),
                "graphs": len(graphs),
            },
        )
    return built


def block(args: argparse.Namespace, batch: int, dtype: str) -> dict[str, Any]:
    """Build and time everything for one batch size and dtype."""
    model, x = create(args, batch, dtype)
    built = dense_builds(model, x)
    dense = list(built)
    for pattern, r in itertools.product(args.patterns, args.tome_r):
        print(f"batch {batch}, {dtype}: building {pattern}, {r} tokens merged per block", file=sys.stderr, flush=True)
        built |= sparse_builds(args, model, x, dtype, pattern, r)
    env = common.environment()
    calls = {name: run for name, (run, _) in built.items()}
    seconds = common.interleave(calls, args.rounds, args.warmup, f"batch {batch}, {dtype}")
    env["load average at the end"] = common.environment()["load average"]
    ms = {name: common.quartiles(times, 1e3) for name, times in seconds.items()}
    best = min(dense, key=lambda name: ms[name]["median"])
    builds = {
        name: {"dense": name in dense, "ms": ms[name], "ratio": ms[best]["median"] / ms[name]["median"], **facts}
        for name, (_, facts) in built.items()
    }
    key = {"model": args.model, "depth": args.depth, "batch": batch, "dtype": dtype, "threads": args.threads}
    return {**key, "rounds": args.rounds, "best_dense": best, "environment": env, "builds": builds}


def keep(name: str, new: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], Path]:
    """Store a record in ``folder/name.json``, replacing the one with the same key; return all records, and the file."""
    records = (common.load(name, folder) or {"records": []})["records"]
    others = [r for r in records if any(r[k] != new[k] for k in KEY)]
    records = sorted([*others, new], key=lambda r: tuple((r[k] is not None, r[k] or 0) for k in KEY))
    return records, common.save(name, {"records": records}, folder)


def title(record: dict[str, Any]) -> str:
    depth = "" if record["depth"] is None else f" depth {record['depth']}"
    return f"{record['model']}{depth}, batch {record['batch']}, {record['dtype']}, {record['threads']} threads"


def show(record: dict[str, Any]) -> None:
    """Print the table of one block."""
    lines = []
    for name, build in record["builds"].items():
        ms = build["ms"]
        error = "" if build["dense"] else f"{build['relative_rms']:.1e}" + ("" if build["correct"] else " WRONG")
        lines.append(
            [
                name + (" *" if name == record["best_dense"] else ""),
                f"{ms['median']:,.1f} [{ms['q1']:,.1f}, {ms['q3']:,.1f}]",
                common.ratio_text(build["ratio"]),
                "" if build["dense"] else f"{build['macs_ratio']:.3f}",
                "" if build["dense"] else ", ".join(f"{n} {e}" for e, n in sorted(build["engines"].items())),
                error,
                f"{build['compile_s']:.0f}" if "compile_s" in build else "",
            ]
        )
    print(f"\n{title(record)} (* best dense)")
    head = ["build", "ms [quartiles]", "vs best dense", "MACs", "layers on engines", "rel. RMS", "compile s"]
    print(common.table(lines, head), flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks, for transformers; the model's own by default")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="images per call (1 8)")
    parser.add_argument("--dtype", nargs="+", choices=list(common.DTYPES), help="(fp32 bf16)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--patterns", nargs="+", metavar="N:M", help="(2:4 8:16)")
    parser.add_argument(
        "--tome-r", type=int, nargs="+", metavar="R", help="tokens merged per block (0 8; 0 without attention)"
    )
    parser.add_argument("--engine", default="auto", help="auto, cpu, reference or dense (%(default)s)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed calls of each build (15)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="untimed calls before those (%(default)s)")
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick and args.depth is None and args.model.startswith(("vit", "deit")):
        args.depth = 1
    full: dict[str, Any] = {"batch": [1, 8], "dtype": ["fp32", "bf16"], "patterns": ["2:4", "8:16"], "rounds": 15}
    full["tome_r"] = [0, 8]
    common.fill(args, full, {"batch": [1], "dtype": ["fp32"], "patterns": ["2:4"], "rounds": 3})
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.quick:
        os.environ.setdefault("MPCOMPILE_CACHE", str(args.out / "cache"))
    torch.set_num_threads(args.threads)
    print(common.describe(common.environment()))
    wrong = 0
    for batch, dtype in itertools.product(args.batch, args.dtype):
        record = block(args, batch, dtype)
        torch._dynamo.reset()  # frees the compiled graphs, and with them the packed weights
        gc.collect()
        records, path = keep(NAME, record, args.out)
        show(record)
        wrong += sum(not build.get("correct", True) for build in record["builds"].values())
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for record in records:
        key = f"{record['model']}" + ("" if record["depth"] is None else f" depth {record['depth']}")
        panel = panels.setdefault(f"{key}, {record['threads']} threads", {})
        bars = {name: build["ratio"] for name, build in record["builds"].items() if not build["dense"]}
        panel[f"batch {record['batch']}\n{record['dtype']}"] = bars
    print()
    common.plot(NAME, panels, "End to end on the CPU against the best dense build of the same dtype", args.out)
    print(f"figures: {path}")
    if wrong:
        print(f"{wrong} builds are WRONG: see relative_rms", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
