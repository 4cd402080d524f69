"""Kernels compiled for GPUs that aren't there, by a Triton that may be newer than the one torch brought."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpcompile.kernels.nm_linear.gpu_build import EPILOGUES, Build
from mpcompile.kernels.nm_linear.gpu_launch import old_triton
from mpcompile.kernels.nm_linear.gpu_tiles import TILES

ROOT = Path(__file__).resolve().parents[1]


def covering() -> list[Build]:
    """Every tile on every architecture that it is for, dtypes and epilogues in turn; wgmma.sp's tiles three times."""
    pairs = [(tile, arch) for tile in TILES for arch in tile.arch for _ in range(1 if len(tile.arch) > 1 else 3)]
    combinations = [(dtype, epilogue) for epilogue in EPILOGUES for dtype in ("fp16", "bf16")]
    builds = []
    for number, (tile, arch) in enumerate(pairs):
        dtype, epilogue = combinations[number * 7 % len(combinations)]  # 7 and 16 share no factor: all come up
        builds.append(Build(tile.kernel, tile.name, dtype, epilogue, arch))
    return builds


EXTRA = [  # for the emulator: features that aren't a multiple of 16, and everything an epilogue has at once
    Build("gluon_mma_sp", "64x32x128s4", "fp16", "scale_res", 80, aligned=False),
    Build("gluon_mma_sp", "128x64x64s4", "bf16", "gelu", 80),
    Build("gluon_wgmma_sp", "128x64x128s5", "fp16", "scale_res", 90, aligned=False),
]
BUILDS = [*covering(), *EXTRA]


def environment() -> dict[str, str]:
    """What a process needs to import a Triton that compiles the kernels; fails the test where there is none."""
    if old_triton() is None:
        return dict(os.environ)
    folder = Path(os.environ.get("MPCOMPILE_TRITON") or ROOT / ".triton").resolve()
    if not (folder / "triton" / "__init__.py").is_file():
        pytest.fail(
            f"{old_triton()}, and there is no newer one in {folder}: run `make test`, or "
            f"`pip install --no-deps --target {folder} 'triton>=3.9'`, or name its folder in MPCOMPILE_TRITON",
            pytrace=False,
        )
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])}


@functools.cache
def compiled(folder: Path) -> dict[Build, dict[str, Any]]:
    """Every build of :data:`BUILDS` with its record (gpu_build.record_of) and its PTX, compiled by two processes."""
    env, jobs = environment(), []
    for number in range(2):
        out, file = folder / str(number), folder / f"{number}.json"
        part = BUILDS[number::2]
        file.write_text(json.dumps([build.__dict__ for build in part]))
        command = [sys.executable, "-m", "mpcompile.kernels.nm_linear.gpu_build", str(file), str(out)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        jobs.append((part, out, process))
    found: dict[Build, dict[str, Any]] = {}
    for part, out, process in jobs:
        output = process.communicate(timeout=400)[0]
        if process.returncode:
            pytest.fail(f"compiling failed:\n{output[-3000:]}", pytrace=False)
        for build, record in zip(part, json.loads((out / "records.json").read_text()), strict=True):
            path = out / f"{build.name}.ptx"
            found[build] = record | ({"ptx": path.read_text()} if path.exists() else {})
    return found
