"""The paper's audit of convolutions, completed: unfolding is timed too, and cuDNN is measured beside it.

    python -m bench.gpu.conv_audit                       # on a GPU
    python -m bench.gpu.conv_audit --dry-run             # does the benchmark itself run? (CPU)

Every convolution of ResNet-50 and ResNet-152d (each shape once, weighted by its number of layers) runs in four ways, in
the same dtype: cuDNN on channels-last memory, unfold + dense product, unfold + 2:4 product, and (1x1) the 2:4 product
on channels-last memory without unfolding. Two ratios are printed: 2:4 against dense *after the same unfolding*, as in
comparisons of products, and against cuDNN, which is the gain of a model. Differences are relative RMS against
the native convolution in fp32 with the masked weight.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import common
from bench.gpu import common as gpu_common
from mpcompile.kernels.dispatch import GPU_ENGINES, Engine, LayerSpec
from mpcompile.kernels.nm_format import Pattern, to_rows
from mpcompile.passes.mask import magnitude_mask

MODELS = ("resnet50", "resnet152d")


def convolutions(model: str, batch: int, size: int) -> list[dict[str, Any]]:
    """Shapes of a model's ungrouped convolutions with inputs divisible by 16, and the number of layers of each."""
    found: dict[tuple[Any, ...], int] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels % 16 == 0:
            key = (tuple(inputs[0].shape[1:]), tuple(module.weight.shape), module.stride, module.padding)
            found[key] = found.get(key, 0) + 1

    with torch.device("meta"):
        network = timm.create_model(model).eval()
        for module in network.modules():
            module.register_forward_hook(note)
        network(torch.empty(1, 3, size, size))
    return [
        {"inputs": (batch, *x), "shape": w, "stride": list(s), "padding": list(p), "layers": count}
        for (x, w, s, p), count in found.items()
    ]


def engine_for(spec: LayerSpec) -> Engine | None:
    """The first 2:4 engine that can run a product here; on a CPU, the first of all, which falls back to plain torch."""
    ours = [engine for engine in GPU_ENGINES if engine.name.startswith("gluon")]
    if spec.device.type != "cuda":
        return ours[-1]
    return next((engine for engine in ours if engine.supports(spec) is None), None)


