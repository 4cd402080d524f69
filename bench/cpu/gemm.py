"""One layer at a time: the CPU engine on N:M weights against the best dense build of the same layer.

    python -m bench.cpu.gemm                    # the matrix products of ViT-B/16
    python -m bench.cpu.gemm --conv             # convolutions of ResNet-50
    python -m bench.cpu.gemm --layers tiny --tokens 2 --no-autotune --out /tmp   # the overhead of a call

Matrix products: qkv, proj, fc1 and fc2 of ViT-B/16, with bias, at 197 tokens (one image) and 1576 (eight). Dense
candidates are eager ``F.linear``, the weight prepacked for oneDNN and (fp32) for MKL, ``torch.compile``, and
``torch.compile`` with freezing and max-autotune. In fp32 the engine's own dense product is a candidate too, as "dense".

Convolutions: those of ResNet-50 at 224 x 224 with stride 1, without bias. Dense candidates are eager and prepacked for
oneDNN, each contiguous and channels last. The sparse kernel runs in both memory formats, and each is compared with
the best dense candidate of any format.

The ratio is the median of the best dense candidate divided by the median of the sparse kernel: above 1 is faster, and
below 1 is printed as "slower". The minimum over several dense medians favours dense. All candidates of a row are
interleaved in one run, so that each finds the weights of the others in the caches, much as in a model. The result of
the sparse kernel is compared with the dense product with the masked weight, by relative RMS (1e-5 fp32, 2e-2 bf16).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from mpcompile.errors import first_line
from mpcompile.kernels.cpu.engine import CpuDenseEngine, CpuEngine
from mpcompile.kernels.dispatch import Engine, LayerSpec
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.mask import magnitude_mask

LAYERS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}
ASKED = {"tiny": (16, 16)}  # so small that it times the call itself; only timed on request
CONVS = {  # in, out, kernel, side of the image
    **{f"3x3 {c}->{c} @{side}": (c, c, 3, side) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))},
    **{
        f"1x1 {c}->{out} @{side}": (c, out, 1, side)
        for c, out, side in ((64, 256, 56), (512, 128, 28), (1024, 256, 14), (2048, 512, 7))
    },
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FEW = 500  # tokens; with fewer than that, three times as many rounds
ENGINE = CpuEngine()

Builds = dict[str, Callable[[], Any]]


def optional(builds: Builds, name: str, make: Callable[[], Callable[[], Any]]) -> None:
    """Add a build if this torch and processor support it; otherwise print a note."""
    try:
        run = make()
        run()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        print(f"no {name}: {first_line(error)[:100]}")
        return
    builds[name] = run


def prepacked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return functools.partial(torch.ops.mkldnn._linear_pointwise, x, packed, bias, "none", [], "")


def mkl_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any]:
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, x.shape[0])
    return functools.partial(torch.ops.mkl._mkl_linear, x, packed, weight, bias, x.shape[0])


def prepacked_conv(x: Tensor, weight: Tensor, padding: int) -> Callable[[], Any]:
    geometry = [padding] * 2, [1, 1], [1, 1], 1
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, list(x.shape))
    return functools.partial(torch.ops.mkldnn._convolution_pointwise, x, packed, None, *geometry, "none", [], "")


def dense_linear(x: Tensor, layer: nn.Linear, autotune: bool) -> Builds:
    """Ways to run a dense linear layer."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    builds: Builds = {"eager": functools.partial(F.linear, x, weight, bias)}
    optional(builds, "oneDNN prepacked", lambda: prepacked_linear(x, weight, bias))
    if x.dtype == torch.float32 and torch.backends.mkl.is_available():
        optional(builds, "MKL prepacked", lambda: mkl_linear(x, weight, bias))
    builds["compile"] = functools.partial(common.compiled_dense(layer, x)[0], x)
    if autotune:
        tuned, _ = common.compiled_dense(layer, x, freezing=True, max_autotune=True)
        builds["compile freezing max-autotune"] = functools.partial(tuned, x)
    return builds


def dense_conv(forms: dict[str, Tensor], weight: Tensor, padding: int) -> Builds:
    """Ways to run a dense convolution."""
    builds: Builds = {}
    for form, x in forms.items():
        held = weight.contiguous(memory_format=FORMATS[form])
        builds[f"eager {form}"] = functools.partial(F.conv2d, x, held, None, 1, padding)
        optional(builds, f"oneDNN prepacked {form}", functools.partial(prepacked_conv, x, weight, padding))
    return builds


