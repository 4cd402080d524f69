"""Schedules of merging: constant, linearly decreasing, listed block by block, or solved for a MAC budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from mpcompile.config import Config
from mpcompile.errors import ConfigError
from mpcompile.passes.merge_tokens.schedules.stream import Stream


def spread(total: int, blocks: int, schedule: str) -> list[int]:
    """Distribute ``total`` merges over ``blocks``: evenly, or decreasing linearly to 0 in the last one.

    Example:
        >>> spread(16, 4, "constant"), spread(16, 4, "linear")
        ([4, 4, 4, 4], [8, 5, 3, 0])
    """
    weights = (
        [Fraction(1)] * blocks
        if schedule == "constant" or blocks == 1
        else [Fraction(blocks - 1 - block) for block in range(blocks)]
    )
    reached = [math.floor(total * part / sum(weights)) for part in itertools.accumulate(weights)]
    return [after - before for before, after in itertools.pairwise([0, *reached])]


def solve(
    reduction: float, streams: Sequence[Stream], schedule: str, cost: Callable[[Sequence[Sequence[int]]], float]
) -> list[list[int]]:
    """Return the schedules with the fewest merges that save ``reduction`` of the cost.

    Several streams merge in proportion to their tokens.

    Args:
        reduction: share of the cost of the unmerged model, between 0 and 1.
        streams: the streams, unmerged.
        cost: for each stream, the tokens before the first block and after each one -> cost of all.

    Returns:
        For each stream, the tokens to merge in each block.

    Raises:
        ConfigError: even merging half of all tokens in every block saves less.
    """
    everything = [stream.tokens[0] * len(stream.sites) * (2 if schedule == "linear" else 1) for stream in streams]
    high = widest = max(everything)

    def chosen(total: int) -> list[list[int]]:
        shares = (total * most // widest for most in everything)
        return [spread(share, len(stream.sites), schedule) for share, stream in zip(shares, streams, strict=True)]

    dense = cost([[stream.tokens[0]] * (len(stream.sites) + 1) for stream in streams])

    def saved(total: int) -> float:
        return 1 - cost([s.merging(r).tokens for s, r in zip(streams, chosen(total), strict=True)]) / dense

    if saved(high) < reduction:
        raise ConfigError(
            f"merging tokens cannot save {reduction:.1%} of the multiply-accumulates of this model",
            expected=f"tome_reduction of at most {math.floor(saved(high) * 1000) / 1000}",
            found=reduction,
        )
    low = 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saved(middle) >= reduction else (middle + 1, high)
    return chosen(low)


def merges(config: Config, blocks: Sequence[int]) -> list[list[int]]:
    """Return the tokens to merge in each block of each stream, from a number or a list in the config.

    Args:
        config: its ``tome_r`` is not ``"auto"``.
        blocks: number of blocks of each stream.

    Raises:
        ConfigError: the list has another length than the model has blocks.
    """
    r: Any = config.tome_r
    if isinstance(r, int):
        return [spread(r * count, count, config.tome_schedule) for count in blocks]
    if len(r) != sum(blocks):
        raise ConfigError(
            "tome_r has the wrong length",
            expected=f"{sum(blocks)} numbers, one for each attention block",
            found=f"{len(r)}",
            hint="give one number for all blocks, or one for each",
        )
    given = iter(r)
    return [list(itertools.islice(given, count)) for count in blocks]
