"""Curves: in what ratio the blocks of a stream merge tokens, before their numbers are solved for a target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

_UNIT = 1 << 12  # weight of the block that merges most


@dataclass(frozen=True)
class Curve:
    """Merges per block in the ratio exp(slope x + bend x²), x going from -1 in the first block to 1 in the last.

    Attributes:
        slope: positive to merge more in late blocks.
        bend: positive to merge more at both ends, negative to merge more in the middle.

    Example:
        >>> Curve().weights(3), Curve(slope=-0.7).weights(3), Curve(bend=-1.5).weights(3)
        ([4096, 4096, 4096], [4096, 2034, 1010], [914, 4096, 914])
    """

    slope: float = 0.0
    bend: float = 0.0

    def weights(self, blocks: int) -> list[int]:
        """Return the weight of each block, an integer of at least 1."""
        places = [2 * block / max(1, blocks - 1) - 1 for block in range(blocks)]
        powers = [self.slope * x + self.bend * x * x for x in places]
        return [max(1, round(_UNIT * math.exp(power - max(powers)))) for power in powers]

    def around(self, slope: float, bend: float) -> Iterator[Curve]:
        """Yield the four curves that differ by a step in one number."""
        for sign in (-1, 1):
            yield Curve(self.slope + sign * slope, self.bend)
            yield Curve(self.slope, self.bend + sign * bend)

    def __str__(self) -> str:
        return f"curve of slope {self.slope:g} and bend {self.bend:g}" if self.slope or self.bend else "constant"


class Linear:
    """Merges per block that fall linearly to 0 in the last one.

    Example:
        >>> Linear().weights(4)
        [3, 2, 1, 0]
    """

    def weights(self, blocks: int) -> list[int]:
        """Return the weight of each block."""
        return list(range(blocks - 1, -1, -1)) if blocks > 1 else [1]

    def __str__(self) -> str:
        return "linear"


Shape = Curve | Linear
NAMED: dict[str, Shape] = {"constant": Curve(), "linear": Linear()}


def spread(total: int, weights: Sequence[int]) -> list[int]:
    """Distribute ``total`` merges over blocks in the ratio of their weights.

    Example:
        >>> spread(16, [1, 1, 1, 1]), spread(16, [3, 2, 1, 0])
        ([4, 4, 4, 4], [8, 5, 3, 0])
    """
    whole = Fraction(total, max(1, sum(weights)))
    reached = [math.floor(whole * part) for part in itertools.accumulate(weights)]
    return [after - before for before, after in itertools.pairwise([0, *reached])]