def sparse(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, pattern: Pattern, engine: Engine = ENGINE
) -> tuple[Any, Tensor]:
    """The engine's call and its expected result, or the reason why it cannot run."""
    geometry = None if weight.dim() == 2 else ([1, 1], [padding] * 2, [1, 1], 1)
    spec = LayerSpec(tuple(weight.shape), weight.dtype, weight.device, pattern, geometry, tuple(x.shape))
    reason = engine.supports(spec) or (f"inputs don't divide by {pattern.m}" if weight.shape[1] % pattern.m else None)
    if reason is not None:
        return reason, x
    mask = magnitude_mask(weight, pattern)
    target, args = engine.call(spec, x, engine.pack(weight, mask, spec), bias)
    masked = weight * mask
    expected = F.linear(x, masked, bias) if geometry is None else F.conv2d(x, masked, bias, 1, padding)
    return functools.partial(target, *args), expected


def compare(
    dense: Builds, candidates: dict[str, tuple[Any, Tensor]], dtype: str, rounds: int, warmup: int, label: str
) -> dict[str, Any]:
    """Time and check one row: dense builds and sparse candidates, interleaved."""
    runs = {name: run for name, (run, _) in candidates.items() if callable(run)}
    errors = {name: common.relative_rms(run(), candidates[name][1]) for name, run in runs.items()}
    seconds = common.interleave({**dense, **runs}, rounds, warmup, label)
    us = {name: common.quartiles(times) for name, times in seconds.items()}
    best = min(dense, key=lambda name: us[name]["median"])
    row: dict[str, Any] = {"rounds": rounds, "best_dense": best, "best_dense_us": us[best]["median"]}
    row["dense_us"] = {name: us[name] for name in dense}
    row["sparse"] = {}
    for name, (run, _) in candidates.items():
        if not callable(run):
            row["sparse"][name] = {"unsupported": run}
            continue
        row["sparse"][name] = {
            "us": us[name],
            "ratio": us[best]["median"] / us[name]["median"],
            "relative_rms": errors[name],
            "correct": errors[name] < common.TOLERANCE[dtype],
        }
    return row


def cell(entry: dict[str, Any]) -> str:
    """The table entry of a sparse candidate."""
    if "unsupported" in entry:
        return entry["unsupported"]
    wrong = "" if entry["correct"] else f" WRONG ({entry['relative_rms']:.1e})"
    return f"{entry['us']['median']:,.0f} ({common.ratio_text(entry['ratio'])}){wrong}"


def linear_row(
    args: argparse.Namespace, threads: int, dtype: str, tokens: int, name: str, patterns: list[Pattern]
) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    shape = (LAYERS | ASKED)[name]
    layer = nn.Linear(*shape).to(common.DTYPES[dtype]).eval()
    x = torch.randn(tokens, shape[0]).to(common.DTYPES[dtype])
    weight, bias = layer.weight.detach(), layer.bias.detach()
    rounds = args.rounds * (3 if tokens < FEW else 1)
    label = f"{threads} threads, {dtype}, {tokens} tokens, {name}"
    dense = dense_linear(x, layer, args.autotune)
    candidates = {str(p): sparse(x, weight, bias, 0, p) for p in patterns}
    if dtype == "fp32":
        candidates["dense"] = sparse(x, weight, bias, 0, Pattern(1, 1), CpuDenseEngine())
    return {
        **{"threads": threads, "dtype": dtype, "tokens": tokens, "layer": name, "shape": list(weight.shape)},
        **compare(dense, candidates, dtype, rounds, args.warmup, label),
    }


