"""Schedules of merging: constant, linearly decreasing, listed block by block, or solved for a MAC budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from mpcompile.config import Config
from mpcompile.errors import ConfigError
from mpcompile.kernels.token_merge.reference import merged_count


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


def counts(tokens: int, prefix: int, merges: Sequence[int]) -> list[int]:
    """Return the number of tokens before the first block and after each one.

    Example:
        >>> counts(197, 1, [8, 8, 150])
        [197, 189, 181, 91]
    """
    return list(itertools.accumulate(merges, lambda count, r: merged_count(count, r, prefix), initial=tokens))


def solve(
    reduction: float, tokens: int, prefix: int, blocks: int, schedule: str, cost: Callable[[Sequence[int]], float]
) -> list[int]:
    """Return the schedule with the fewest merges that saves ``reduction`` of the cost.

    Args:
        reduction: share of the cost of the unmerged model, between 0 and 1.
        cost: numbers of tokens before the first block and after each one -> cost.

    Raises:
        ConfigError: even merging half of all tokens in every block saves less.
    """
    dense = cost([tokens] * (blocks + 1))

    def saved(total: int) -> float:
        return 1 - cost(counts(tokens, prefix, spread(total, blocks, schedule))) / dense

    low, high = 0, tokens * blocks * (2 if schedule == "linear" else 1)
    if saved(high) < reduction:
        raise ConfigError(
            f"merging tokens cannot save {reduction:.1%} of the multiply-accumulates of this model",
            expected=f"tome_reduction of at most {math.floor(saved(high) * 1000) / 1000}",
            found=reduction,
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saved(middle) >= reduction else (middle + 1, high)
    return spread(low, blocks, schedule)


def merges(config: Config, blocks: int) -> list[int] | None:
    """Return the number of tokens to merge in each block, from the config; None for ``tome_r="auto"``.

    Raises:
        ConfigError: the list has another length than the model has blocks.
    """
    r = config.tome_r
    if isinstance(r, str):
        return None
    if isinstance(r, int):
        return spread(r * blocks, blocks, config.tome_schedule)
    if len(r) != blocks:
        raise ConfigError(
            "tome_r has the wrong length",
            expected=f"{blocks} numbers, one for each attention block",
            found=f"{len(r)}",
            hint="give one number for all blocks, or one for each",
        )
    return list(r)
