"""Shared by the GPU benchmarks: candidates in separate processes and environments, clocks, ceilings, checks.

``--env NAME=PATH`` runs candidates in another environment: PATH is a Python interpreter, or a folder to put in front of
``PYTHONPATH`` (as made by ``pip install --no-deps --target FOLDER 'triton>=3.9'``). NAME is a candidate, ``dense`` for
all dense ones, or ``sparse`` for all others. So the dense baseline keeps the Triton that its torch came with.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import common
from mpcompile.io.writing import write_atomically
from mpcompile.kernels import timing

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}  # relative RMS


def environments(texts: Sequence[str]) -> dict[str, Path]:
    """Parse ``NAME=PATH`` arguments.

    Raises:
        SystemExit: an argument does not have this form, or PATH does not exist.
    """
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not name or not equals or not Path(path).expanduser().exists():
            raise SystemExit(f"--env {text}: expected NAME=PATH, where PATH is an interpreter or a folder that exists")
        found[name] = Path(
            os.path.abspath(Path(path).expanduser())
        )  # not resolved: the name of a link identifies the environment
    return found


def command_for(name: str, kind: str, given: Mapping[str, Path]) -> tuple[list[str], dict[str, str], str]:
    """Interpreter, variables and a description of the environment of a candidate (``kind``: dense or sparse)."""
    path = given.get(name) or given.get(kind)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if path is None:
        return [sys.executable], variables, "this one"
    if path.is_dir():
        variables["PYTHONPATH"] = os.pathsep.join([str(path), variables["PYTHONPATH"]])
        return [sys.executable], variables, f"{path} in front"
    return [str(path)], variables, str(path)


def run_worker(module: str, job: dict[str, Any], kind: str, given: Mapping[str, Path], limit: float) -> dict[str, Any]:
    """Run ``python -m module --worker JOB`` in its environment; return its result, or ``{"error": ...}``."""
    start, variables, where = command_for(job["candidate"], kind, given)
    with tempfile.TemporaryDirectory() as folder:
        job_file, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps(job))
        command = [*start, "-m", module, "--worker", str(job_file), str(result)]
        began = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=max(limit, 1), check=False
            )
        except subprocess.TimeoutExpired:
            # A worker writes after every row; the rows written so far count.
            partial = json.loads(result.read_text()) if result.exists() else {}
            return {**partial, "error": f"stopped after {limit:.0f} s", "environment": where}
        spent = {"seconds": round(time.monotonic() - began, 1), "environment": where}
        if not result.exists():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return {"error": f"exit {done.returncode}: {last[:300]}", **spent}
        found: dict[str, Any] = {**json.loads(result.read_text()), **spent}
        if done.returncode and "error" not in found:
            found["error"] = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]
        return found


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write the result atomically: the parent may read at any time."""
    write_atomically(path, json.dumps(result))


def worker_arguments(argv: list[str] | None) -> tuple[dict[str, Any], Path] | None:
    """The job and the result file if this process is a worker, else None."""
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] != "--worker":
        return None
    return json.loads(Path(given[1]).read_text()), Path(given[2])


def versions(device: torch.device) -> dict[str, Any]:
    """The versions that the figures depend on."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        from mpcompile.kernels.nm_linear.gpu import cubin as gpu_cubin
        from mpcompile.kernels.nm_linear.gpu import cusparselt
        from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch

        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"processors": properties.multi_processor_count, "cuda": torch.version.cuda}
        found["cusparselt"] = cusparselt.version()
        found["cubins"] = os.environ.get(gpu_cubin.VARIABLE) if gpu_launch.from_cubins() else None
    return found


def clock(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """A function (call, count) -> seconds for that many calls; on CUDA in a graph, timed by events."""
    return timing.CudaClock(device) if device.type == "cuda" else timing.wall_clock


def median_us(
    run: Callable[[], Any], device: torch.device, rounds: int = 7, sample_s: float = 0.02
) -> dict[str, float]:
    """Median, q1 and q3 of the microseconds per call, over rounds of about ``sample_s`` seconds each."""
    tick = clock(device)
    once = max(tick(run, 1), 1e-7)
    once = max(min(once, tick(run, 1)), 1e-7)
    calls = max(1, min(200, int(sample_s / once)))
    return common.quartiles([tick(run, calls) / calls for _ in range(max(2, rounds))])


def ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> dict[str, float]:
    """The measured ceilings of this GPU: GB/s of a copy (read and write), TFLOP/s of a square product."""
    count, side = (1 << 20, 256) if tiny else (1 << 28, 8192)
    source = torch.empty(count // dtype.itemsize, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    copied = median_us(lambda: target.copy_(source), device)["median"]
    a, b = (torch.empty(side, side, dtype=dtype, device=device).normal_() for _ in range(2))
    out = torch.empty_like(a)
    product = median_us(lambda: torch.mm(a, b, out=out), device)["median"]
    return {"copy_gbs": 2e-3 * source.numel() * dtype.itemsize / copied, "matmul_tflops": 2e-6 * side**3 / product}


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return common.relative_rms(found, expected)


def combined(values: Sequence[float]) -> float:
    """Combine the results of repeated processes of one candidate."""
    return statistics.median(values)


def arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that all GPU benchmarks share."""
    parser.add_argument(
        "--env", nargs="+", default=[], metavar="NAME=PATH", help="environments of candidates (see above)"
    )
    parser.add_argument("--budget", type=float, default=480, metavar="S", help="seconds for everything (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the JSON file (bench/results)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny shapes on the CPU, to check that the benchmark runs; the figures are meaningless",
    )


def device_for(dry: bool) -> torch.device:
    """The GPU, or the CPU in a dry run.

    Raises:
        SystemExit: there is no GPU.
    """
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU here; --dry-run checks the benchmark itself on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


def folder_for(args: argparse.Namespace) -> Path:
    return args.out or (common.RESULTS / "quick" if args.dry_run else common.RESULTS)
