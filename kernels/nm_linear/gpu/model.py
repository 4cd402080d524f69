"""A latency model of products on a GPU, from the bytes they move and the clocks of their instructions.

Nothing here is measured. The model picks the tile of a product; ``bench/gpu/kernel_matrix.py --roofline`` prints its
predictions beside the bound of the dense product. Peak rates of chips are from NVIDIA's data sheets. Shared memory
moves 128 bytes per clock and multiprocessor.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from mpcompile.kernels.nm_linear.gpu.tiles import SHARED_BYTES, Tile, tiles_for
from mpcompile.kernels.nm_linear.sparse24 import padded

_SHARED_RATE = 128  # bytes per clock
_WAVE_START = 1200  # clocks from the start of a program to its first product, and from its last to the next program
_LAUNCH_US = 2.0


@dataclass(frozen=True)
class Chip:
    """One GPU.

    Attributes:
        macs: dense multiply-accumulates (fp16 with fp32 sums) per clock and multiprocessor.
        mma_macs: the same for ``mma.sync``, which on some chips is slower than the instruction made for the chip.
        ghz: boost clock.
        gbs: memory bandwidth, GB/s.
        l2_rate: bytes per clock and multiprocessor from the second-level cache.
    """

    name: str
    arch: int
    processors: int
    macs: int
    mma_macs: int
    ghz: float
    gbs: float
    l2_rate: int = 40

    @property
    def tflops(self) -> float:
        """Dense peak in TFLOP/s."""
        return 2e-3 * self.processors * self.macs * self.ghz


CHIPS = (
    Chip("A100", 80, 108, 1024, 1024, 1.41, 1555),
    Chip("A40", 86, 84, 512, 512, 1.74, 696),
    Chip("L40S", 89, 142, 512, 512, 2.52, 864),
    Chip("H100", 90, 132, 2048, 1280, 1.83, 3350),
    Chip("B200", 100, 148, 4096, 1024, 1.93, 8000),
)


@functools.lru_cache(maxsize=64)
def chip_for(arch: int, processors: int | None = None) -> Chip:
    """Return the model's chip for an architecture, with another number of multiprocessors if given."""
    known = next(chip for chip in CHIPS if chip.arch == arch)
    if processors is None or processors == known.processors:
        return known
    return Chip(known.name, arch, processors, known.macs, known.mma_macs, known.ghz, known.gbs, known.l2_rate)


def step_clocks(tile: Tile, chip: Chip) -> tuple[float, float, float]:
    """Return the clocks that one step of a program spends on products, shared memory and second-level cache.

    Example:
        >>> from mpcompile.kernels.nm_linear.gpu.tiles import TILES
        >>> [round(clocks) for clocks in step_clocks(TILES[0], CHIPS[0])]
        [1024, 1040, 870]
    """
    values, tokens = tile.n * tile.k, tile.m * tile.k * 2
    if tile.kernel == "gluon_mma_sp":
        reads, rate = values * tile.warps_m + tokens * tile.warps_n, 2 * chip.mma_macs
    else:  # a warpgroup reads its own values, and all tokens for each of its blocks of 64 rows
        reads, rate = values + tokens * (tile.n // 64), 2 * chip.macs
    products = tile.n * tile.m * tile.k / rate
    moved = reads + tile.stage_bytes if tile.kernel == "gluon_mma_sp" else reads  # TMA's writes overlap with reads
    return products, moved / _SHARED_RATE, tile.stage_bytes / chip.l2_rate


def residents(tile: Tile, chip: Chip) -> int:
    """Return the number of programs that a multiprocessor holds at once."""
    registers = 65536 // (tile.warps * 32 * (255 if tile.n * tile.m // (tile.warps * 32) > 64 else 128))
    return max(1, min(SHARED_BYTES[chip.arch] // (tile.stage_bytes * tile.stages), registers))


def predict_us(tile: Tile, m: int, n: int, k: int, chip: Chip, *, residual: bool = False) -> float:
    """Return the microseconds of a product (m, k) x (n, k)' by a tile."""
    rows, columns = padded((n, k))
    programs = -(-n // tile.n) * -(-m // tile.m)
    products, shared, cache = step_clocks(tile, chip)
    together = min(residents(tile, chip), -(-programs // chip.processors))
    # Programs that share a multiprocessor share its units, and hide one another's waits.
    clocks = -(-columns // tile.k) * max(products, shared, cache) * together + _WAVE_START
    waves = math.ceil(programs / (chip.processors * together))
    moved = rows * columns * 9 / 8 + 2 * m * (k + n * (2 if residual else 1))
    return max(waves * clocks / chip.ghz * 1e-3, moved / chip.gbs * 1e-3) + _LAUNCH_US


def dense_us(m: int, n: int, k: int, chip: Chip, *, residual: bool = False) -> float:
    """Return the lower bound of the dense product in microseconds: at the chip's peak, or at its memory bandwidth."""
    moved = 2 * (n * k + m * (k + n * (2 if residual else 1)))
    return max(m * n * k / (chip.processors * chip.macs * chip.ghz * 1e3), moved / chip.gbs * 1e-3) + _LAUNCH_US


@functools.lru_cache(maxsize=4096)
def choose_tile(kernel: str, m: int, n: int, k: int, arch: int, processors: int | None = None) -> Tile | None:
    """Return the tile of a kernel with the lowest predicted latency; None if no tile fits the architecture.

    Example:
        >>> choose_tile("gluon_mma_sp", 16, 768, 768, 80).m, choose_tile("gluon_mma_sp", 12608, 3072, 768, 80).m
        (16, 128)
    """
    chip = chip_for(arch, processors)
    fitting = [tile for tile in tiles_for(kernel, arch) if padded((n, k))[0] % tile.n == 0]
    return min(fitting, key=lambda tile: predict_us(tile, m, n, k, chip), default=None)
