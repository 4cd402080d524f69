"""Whole models on a GPU: 2:4 and token merging against the best torch.compile of the dense model in the same dtype.

    python -m bench.gpu.e2e --models vit_base_patch16_224 --batch 128      # one command: smoke test, checks, speed
    python -m bench.gpu.e2e --env sparse=/opt/triton39                     # ours under another Triton
    python -m bench.gpu.e2e --dry-run                                      # does the benchmark itself run? (CPU)

Builds, each in a separate process, of models with random weights (run time does not depend on them):

  eager        the timm model
  fp32 eager   the same in true fp32 (no TF32), in a separate column: the baseline of the paper's ratios
  dense        torch.compile, mode max-autotune (CUDA graphs on)
  tome         only token merging, torch.compile, mode max-autotune
  2:4          backend mpsparse, frozen, mode max-autotune
  2:4 tome     both
  2:4 graph    the lowered model without Inductor, under a CUDA graph. It runs only if Inductor fails in the sparse
               environment, or if named in --builds.

First comes a smoke test in the sparse environment: Inductor on a small model, and one of our kernels. Then every build
is checked: sparse ones against the same transformed model in eager fp32 (relative RMS below 3e-2), dense ones against
eager. The baseline is the faster of eager and dense. Ratios below 1 are printed as slower. Builds beyond the time
budget are listed as missing, not estimated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mpcompile
from bench import common
from bench.gpu import common as gpu_common
from mpcompile.backend import mpsparse

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "deit_small_patch16_224", "convnextv2_base", "resnet50")
BATCHES = (128, 8, 1, 64, 256)
DENSE = ("eager", "fp32 eager", "dense")
BUILDS = (*DENSE, "tome", "2:4", "2:4 tome", "2:4 graph")
LIMIT = {"fp16": 2e-2, "bf16": 3e-2}  # relative RMS of logits against fp32, after dozens of layers in sixteen bits
WITHOUT_TOKENS = ("convnext", "resnet")


def make(name: str, device: torch.device, dry: bool) -> nn.Module:
    """The model in fp32, weights from seed 0."""
    torch.manual_seed(0)
    smaller = {"depth": 2, "embed_dim": 64, "num_heads": 2} if dry and "vit" in name else {}
    model = timm.create_model(name, **smaller).to(device).eval()
    return model.to(memory_format=torch.channels_last) if any(n in name for n in WITHOUT_TOKENS) else model


def transformed(model: nn.Module, images: Tensor, pattern: str, tome: int) -> nn.Module:
    config = mpcompile.Config(pattern=pattern, tome_r=tome, frozen=True, score="magnitude")
    return mpcompile.transform(model, images, config).eval()


def graphed(run: Callable[[Tensor], Any], images: Tensor) -> Callable[[Tensor], Any]:
    """``run`` in a CUDA graph over fixed inputs; unchanged on the CPU."""
    if images.device.type != "cuda":
        return run
    static, stream = images.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)

    def replay(x: Tensor) -> Any:
        static.copy_(x)
        graph.replay()
        return out

    return replay


def build(job: dict[str, Any], images: Tensor) -> tuple[Callable[[Tensor], Any], Tensor, Any]:
    """A build's call, its expected result in fp32, and the engines of its layers.

    Masks are always chosen on the 16-bit weights, so that all builds of one kind have the same masks.
    """
    device, dtype, name = images.device, gpu_common.DTYPES[job["dtype"]], job["candidate"]
    model = make(job["model"], device, job["dry"])
    pattern, tome = ("2:4" if "2:4" in name else "dense"), (job["tome"] if "tome" in name else 0)
    half = model.to(dtype)
    given = images.to(dtype)
    mode = None if job["dry"] else "max-autotune"
    if name in DENSE:
        exact = make(job["model"], device, job["dry"]).to(dtype).float()(images)
        if name == "fp32 eager":
            return half.float(), exact, None
        return (half if name == "eager" else torch.compile(half, mode=mode)), exact, None
    gm = transformed(half, given, pattern, job["tome"] if tome else 0)
    exact = gm.float()(images)
    gm = gm.to(dtype)
    if name == "tome":
        return torch.compile(gm, mode=mode), exact, None
    if name == "2:4 graph":
        lowered = mpcompile.lower(gm, given)
        return graphed(lowered, given), exact, engines(lowered)
    run = torch.compile(gm, backend=mpsparse, mode=mode, options={"frozen": True})
    run(given)
    return run, exact, [plan for graph in mpcompile.backend.compiled_graphs() for plan in engine_counts(graph.plan)]


def engine_counts(plan: Any) -> list[str]:
    """``"24 layers on gluon_wgmma_sp"`` and so on."""
    names = [layer.notes["lower"]["engine"] for layer in plan.layers.values() if "lower" in layer.notes]
    return [f"{names.count(name)} layers on {name}" for name in sorted(set(names))]


def engines(module: Any) -> list[str]:
    plan = getattr(module, "plan", None)
    return [] if plan is None else engine_counts(plan)


def smoke(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Check that Inductor and one of our kernels run in this environment."""
    found: dict[str, Any] = {"versions": gpu_common.versions(device)}
    dtype = gpu_common.DTYPES[job["dtype"]]
    layer = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(device, dtype).eval()
    x = torch.randn(64, 256, device=device, dtype=dtype)
    try:
        error = gpu_common.relative_rms(torch.compile(layer)(x), layer.float()(x.float()))
        found["inductor"] = "ok" if error < LIMIT[job["dtype"]] else f"WRONG: {error:.1e}"
    except Exception as failure:
        found["inductor"] = f"fails: {str(failure).strip().splitlines()[-1][:200]}"
    from bench import gpu_gemm

    found["kernels"] = {}
    for name in ("gluon_wgmma_sp", "gluon_mma_sp", "triton_expand"):
        try:
            run, expected = gpu_gemm.build(name, 300, 256, 512, dtype, device)
            error = gpu_common.relative_rms(run(), expected)
            found["kernels"][name] = "ok" if error < gpu_common.TOLERANCE[job["dtype"]] else f"WRONG: {error:.1e}"
        except Exception as failure:
            found["kernels"][name] = f"not here: {str(failure).strip().splitlines()[-1][:200]}"
    return found