def conv_row(
    args: argparse.Namespace, threads: int, dtype: str, batch: int, name: str, patterns: list[Pattern]
) -> dict[str, Any]:
    torch.manual_seed(0)
    channels, out, kernel, side = CONVS[name]
    x = torch.randn(batch, channels, side, side).to(common.DTYPES[dtype])
    weight = torch.randn(out, channels, kernel, kernel).to(common.DTYPES[dtype])
    forms = {form: x.contiguous(memory_format=order) for form, order in FORMATS.items()}
    candidates = {
        f"{pattern} {form}": sparse(value, weight, None, kernel // 2, pattern)
        for pattern in patterns
        for form, value in forms.items()
    }
    label = f"{threads} threads, {dtype}, batch {batch}, {name}"
    dense = dense_conv(forms, weight, kernel // 2)
    return {
        **{"threads": threads, "dtype": dtype, "batch": batch, "layer": name, "shape": list(weight.shape)},
        **compare(dense, candidates, dtype, args.rounds, args.warmup, label),
    }


def show(rows: list[dict[str, Any]], size: str, name: str, args: argparse.Namespace) -> None:
    """Print the table and draw the plot."""
    columns = list(dict.fromkeys(key for row in rows for key in row["sparse"]))
    head = ["threads", "dtype", size, "layer", "best dense", "us", *(f"{c} us (ratio)" for c in columns)]
    lines = [
        [row["threads"], row["dtype"], row[size], row["layer"], row["best_dense"], f"{row['best_dense_us']:,.0f}"]
        + [cell(row["sparse"][c]) if c in row["sparse"] else "" for c in columns]
        for row in rows
    ]
    print(common.table(lines, head, left=5))
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        panel = panels.setdefault(f"{row['threads']} threads, {row['dtype']}", {})
        ratios = {c: entry["ratio"] for c, entry in row["sparse"].items() if "ratio" in entry}
        panel[f"{row['layer']}\n{size} {row[size]}"] = ratios
    common.plot(name, panels, "N:M on the CPU engine against the best dense build of the layer", args.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conv", action="store_true", help="convolutions of ResNet-50 instead of ViT-B's products")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="thread counts (1 2)")
    parser.add_argument("--dtype", nargs="+", choices=list(common.DTYPES), help="(fp32 bf16; with --conv fp32)")
    parser.add_argument("--patterns", nargs="+", metavar="N:M", help="(2:4 8:16 1:4 12:16; with --conv 8:16)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help="rows of the products (197 1576)")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="images, with --conv (1 8)")
    names = f"({', '.join(LAYERS)}; also tiny; with --conv, all)"
    parser.add_argument("--layers", nargs="+", metavar="NAME", help=names)
    parser.add_argument("--rounds", type=int, metavar="N", help="timed calls each (21; three times that at few tokens)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="untimed calls before those (%(default)s)")
    parser.add_argument(
        "--autotune",
        action=argparse.BooleanOptionalAction,
        help="time torch.compile with freezing and max-autotune too, which takes long to compile (on; off in --quick)",
    )
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    shapes: dict[str, Any] = CONVS if args.conv else LAYERS
    full: dict[str, Any] = {"threads": [1, 2], "tokens": [197, 1576], "batch": [1, 8], "rounds": 21, "autotune": True}
    full |= {"dtype": ["fp32"] if args.conv else ["fp32", "bf16"], "layers": list(shapes)}
    full |= {"patterns": ["8:16"] if args.conv else ["2:4", "8:16", "1:4", "12:16"]}
    quick: dict[str, Any] = {"threads": [2], "tokens": [64], "batch": [1], "rounds": 5, "autotune": False}
    quick |= {"layers": list(shapes)[3::4] if args.conv else ["proj"]}
    common.fill(args, full, quick)
    known = shapes if args.conv else shapes | ASKED
    unknown = [name for name in args.layers if name not in known]
    if unknown:
        parser.error(f"no such layer: {', '.join(unknown)}; there are: {', '.join(map(repr, known))}")
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    patterns = [Pattern.parse(text) for text in args.patterns]
    name, size, measure = ("cpu_conv", "batch", conv_row) if args.conv else ("cpu_gemm", "tokens", linear_row)
    data: dict[str, Any] = {"environment": {**common.environment(), "threads": args.threads}, "rows": []}
    print(common.describe(data["environment"]))
    for threads, dtype, count, layer in itertools.product(args.threads, args.dtype, getattr(args, size), args.layers):
        with common.num_threads(threads):
            row = measure(args, threads, dtype, count, layer, patterns)
        data["rows"].append(row)
        ratios = ", ".join(f"{key} {cell(entry)}" for key, entry in row["sparse"].items())
        print(f"{threads} threads, {dtype}, {size} {count}, {layer}: {row['best_dense']} "
              f"{row['best_dense_us']:,.0f} us; {ratios}", flush=True)  # fmt: skip
        data["environment"]["load average at the end"] = common.environment()["load average"]
        path = common.save(name, data, args.out)
    print()
    show(data["rows"], size, name, args)
    print(f"figures: {path}")
    wrong = [e for row in data["rows"] for e in row["sparse"].values() if not e.get("correct", True)]
    if wrong:
        print(f"{len(wrong)} results are WRONG: see relative_rms", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
