"""One product at a time on a GPU: 2:4 on sparse tensor cores against dense products of the same dtype.

    python -m bench.gpu.gemm                                        # within 8 minutes; correctness first
    python -m bench.gpu.gemm --env sparse=/opt/triton39             # ours under another Triton
    python -m bench.gpu.gemm --tiles                                # every tile of ours on every shape
    python -m bench.gpu.gemm --dry-run                              # does the benchmark itself run? (CPU)

Candidates: ``cublas`` (eager F.linear), ``inductor`` (torch.compile, max-autotune), ``cusparselt`` (torch's own 2:4
product, after its algorithm search), ``gluon_mma_sp``, ``gluon_wgmma_sp`` and ``triton_expand``. Each runs in two
separate processes, in rotating order; the figure is the median of both processes' medians. Every process first checks
its results (relative RMS against fp32 on the same 16-bit inputs, 2e-3 fp16, 1e-2 bf16), and measures the ceilings of
the card: a copy and an 8192-cubed product. Calls are captured in a CUDA graph and timed by events; inputs are in the
second-level cache where they fit. TFLOP/s count the operations of the dense product for all candidates.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from bench.gpu import common as gpu_common
from mpcompile.kernels.dispatch import GPU_ENGINES, LayerSpec
from mpcompile.kernels.nm_format import Pattern
from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch
from mpcompile.kernels.nm_linear.gpu.engine import TensorCoreEngine
from mpcompile.kernels.nm_linear.gpu.tiles import family, tiles_for
from mpcompile.passes.mask import magnitude_mask

# Tokens x (outputs, inputs), the most informative first: if the time budget runs out, the last ones are left out.
_VIT = {"ViT-B": 768, "ViT-L": 1024, "ViT-S": 384}
_TOKENS = (12608, 25216, 50432, 1576, 197)
CONVNEXT = [
    (50176, 512, 128),
    (50176, 128, 512),
    (12544, 1024, 256),
    (3136, 2048, 512),
    (784, 4096, 1024),
]  # 1x1, 16 images
RESNET = [
    (200704, 256, 64),
    (50176, 512, 128),
    (12544, 1024, 256),
    (3136, 2048, 512),
    (3136, 512, 2048),
]  # 1x1, 64 images
DENSE = ("cublas", "inductor")
CANDIDATES = (*DENSE, *(engine.name for engine in GPU_ENGINES))


def shapes() -> list[dict[str, Any]]:
    found = []
    for tokens, (model, width) in itertools.product(_TOKENS, _VIT.items()):
        layers = {
            "fc1": (4 * width, width),
            "fc2": (width, 4 * width),
            "qkv": (3 * width, width),
            "proj": (width, width),
        }
        for layer, (n, k) in layers.items():
            found.append({"model": model, "layer": layer, "m": tokens, "n": n, "k": k})
    for model, sizes in (("ConvNeXtV2-B", CONVNEXT), ("ResNet-50", RESNET)):
        found += [{"model": model, "layer": f"1x1 {k}->{n}", "m": m, "n": n, "k": k} for m, n, k in sizes]
    return sorted(
        found,
        key=lambda s: (
            s["m"] < 12608 or s["layer"] not in ("fc1", "fc2"),
            _TOKENS.index(s["m"]) if s["m"] in _TOKENS else 9,
        ),
    )


CHECKS = [(1, 64, 128), (197, 768, 3072), (300, 256, 512), (33, 1000, 272)]


def problem(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, 2:4 mask, bias."""
    generator = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    weight = values(n, k) / k**0.5
    return values(m, k), weight, magnitude_mask(weight, Pattern(2, 4)), values(n)


