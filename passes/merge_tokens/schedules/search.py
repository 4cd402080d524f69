"""Search for the schedule with the least divergence from the dense model, among schedules of equal cost.

Damage is not additive over blocks, and single images are noisy: a free search over the numbers of all blocks overfits.
So the search has few degrees of freedom. It looks for the best :class:`Curve` (two numbers) by successive halving and a
few steps around the best one, and then tries a few exchanges between neighbouring blocks, each accepted only if the
paired differences of all search images show a gain well above their noise. At last, the named schedules, the one
without data and what was found compete on images that the search has not seen; the best one there is chosen.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcompile.errors import ConfigError
from mpcompile.passes.merge_tokens.schedules.curves import NAMED, Curve
from mpcompile.passes.merge_tokens.schedules.solve import Budget, Schedule, solve

Loss = Callable[[Schedule, int], Tensor]  # a schedule and the number of a part of the images -> loss of each image

_RISES, _FALLS = (0, 0.5, 1, 2, 3), (0, 0.5, 1)
_ROUNDS = ((8, 6), (2, 3), (1, 1))  # successive halving: one of so many search images, and how many curves remain
_STEPS = (0.5, 0.25)  # of rise and fall around the best curve
_STEEP = (Curve(2, 1), Curve(1.5, 1), Curve(1, 1))  # for schedules without data; the first that is gentle enough
_GENTLE = 0.25  # share of its tokens that a block may merge in those
_EXCHANGES = 12
_MARGIN = 2.0  # standard errors by which an exchange has to win
_LOST = 1e30  # loss in place of NaN and infinity
PASSES = 15  # runs of a schedule per image at most, on average: 25 on images of the search, five on the others


@dataclass(frozen=True)
class Candidate:
    """A schedule, and its mean divergence from the dense model.

    Attributes:
        name: of the schedule or curve, and how many exchanges were made in it.
        r: for each stream, the tokens to merge in each block.
        search: divergence on the images of the search.
        check: divergence on the images of the check.
    """

    name: str
    r: Schedule
    search: float
    check: float


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        measure: what the divergence is.
        search_images, check_images: numbers of images.
        tried: number of schedules that were tried.
        chosen: name of the candidate that is best on the check images.
        candidates: the schedules that were compared on the check images.
    """

    measure: str
    search_images: int
    check_images: int
    tried: int
    chosen: str
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate that was chosen."""
        return next(candidate for candidate in self.candidates if candidate.name == self.chosen)

    def __str__(self) -> str:
        losses = ", ".join(f"{c.name} {c.check:.4g} ({c.search:.4g})" for c in self.candidates)
        return (
            f"{self.chosen} kept: {self.measure} on {self.check_images} check images "
            f"(on {self.search_images} search images): {losses}; {self.tried} schedules tried"
        )


class _Losses:
    """Losses of schedules on parts of the images, each computed once."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.known: dict[tuple[Schedule, int], Tensor] = {}

    def of(self, schedule: Schedule, parts: Sequence[int]) -> Tensor:
        """Return the loss of every image in the parts."""
        for part in parts:
            if (schedule, part) not in self.known:
                values = self.loss(schedule, part).double().cpu()
                self.known[schedule, part] = values.nan_to_num(_LOST, _LOST)
        return torch.cat([self.known[schedule, part] for part in parts])

    def mean(self, schedule: Schedule, parts: Sequence[int]) -> float:
        return float(self.of(schedule, parts).mean())

    @property
    def tried(self) -> int:
        return len({schedule for schedule, _ in self.known})


