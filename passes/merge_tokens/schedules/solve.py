"""Numbers of merges: given by the user, or the fewest that save a share of the multiply-accumulates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mpcompile.config import Config
from mpcompile.errors import ConfigError
from mpcompile.passes.merge_tokens.schedules.curves import NAMED, Curve, spread
from mpcompile.passes.merge_tokens.schedules.stream import Stream

Schedule = tuple[tuple[int, ...], ...]  # for each stream, the tokens to merge in each block


@dataclass(frozen=True)
class Budget:
    """Multiply-accumulates as a function of the tokens of each stream, and the share of them to save.

    Attributes:
        reduction: share of ``dense`` to save, between 0 and 1.
        dense: multiply-accumulates of the model before any token is spared.
        cost: for each stream, the tokens before the first block and after each one -> multiply-accumulates.
        streams: the streams, unmerged.
        idle: for each stream, the numbers of blocks in which a merge would spare nothing.
    """

    reduction: float
    dense: float
    cost: Callable[[Sequence[Sequence[int]]], float]
    streams: Sequence[Stream]
    idle: Sequence[frozenset[int]] = ()

    def tokens(self, schedule: Sequence[Sequence[int]]) -> list[list[int]]:
        """Return the number of tokens of each stream before the first block and after each one."""
        return [stream.merging(r).tokens for stream, r in zip(self.streams, schedule, strict=True)]

    def saved(self, schedule: Sequence[Sequence[int]]) -> float:
        """Return the share of multiply-accumulates that a schedule saves."""
        return 1 - self.cost(self.tokens(schedule)) / self.dense

    def meets(self, schedule: Sequence[Sequence[int]]) -> bool:
        """Return True if a schedule saves at least :attr:`reduction`."""
        return self.saved(schedule) >= self.reduction

    def weights(self, curve: Curve) -> list[list[int]]:
        """Return the weight of each block of each stream under a curve: 0 in idle blocks."""
        idle = self.idle or [frozenset[int]()] * len(self.streams)
        counts = [len(stream.sites) for stream in self.streams]
        return [
            [0 if block in skipped else weight for block, weight in enumerate(curve.weights(count))]
            for count, skipped in zip(counts, idle, strict=True)
        ]

    def exchange(self, schedule: Schedule, source: int, target: int, count: int) -> Schedule | None:
        """Merge up to ``count`` tokens less in one block, and as many more in another as meets the budget again.

        Args:
            source: number of the block that merges less, over all streams.
            target: number of the block that merges more.

        Returns:
            The schedule; None if the block has nothing to give, or the other cannot merge that many.
        """
        flat = [r for stream in schedule for r in stream]
        if flat[source] == 0:
            return None
        flat[source] -= min(count, flat[source])
        first = flat[target]
        low, high = first, first + max(stream.tokens[0] for stream in self.streams)

        def with_target(r: int) -> list[list[int]]:
            numbers = iter([*flat[:target], r, *flat[target + 1 :]])
            return [list(itertools.islice(numbers, len(stream))) for stream in schedule]

        if not self.meets(with_target(high)):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.meets(with_target(middle)) else (middle + 1, high)
        return self.merged(with_target(low))

    def merged(self, schedule: Sequence[Sequence[int]]) -> Schedule:
        """Return a schedule with the numbers that merge in fact, without what exceeds half of a block's tokens."""
        return tuple(tuple(a - b for a, b in itertools.pairwise(numbers)) for numbers in self.tokens(schedule))


def solve(budget: Budget, curve: Curve) -> Schedule:
    """Return the schedule of a curve with the fewest merges that meets the budget.

    Several streams merge in proportion to their tokens.

    Raises:
        ConfigError: even merging half of all tokens in every block that has a weight saves less.
    """
    weights = budget.weights(curve)
    # With this many, every block that has a weight merges half of its tokens.
    most = [
        stream.tokens[0] * -(-sum(each) // min((w for w in each if w), default=1))
        for stream, each in zip(budget.streams, weights, strict=True)
    ]
    widest = max(most)

    def chosen(total: int) -> list[list[int]]:
        return [spread(total * own // widest if widest else 0, each) for own, each in zip(most, weights, strict=True)]

    if not budget.meets(chosen(widest)):
        raise _unreachable(budget, budget.saved(chosen(widest)))
    low, high = 0, widest
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if budget.meets(chosen(middle)) else (middle + 1, high)
    return budget.merged(chosen(low))


def _unreachable(budget: Budget, most: float) -> ConfigError:
    return ConfigError(
        f"merging tokens cannot save {budget.reduction:.1%} of the multiply-accumulates of this model",
        expected=f"tome_reduction of at most {max(0, math.floor(most * 1000)) / 1000}",
        found=budget.reduction,
    )


def merges(config: Config, blocks: Sequence[int]) -> Schedule:
    """Return the tokens to merge in each block of each stream, from a number or a list in the config.

    Args:
        config: its ``tome_r`` is not ``"auto"``.
        blocks: number of blocks of each stream.

    Raises:
        ConfigError: the list has another length than the model has blocks.
    """
    r: Any = config.tome_r
    if isinstance(r, int):
        curve = NAMED.get(config.tome_schedule, Curve())
        return tuple(tuple(spread(r * count, curve.weights(count))) for count in blocks)
    if len(r) != sum(blocks):
        raise ConfigError(
            "tome_r has the wrong length",
            expected=f"{sum(blocks)} numbers, one for each attention block",
            found=f"{len(r)}",
            hint="give one number for all blocks, or one for each",
        )
    numbers = iter(r)
    return tuple(tuple(itertools.islice(numbers, count)) for count in blocks)
