"""Tiles of the sparse tensor-core kernels.

The tests and ``bench/gpu/kernel_matrix.py`` compile every tile for every architecture it names, and check spilled
registers and shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """The part of a product that one program computes, and how.

    Attributes:
        n, m, k: output features, tokens, and columns per step.
        warps_n, warps_m: warps along features and along tokens. For ``wgmma.sp``: warps of all warpgroups, and 1.
        stages: steps held in shared memory.
        arch: compute capabilities (80 for 8.0) that the tile is for.
    """

    kernel: str
    n: int
    m: int
    k: int
    warps_n: int
    warps_m: int
    stages: int
    arch: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.n}x{self.m}x{self.k}s{self.stages}"

    @property
    def warps(self) -> int:
        """Warps that multiply; ``wgmma.sp`` has one more, which fetches."""
        return self.warps_n * self.warps_m

    @property
    def stage_bytes(self) -> int:
        """Bytes of shared memory per step: values, activations and, for ``mma.sp``, metadata."""
        words = self.n * self.k // 8 if self.kernel == "gluon_mma_sp" else 0
        return self.n * self.k + self.m * self.k * 2 + words


# The name of a kernel, in tiles, records and cubins -> the module that holds it.
MODULES = {
    name: f"mpcompile.kernels.nm_linear.gluon.{name.removeprefix('gluon_')}"
    for name in ("gluon_mma_sp", "gluon_mma_conv", "gluon_wgmma_sp")
}
CONV_CHANNELS = 64  # input channels of a convolution per step
_ALL, _BIG, _SMALL = (80, 86, 89, 90, 100), (80, 90, 100), (86, 89)
# Shared memory per block: 99 KiB on compute capability 8.6 and 8.9, 163 on 8.0, 227 on 9.0 and 10.0.
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
TILES: tuple[Tile, ...] = (
    Tile("gluon_mma_sp", 256, 128, 64, 4, 2, 4, _BIG),
    Tile("gluon_mma_sp", 256, 128, 64, 4, 2, 2, _SMALL),
    Tile("gluon_mma_sp", 128, 128, 64, 2, 4, 3, _ALL),
    Tile("gluon_mma_sp", 128, 64, 64, 2, 2, 4, _ALL),
    Tile("gluon_mma_sp", 64, 64, 128, 2, 2, 3, _ALL),
    Tile("gluon_mma_sp", 64, 32, 128, 2, 2, 4, _ALL),
    Tile("gluon_mma_sp", 64, 16, 128, 2, 2, 5, _ALL),
    Tile("gluon_wgmma_sp", 128, 256, 128, 8, 1, 2, (90,)),
    Tile("gluon_wgmma_sp", 256, 128, 128, 8, 1, 3, (90,)),
    Tile("gluon_wgmma_sp", 128, 128, 128, 8, 1, 4, (90,)),
    Tile("gluon_wgmma_sp", 128, 64, 128, 8, 1, 5, (90,)),
    Tile("gluon_wgmma_sp", 128, 32, 128, 8, 1, 6, (90,)),
)


def family(capability: tuple[int, int]) -> int | None:
    """Return the architecture of :data:`SHARED_BYTES` that a GPU belongs to, or None below compute capability 8.0.

    Example:
        >>> [family(c) for c in ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0))]
        [None, 80, 86, 80, 89, 90, 100, 86]
    """
    major, minor = capability
    if major < 8:
        return None
    if major == 8:
        return {6: 86, 9: 89}.get(minor, 80)
    if major == 9:
        return 90
    return 100 if major in (10, 11) else 86  # 12.x: consumer parts, with 99 KiB again


def tiles_of(kernel: str) -> tuple[Tile, ...]:
    """Return the tiles of a kernel. Convolutions use those of ``gluon_mma_sp`` with steps of 64 input channels."""
    if kernel == "gluon_mma_conv":
        return tuple(tile for tile in TILES if tile.kernel == "gluon_mma_sp" and tile.k == CONV_CHANNELS)
    return tuple(tile for tile in TILES if tile.kernel == kernel)


def tiles_for(kernel: str, arch: int) -> tuple[Tile, ...]:
    """Return the tiles of a kernel on an architecture."""
    return tuple(tile for tile in tiles_of(kernel) if arch in tile.arch)