@torch.no_grad()
def work(job: dict[str, Any], result: Path) -> int:
    """A worker: the smoke test, or one build of one model at some batch sizes."""
    device, start = torch.device(job["device"]), time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if job["candidate"] == "smoke":
        gpu_common.write_result(result, smoke(job, device))
        return 0
    found: dict[str, Any] = {"versions": gpu_common.versions(device), "rows": []}
    size = 224
    for batch in job["batches"]:
        if time.monotonic() - start > job["limit"]:
            found["stopped"] = f"time was up before batch {batch}"
            break
        row: dict[str, Any] = {"batch": batch}
        try:
            torch._dynamo.reset()
            generator = torch.Generator(device).manual_seed(1)
            images = torch.randn(batch, 3, size, size, generator=generator, device=device)
            began = time.monotonic()
            run, exact, taken = build(job, images)
            full = job["candidate"] == "fp32 eager"
            given = images if full else images.to(gpu_common.DTYPES[job["dtype"]])
            if any(name in job["model"] for name in WITHOUT_TOKENS):
                given = given.contiguous(memory_format=torch.channels_last)
            for _ in range(3):
                out = run(given)
            row |= {"build_s": round(time.monotonic() - began, 1), "engines": taken}
            row["relative_rms"] = gpu_common.relative_rms(out, exact)
            row["correct"] = row["relative_rms"] < LIMIT[job["dtype"]]
            row |= times(run, given)
        except Exception as failure:
            row["reason"] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1][:300]}"
        found["rows"].append(row)
        gpu_common.write_result(result, found)
    gpu_common.write_result(result, found)
    return 0


def times(run: Callable[[Tensor], Any], given: Tensor) -> dict[str, float]:
    """Milliseconds per call: median and quartiles of single calls, by events (max-autotune has its own CUDA graph)."""
    seconds = []
    end_by = time.monotonic() + 3
    while len(seconds) < 5 or (len(seconds) < 100 and time.monotonic() < end_by):
        if given.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run(given)
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run(given)
            seconds.append(time.perf_counter() - began)
    return {f"{key}_ms": value for key, value in common.quartiles(seconds, 1e3).items()}