def build(
    name: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], Tensor], Tensor]:
    """A candidate's call, and its expected result in fp32.

    Raises:
        RuntimeError: the candidate cannot run the product; the message gives the reason.
    """
    x, weight, mask, bias = problem(m, n, k, dtype, device)
    masked = weight * mask
    expected = F.linear(x.float(), masked.float(), bias.float())
    if name == "cublas":
        return functools.partial(F.linear, x, masked, bias), expected
    if name == "inductor":
        options: dict[str, Any] = {"max_autotune": True}
        run = torch.compile(lambda x: F.linear(x, masked, bias), dynamic=False, options=options)
        run(x)
        return functools.partial(run, x), expected
    engine = next(engine for engine in GPU_ENGINES if engine.name == name)
    spec = LayerSpec((n, k), dtype, device, Pattern(2, 4), inputs=(m, k))
    reason = engine.supports(spec)
    if reason is not None and device.type == "cuda":
        raise RuntimeError(reason)
    target, args = engine.call(spec, x, engine.pack(weight, mask, spec), bias)
    return functools.partial(target, *args), expected


def tile_times(name: str, shape: dict[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Median microseconds of each tile of one of our kernels."""
    engine = next(engine for engine in GPU_ENGINES if engine.name == name)
    arch = family(torch.cuda.get_device_capability(device)) if device.type == "cuda" else None
    if not isinstance(engine, TensorCoreEngine) or arch is None:
        return {}
    m, n, k = shape["m"], shape["n"], shape["k"]
    x, weight, mask, bias = problem(m, n, k, dtype, device)
    packed = engine.pack(weight, mask, LayerSpec((n, k), dtype, device, Pattern(2, 4), inputs=(m, k)))
    found = {}
    for tile in tiles_for(name, arch):
        args = (x, packed["values"], packed["index"], bias, None, n, engine.layout, "none")
        run = functools.partial(gpu_launch.product, *args, tile=tile)
        found[tile.name] = round(gpu_common.median_us(run, device, rounds=3)["median"], 3)
    return found


@torch.no_grad()
def work(job: dict[str, Any], result: Path) -> int:
    """A worker: checks, ceilings, then times until its time is up."""
    start, device = time.monotonic(), torch.device(job["device"])
    dtype, name = gpu_common.DTYPES[job["dtype"]], job["candidate"]
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {"versions": gpu_common.versions(device), "checks": [], "rows": []}
    for m, n, k in job["checks"]:
        try:
            run, expected = build(name, m, n, k, dtype, device)
            error = gpu_common.relative_rms(run(), expected)
            found["checks"].append(
                {"shape": [m, n, k], "relative_rms": error, "ok": error < gpu_common.TOLERANCE[job["dtype"]]}
            )
        except Exception as failure:  # a failing candidate must not lose the figures of the others
            found["checks"].append({"shape": [m, n, k], "reason": str(failure).strip().splitlines()[-1][:200]})
    if any(not check.get("ok", True) for check in found["checks"]):
        gpu_common.write_result(result, {**found, "error": "WRONG results: not timed"})
        return 1
    if not any("ok" in check for check in found["checks"]):
        gpu_common.write_result(result, {**found, "error": found["checks"][0]["reason"]})
        return 1
    found["ceilings"] = gpu_common.ceilings(device, dtype, tiny=job["dry"])
    for shape in job["shapes"]:
        if time.monotonic() - start > job["limit"]:
            found["stopped"] = f"time was up after {len(found['rows'])} of {len(job['shapes'])} shapes"
            break
        try:
            run, _ = build(name, shape["m"], shape["n"], shape["k"], dtype, device)
            row = {**shape, **gpu_common.median_us(run, device)}
            if job["tiles"]:
                row["tiles"] = tile_times(name, shape, dtype, device)
            del run
        except Exception as failure:
            row = {**shape, "reason": str(failure).strip().splitlines()[-1][:200]}
        found["rows"].append(row)
        gpu_common.write_result(result, found)
    gpu_common.write_result(result, found)
    return 0


def merged(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per shape: microseconds of each candidate (median of its processes), TFLOP/s, shares of the ceilings."""
    rows: dict[tuple[int, ...], dict[str, Any]] = {}
    for name, runs in results.items():
        for row in (row for run in runs for row in run.get("rows", [])):
            key = (row["m"], row["n"], row["k"])
            entry = rows.setdefault(
                key, {**{k: row[k] for k in ("model", "layer", "m", "n", "k")}, "us": {}, "reasons": {}}
            )
            if "median" in row:
                entry["us"].setdefault(name, []).append(row["median"])
            else:
                entry["reasons"][name] = row["reason"]
            if row.get("tiles"):
                entry.setdefault("tiles", {})[name] = row["tiles"]
    peaks = [run["ceilings"]["matmul_tflops"] for runs in results.values() for run in runs if "ceilings" in run]
    copies = [run["ceilings"]["copy_gbs"] for runs in results.values() for run in runs if "ceilings" in run]
    for entry in rows.values():
        entry["us"] = {name: gpu_common.combined(values) for name, values in entry["us"].items()}
        m, n, k = entry["m"], entry["n"], entry["k"]
        entry["tflops"] = {name: 2e-6 * m * n * k / us for name, us in entry["us"].items()}
        entry["of_matmul"] = {name: value / max(peaks) for name, value in entry["tflops"].items()}
        moved = {name: m * (k + n) * 2 + (n * k * 2 if name in DENSE else n * k * 9 // 8) for name in entry["us"]}
        entry["of_copy"] = {name: moved[name] * 1e-3 / us / max(copies) for name, us in entry["us"].items()}
        bar = min((us for name, us in entry["us"].items() if name in DENSE), default=None)
        entry["against_best_dense"] = {
            name: bar / us for name, us in entry["us"].items() if bar is not None and name not in DENSE
        }
    return list(rows.values())


def show(rows: list[dict[str, Any]]) -> str:
    names = [name for name in CANDIDATES if any(name in row["us"] for row in rows)]
    lines = []
    for row in rows:
        cells = []
        for name in names:
            if name not in row["us"]:
                cells.append("-")
                continue
            text = f"{row['us'][name]:,.1f} us, {row['tflops'][name]:,.0f} TF, {row['of_matmul'][name]:.0%}"
            ratio = row["against_best_dense"].get(name)
            cells.append(text if ratio is None else f"{text}, {common.ratio_text(ratio)}")
        lines.append([row["model"], row["layer"], row["m"], *cells])
    return common.table(lines, ["model", "layer", "tokens", *names], left=2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="bf16", help="(%(default)s)")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of each candidate (%(default)s)")
    parser.add_argument("--tiles", action="store_true", help="time every tile of our kernels too")
    gpu_common.arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    job = gpu_common.worker_arguments(argv)
    if job is not None:
        return work(*job)
    args = parse(argv)
    device, given = gpu_common.device_for(args.dry_run), gpu_common.environments(args.env)
    todo = [{"model": "tiny", "layer": "fc", "m": 40, "n": 64, "k": 128}] if args.dry_run else shapes()
    checks = CHECKS[:1] if args.dry_run else CHECKS
    names = [n for n in args.candidates if n != "cusparselt"] if args.dry_run else args.candidates
    end, results = time.monotonic() + args.budget, {name: [] for name in names}
    order = [names[i % len(names) :] + names[: i % len(names)] for i in range(args.processes)]
    runs = [name for one in order for name in one]
    for number, name in enumerate(runs):
        left = (end - time.monotonic()) / (len(runs) - number)
        base = {"candidate": name, "device": str(device), "dtype": args.dtype, "dry": args.dry_run, "tiles": args.tiles}
        work_job = {**base, "shapes": todo, "checks": checks, "limit": 0.7 * left}
        kind = "dense" if name in DENSE else "sparse"
        found = gpu_common.run_worker("bench.gpu.gemm", work_job, kind, given, max(60.0, 1.2 * left))
        results[name].append(found)
        state = found.get("error") or found.get("stopped") or f"{len(found['rows'])} shapes"
        print(f"{name} ({found.get('environment')}): {state}", flush=True)
    rows = merged(results)
    data = {"dtype": args.dtype, "processes": results, "rows": rows}
    path = common.save("gpu_gemm", data, gpu_common.folder_for(args))
    print(show(rows))
    print(f"figures: {path}")
    wrong = [name for name, found in results.items() if any("WRONG" in run.get("error", "") for run in found)]
    if wrong:
        print(f"WRONG results: {', '.join(wrong)}; see checks", file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