def unfolded(x: Tensor, shape: tuple[int, ...], stride: list[int], padding: list[int]) -> Tensor:
    """x (B, C, H, W) -> (B * pixels, kh * kw * C), channels fastest, as the packed weight has its columns."""
    kh, kw = shape[2:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    pixels = x.permute(0, 2, 3, 1).unfold(1, kh, stride[0]).unfold(2, kw, stride[1])  # (B, oh, ow, C, kh, kw)
    return pixels.permute(0, 1, 2, 4, 5, 3).reshape(-1, kh * kw * shape[1])


@torch.no_grad()
def audit(layer: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Microseconds and differences of one convolution."""
    generator = torch.Generator(device).manual_seed(0)

    def values(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    shape, stride, padding = tuple(layer["shape"]), layer["stride"], layer["padding"]
    x = values(layer["inputs"]).contiguous(memory_format=torch.channels_last)
    weight = values(shape) / (shape[1] * shape[2] * shape[3]) ** 0.5
    mask = magnitude_mask(weight, Pattern(2, 4))
    masked = (weight * mask).contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.float(), masked.float(), None, stride, padding)
    rows = to_rows(masked).contiguous()
    patches = unfolded(x, shape, stride, padding)
    spec = LayerSpec(tuple(rows.shape), dtype, device, Pattern(2, 4), inputs=tuple(patches.shape))
    engine = engine_for(spec)
    calls: dict[str, Any] = {
        "cudnn": functools.partial(F.conv2d, x, masked, None, stride, padding),
        "unfold": functools.partial(unfolded, x, shape, stride, padding),
        "dense product": functools.partial(F.linear, patches, rows),
    }
    if engine is not None:
        target, args = engine.call(spec, patches, engine.pack(rows, to_rows(mask).contiguous(), spec), None)
        calls["2:4 product"] = functools.partial(target, *args)
        if shape[2:] == (1, 1):
            geometry = (stride, padding, [1, 1], 1)
            conv = LayerSpec(shape, dtype, device, Pattern(2, 4), geometry, tuple(x.shape))
            target, args = engine.call(conv, x, engine.pack(weight, mask, conv), None)
            calls["2:4 direct"] = functools.partial(target, *args)
    us = {name: gpu_common.median_us(run, device)["median"] for name, run in calls.items()}
    images = exact.permute(0, 2, 3, 1)
    errors = {}
    for name, run in calls.items():
        if name != "unfold":
            y = run()
            y = y.permute(0, 2, 3, 1) if y.dim() == 4 else y.view(images.shape)
            errors[name] = gpu_common.relative_rms(y, images)
    return {**layer, "engine": None if engine is None else engine.name, "us": us, "relative_rms": errors}


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Ratios of times; above 1, 2:4 is faster."""
    us = row["us"]
    if "2:4 product" not in us:
        return {}
    both = us["unfold"] + us["2:4 product"]
    found = {
        "product alone": us["dense product"] / us["2:4 product"],
        "behind unfold": (us["unfold"] + us["dense product"]) / both,
        "unfold + 2:4 against cudnn": us["cudnn"] / both,
    }
    if "2:4 direct" in us:
        found["direct against cudnn"] = us["cudnn"] / us["2:4 direct"]
    return found


def totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of all layers of a model in each way; the last is direct where possible, else unfold + 2:4."""
    found = {"cudnn": 0.0, "unfold + dense": 0.0, "unfold + 2:4": 0.0, "best 2:4": 0.0}
    for row in rows:
        us, count = row["us"], row["layers"]
        sparse = us["unfold"] + us.get("2:4 product", us["dense product"])
        found["cudnn"] += count * us["cudnn"]
        found["unfold + dense"] += count * (us["unfold"] + us["dense product"])
        found["unfold + 2:4"] += count * sparse
        found["best 2:4"] += count * min(us.get("2:4 direct", sparse), sparse)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="images (%(default)s)")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16", help="(%(default)s)")
    gpu_common.arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device, dtype = gpu_common.device_for(args.dry_run), gpu_common.DTYPES[args.dtype]
    data: dict[str, Any] = {"versions": gpu_common.versions(device), "dtype": args.dtype, "batch": args.batch}
    data["models"] = {}
    wrong = 0
    for model in args.models[:1] if args.dry_run else args.models:
        layers = convolutions(model, 1 if args.dry_run else args.batch, 64 if args.dry_run else 224)
        rows = [audit(layer, dtype, device) for layer in (layers[:4] if args.dry_run else layers)]
        for row in rows:
            row["ratios"] = ratios(row)
            wrong += sum(error > gpu_common.TOLERANCE[args.dtype] for error in row["relative_rms"].values())
        data["models"][model] = {"layers": rows, "totals_us": totals(rows)}
        names = ["product alone", "behind unfold", "unfold + 2:4 against cudnn", "direct against cudnn"]
        lines = [
            ["x".join(map(str, r["shape"])), r["inputs"][2], r["layers"], f"{r['us']['unfold']:,.1f}"]
            + [common.ratio_text(r["ratios"][n]) if n in r["ratios"] else "-" for n in names]
            for r in rows
        ]
        print(model)
        print(common.table(lines, ["weight", "side", "layers", "unfold us", *names]))
        print(", ".join(f"{name} {us:,.0f} us" for name, us in totals(rows).items()), "for all layers\n", flush=True)
    print(f"figures: {common.save('conv_audit', data, gpu_common.folder_for(args))}")
    if wrong:
        print(f"{wrong} results are WRONG: see relative_rms", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
