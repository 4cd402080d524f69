"""Curves: in what ratio the blocks of a stream merge tokens, before their numbers are solved for a target."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

_UNIT = 1 << 12  # weight of the block that merges most, for curves whose weights are no integers


@dataclass(frozen=True)
class Curve:
    """Merges per block in the ratio t^rise (1 - t)^fall, t going from 1 / blocks in the first block to 1 in the last.

    Attributes:
        rise: 0 or more; how steeply the numbers rise in early blocks.
        fall: 0 or more; how steeply they fall in late blocks. Above 0, none merge in the last one.

    Example:
        >>> Curve().weights(5), Curve(fall=1).weights(5), Curve(1, 1).weights(5)
        ([1, 1, 1, 1, 1], [4, 3, 2, 1, 0], [4, 6, 6, 4, 0])
    """

    rise: float = 0
    fall: float = 0

    def weights(self, blocks: int) -> list[int]:
        """Return the weight of each block."""
        if blocks == 1:
            return [1]
        values = [(block + 1) ** self.rise * (blocks - 1 - block) ** self.fall for block in range(blocks)]
        if all(isinstance(value, int) for value in values):
            return [int(value) for value in values]
        return [round(_UNIT * value / max(values)) for value in values]

    def around(self, step: float) -> Iterator[Curve]:
        """Yield the curves that differ by a step in one number."""
        for change in (-step, step):
            if self.rise + change >= 0:
                yield Curve(self.rise + change, self.fall)
            if self.fall + change >= 0:
                yield Curve(self.rise, self.fall + change)

    def __str__(self) -> str:
        factors = [f"{base}^{power:g}" for base, power in (("t", self.rise), ("(1 - t)", self.fall)) if power]
        return next((name for name, curve in NAMED.items() if curve == self), " ".join(factors))


NAMED = {"constant": Curve(), "linear": Curve(fall=1), "parabolic": Curve(1, 1)}
WITHOUT_DATA = Curve(1.5, 1)  # best without data on the model measured; see docs/token_merging.md


def spread(total: int, weights: Sequence[int]) -> list[int]:
    """Distribute ``total`` merges over blocks in the ratio of their weights.

    Example:
        >>> spread(16, [1, 1, 1, 1]), spread(16, [3, 2, 1, 0])
        ([4, 4, 4, 4], [8, 5, 3, 0])
    """
    whole = Fraction(total, max(1, sum(weights)))
    reached = [math.floor(whole * part) for part in itertools.accumulate(weights)]
    return [after - before for before, after in itertools.pairwise([0, *reached])]