class _Curves:
    """The schedules of curves that meet the budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.solved: dict[Curve, Schedule | None] = {}

    def __getitem__(self, curve: Curve) -> Schedule | None:
        """Return the schedule of a curve, or None if no number of merges in its ratio meets the budget."""
        if curve not in self.solved:
            try:
                self.solved[curve] = solve(self.budget, curve)
            except ConfigError:
                self.solved[curve] = None
        return self.solved[curve]

    def distinct(self, some: Sequence[Curve]) -> dict[Schedule, Curve]:
        """Return the schedules of curves; of curves with the same schedule, only the first."""
        found: dict[Schedule, Curve] = {}
        for curve in some:
            schedule = self[curve]
            if schedule is not None:
                found.setdefault(schedule, curve)
        return found


def search(
    budget: Budget, loss: Loss, search_parts: Sequence[int], check_parts: Sequence[int], measure: str, seed: int = 0
) -> Search:
    """Return the schedule with the least loss among those that meet a budget, as found on one half of the images.

    Args:
        budget: the constant schedule must be able to meet it.
        loss: per image, of a schedule on a part of the images.
        search_parts: parts on which schedules are searched.
        check_parts: parts on which the best one is compared with the named schedules and that without data.
        measure: what the loss is, in words.
        seed: of the order in which exchanges are tried.

    Raises:
        ConfigError: the constant schedule cannot meet the budget; the message gives the largest reduction.
    """
    solve(budget, NAMED["constant"])  # raises if it can't meet the budget
    curves, losses = _Curves(budget), _Losses(loss)
    fixed = [*NAMED.values(), *_STEEP]
    grid = [*fixed, *(Curve(*numbers) for numbers in itertools.product(_RISES, _FALLS))]
    best = _halve(curves.distinct(grid), losses, search_parts)
    best = _step(best, curves, losses, search_parts)
    schedule, curve = best
    exchanged, count = _exchange(schedule, budget, losses, search_parts, seed)
    entries = {key: str(named) for key, named in curves.distinct(fixed).items()}
    entries.setdefault(schedule, str(curve))
    entries.setdefault(exchanged, f"{entries[schedule]} with {count} exchange{'s' if count != 1 else ''}")
    candidates = tuple(
        Candidate(name, r, losses.mean(r, search_parts), losses.mean(r, check_parts)) for r, name in entries.items()
    )
    chosen = min(candidates, key=lambda candidate: candidate.check)  # the first of equals: constant before others
    seen, unseen = (len(losses.of(chosen.r, parts)) for parts in (search_parts, check_parts))
    return Search(measure, seen, unseen, losses.tried, chosen.name, candidates)


def without_data(budget: Budget) -> tuple[Schedule, str]:
    """Return the schedule to use without data, and its name.

    Late blocks lose least by merging as long as no block merges a large share of its tokens: of three curves, it is the
    steepest under which none merges more than a quarter; if there is none, the flattest; and if that does not meet the
    budget, the constant schedule. Chosen on one model; see docs/token_merging.md.

    Raises:
        ConfigError: the constant schedule cannot meet the budget, either.
    """
    curves = _Curves(budget).distinct(_STEEP)
    for schedule, curve in curves.items():
        tokens = budget.tokens(schedule)
        if all(a - b <= _GENTLE * a for numbers in tokens for a, b in itertools.pairwise(numbers)):
            return schedule, str(curve)
    if (flattest := _Curves(budget)[_STEEP[-1]]) is not None:
        return flattest, str(_STEEP[-1])
    return solve(budget, NAMED["constant"]), "constant"


def _share(parts: Sequence[int], divisor: int) -> Sequence[int]:
    return parts[: math.ceil(len(parts) / divisor)]


def _halve(schedules: dict[Schedule, Curve], losses: _Losses, parts: Sequence[int]) -> tuple[Schedule, Curve]:
    """Return the best of many schedules: all on few images, fewer on more, the last ones on all."""
    left = list(schedules)
    for divisor, kept in _ROUNDS:
        some = _share(parts, divisor)
        left = sorted(left, key=lambda schedule: losses.mean(schedule, some))[:kept]
    return left[0], schedules[left[0]]


def _step(
    best: tuple[Schedule, Curve], curves: _Curves, losses: _Losses, parts: Sequence[int]
) -> tuple[Schedule, Curve]:
    """Take steps of falling size around the best curve, judged on half of the images, then on all."""
    schedule, curve = best
    half = _share(parts, 2)
    for step in _STEPS:
        around = curves.distinct(list(curve.around(step)))
        nearest = min(around, key=lambda other: losses.mean(other, half), default=schedule)
        if losses.mean(nearest, half) < losses.mean(schedule, half) and (
            losses.mean(nearest, parts) < losses.mean(schedule, parts)
        ):
            schedule, curve = nearest, around[nearest]
    return schedule, curve


def _exchange(
    schedule: Schedule, budget: Budget, losses: _Losses, parts: Sequence[int], seed: int
) -> tuple[Schedule, int]:
    """Try exchanges between neighbouring blocks, and return the schedule with those that were accepted."""
    weights = [weight for stream in budget.weights(Curve()) for weight in stream]
    blocks = [block for block, weight in enumerate(weights) if weight]
    pairs = [pair for a, b in itertools.pairwise(blocks) for pair in ((a, b), (b, a))]
    random.Random(seed).shuffle(pairs)
    merged = sum(map(sum, schedule))
    step = max(1, round(merged / max(1, len(blocks)) / 4))
    accepted = 0
    for source, target in pairs[:_EXCHANGES]:
        other = budget.exchange(schedule, source, target, step)
        if other is not None and other != schedule and _wins(other, schedule, losses, parts):
            schedule, accepted = other, accepted + 1
    return schedule, accepted


def _wins(other: Schedule, schedule: Schedule, losses: _Losses, parts: Sequence[int]) -> bool:
    """Return True if the paired differences of the images show a gain well above their noise; half of them first."""
    half = _share(parts, 2)
    if losses.mean(other, half) >= losses.mean(schedule, half):
        return False
    difference = losses.of(other, parts) - losses.of(schedule, parts)
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return float(difference.mean()) < -_MARGIN * error
