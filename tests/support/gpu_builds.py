"""Kernels compiled without a GPU, by a Triton that may be newer than the one torch installed."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mpcompile.errors import InputError
from mpcompile.kernels.nm_linear.gpu.build import EPILOGUES, Build, compile_all
from mpcompile.kernels.nm_linear.gpu.tiles import TILES, tiles_of

ROOT = Path(__file__).resolve().parents[2]


def covering() -> list[Build]:
    """Return each tile per architecture, cycling through dtypes and epilogues; wgmma.sp tiles three times."""
    pairs = [(tile, arch) for tile in TILES for arch in tile.arch for _ in range(1 if len(tile.arch) > 1 else 3)]
    combinations = [(dtype, epilogue) for epilogue in EPILOGUES for dtype in ("fp16", "bf16")]
    builds = []
    for number, (tile, arch) in enumerate(pairs):
        dtype, epilogue = combinations[number * 7 % len(combinations)]  # 7 and 16 are coprime: all occur
        builds.append(Build(tile.kernel, tile.name, dtype, epilogue, arch))
    return builds


EXTRA = [  # for the emulator: features that are not a multiple of 16, and all parts of an epilogue at once
    Build("gluon_mma_sp", "64x32x128s4", "fp16", "scale_res", 80, aligned=False),
    Build("gluon_mma_sp", "128x64x64s4", "bf16", "gelu", 80),
    Build("gluon_wgmma_sp", "128x64x128s5", "fp16", "scale_res", 90, aligned=False),
]
CONVOLUTIONS = [
    Build("gluon_mma_conv", tile.name, dtype, epilogue, tile.arch[0])
    for tile, (dtype, epilogue) in zip(
        tiles_of("gluon_mma_conv"), (("fp16", "res"), ("bf16", "relu"), ("fp16", "none"), ("bf16", "silu")), strict=True
    )
]
BUILDS = [*covering(), *EXTRA, *CONVOLUTIONS]


@functools.cache
def compiled(folder: Path) -> dict[Build, dict[str, Any]]:
    """Compile :data:`BUILDS`; return their records (build.record_of), with the PTX itself in place of its path.

    Processes that share the suite share the folder: the first one compiles, and the others wait for it.
    """
    made = folder / "compiled.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            made.write_text(json.dumps([(dataclasses.asdict(b), record) for b, record in _compile(folder)]))
    found = {Build(**fields): record for fields, record in json.loads(made.read_text())}
    return {b: r | ({"ptx": Path(r["ptx"]).read_text()} if "ptx" in r else {}) for b, r in found.items()}


def _compile(folder: Path) -> list[tuple[Build, dict[str, Any]]]:
    triton = None if os.environ.get("MPCOMPILE_TRITON") else ROOT / ".triton"
    try:
        return list(compile_all(BUILDS, folder, triton))
    except InputError as error:  # not a skip: without a compiler, nothing here would be tested
        pytest.fail(f"{error}; `make test` installs it", pytrace=False)