def table(rows: list[dict[str, Any]], builds: list[str]) -> str:
    """One line per model and batch; ratios against the faster of eager and dense."""
    lines = []
    for (model, batch), group in itertools.groupby(rows, key=lambda row: (row["model"], row["batch"])):
        ms = {row["build"]: row for row in group}
        good = {name: row["median_ms"] for name, row in ms.items() if "median_ms" in row}
        bar = min((good[name] for name in ("eager", "dense") if name in good), default=None)
        cells = []
        for name in builds:
            if name not in good:
                cells.append("missing" if name not in ms else "failed")
                continue
            wrong = "" if ms[name]["correct"] else " WRONG"
            ratio = "" if bar is None or name in DENSE else f", {common.ratio_text(bar / good[name])}"
            true = (
                f" ({good['fp32 eager'] / good[name]:.2f}x fp32)" if name not in DENSE and "fp32 eager" in good else ""
            )
            cells.append(f"{good[name]:.2f} ms{ratio}{true}{wrong}")
        lines.append([model, batch, *cells])
    return common.table(lines, ["model", "batch", *builds], left=1)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS[:1]), metavar="NAME", help=f"({' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES[:3]), metavar="B", help="(128 8 1)")
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16", help="(%(default)s)")
    parser.add_argument("--tome-r", type=int, default=8, metavar="R", help="tokens merged per block (%(default)s)")
    parser.add_argument("--builds", nargs="+", choices=BUILDS, default=list(BUILDS[:-1]))
    gpu_common.arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    job = gpu_common.worker_arguments(argv)
    if job is not None:
        return work(*job)
    args = parse(argv)
    device, given = gpu_common.device_for(args.dry_run), gpu_common.environments(args.env)
    models = ["vit_tiny_patch16_224"] if args.dry_run else args.models
    batches = [1] if args.dry_run else args.batch
    base = {"device": str(device), "dtype": args.dtype, "dry": args.dry_run, "tome": args.tome_r}
    end = time.monotonic() + args.budget
    first = gpu_common.run_worker("bench.gpu.e2e", {**base, "candidate": "smoke"}, "sparse", given, 120)
    print(f"smoke test: Inductor {first.get('inductor')}, kernels {first.get('kernels')}", first.get("error", ""))
    if first.get("versions", {}).get("cubins"):
        print(f"sparse tensor-core kernels come from cubins: {first['versions']['cubins']}")
    builds = list(args.builds)
    if first.get("inductor") != "ok":
        builds = ["2:4 graph" if name == "2:4" else name for name in builds if name != "2:4 tome"]
        print("Inductor does not run in the sparse environment: the lowered model runs without it, under a CUDA graph")
    jobs = [
        (model, name)
        for model in models
        for name in builds
        if not ("tome" in name and any(w in model for w in WITHOUT_TOKENS))
    ]
    rows: list[dict[str, Any]] = []
    runs = []
    for number, (model, name) in enumerate(jobs):
        left = (end - time.monotonic()) / (len(jobs) - number)
        work_job = {**base, "candidate": name, "model": model, "batches": batches, "limit": 0.8 * left}
        kind = "dense" if name in (*DENSE, "tome") else "sparse"
        found = gpu_common.run_worker("bench.gpu.e2e", work_job, kind, given, max(90.0, 1.5 * left))
        runs.append({"model": model, "build": name, **found})
        rows += [{"model": model, "build": name, **row} for row in found.get("rows", [])]
        text = [
            f"batch {r['batch']}: " + (f"{r['median_ms']:.2f} ms" if "median_ms" in r else r["reason"])
            for r in found.get("rows", [])
        ]
        print(f"{model}, {name}: {'; '.join(text)} {found.get('error', '')}", flush=True)
    rows.sort(key=lambda row: (models.index(row["model"]), batches.index(row["batch"])))
    data = {"dtype": args.dtype, "tome_r": args.tome_r, "smoke": first, "rows": rows, "processes": runs}
    path = common.save("gpu_e2e", data, gpu_common.folder_for(args))
    print(table(rows, builds))
    print(f"figures: {path}")
    wrong = [row for row in rows if not row.get("correct", True)]
    if wrong:
        print(f"{len(wrong)} builds are WRONG: see relative_rms", file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
