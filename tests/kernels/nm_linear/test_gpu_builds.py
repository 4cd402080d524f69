"""Every tile of the sparse tensor-core kernels, compiled for each of its architectures, without a GPU."""

import itertools

import pytest

from mpcompile.kernels.nm_linear.gpu.build import EPILOGUES
from mpcompile.kernels.nm_linear.gpu.tiles import SHARED_BYTES, TILES
from tests.support.gpu_builds import BUILDS, compiled, covering

SPILL = 16  # bytes per thread


@pytest.fixture(scope="session")
def records(gpu_folder):
    return compiled(gpu_folder)


def test_the_builds_cover_tiles_architectures_dtypes_and_epilogues():
    builds = covering()
    assert {(b.kernel, b.tile, b.arch) for b in builds} == {(t.kernel, t.name, a) for t in TILES for a in t.arch}
    for kernel in {tile.kernel for tile in TILES}:
        found = {(b.dtype, b.epilogue) for b in builds if b.kernel == kernel}
        missed = set(itertools.product(("fp16", "bf16"), EPILOGUES)) - found
        assert len(missed) <= (0 if kernel == "gluon_mma_sp" else 1), missed
    assert {a for b in builds for a in (b.arch,)} == set(SHARED_BYTES)
    assert len(set(BUILDS)) == len(BUILDS)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_a_build_is_sparse_and_fits(build, records):
    record, tile = records[build], build.cut
    assert "error" not in record, record["error"]
    warps = tile.n // tile.warps_n // 16 * (tile.m // tile.warps_m // 8) * (tile.k // 32)
    expected = warps if build.kernel != "gluon_wgmma_sp" else tile.n // (tile.warps // 4) // 64 * (tile.k // 32)
    assert record["sparse_instructions"] == expected
    assert record["spill_bytes"] <= SPILL
    assert record["smem_bytes"] <= SHARED_BYTES[build.arch]
    assert tile.stage_bytes * tile.stages <= record["smem_bytes"]
    assert record["registers"] * record["threads"] <= 65536
    fetches = record["instructions"]["UTMALDG" if build.kernel == "gluon_wgmma_sp" else "LDGSTS"]
    assert fetches > 0
