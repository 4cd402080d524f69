"""Budget: how many views and epochs fit into a number of minutes, from a few timed steps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpcompile.errors import ConfigError
from mpcompile.reconstruction.options import Reconstruction

# More views help more than more epochs: two epochs of as many views as fit, then a third.
_EPOCHS = 2
_MOST_VIEWS, _MOST_EPOCHS = 64, 4
_MOST_WITHOUT_VIEWS = 20  # epochs of inputs that have no views
_MARGIN = 0.9  # share of the time that is planned for
_PASSES = 5.5  # forward passes of a sample besides training: importance, both sides, errors


@dataclass(frozen=True)
class Cost:
    """Seconds that one sample takes: making its view, a forward pass, a training step over all regions."""

    view: float
    forward: float
    step: float

    def minutes(self, samples: float, epochs: int, final: float = 0.0) -> float:
        """Return the minutes of a run: samples with their views, epochs per region, samples of the final pass."""
        each = self.view + _PASSES * self.forward + epochs * self.step
        return (samples * each + final * (self.view + self.forward + self.step)) / 60


def timed(call: Callable[[], Any], samples: int) -> float:
    """Return the seconds per sample of a call, the lower of two after a first one."""
    call()
    best = math.inf
    for _ in range(2):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best / samples


def lengths(options: Reconstruction, images: int, cost: Cost, views: bool, spent: float = 0.0) -> tuple[int, int]:
    """Return the numbers of views and epochs that fit into the time budget.

    Args:
        options: the budget, and either number if it is given.
        images: images of this rank.
        cost: what one sample takes.
        views: False if there are no views of the inputs.
        spent: minutes that have passed.

    Raises:
        ConfigError: the budget does not suffice for one pass; the message says what would.

    Example:
        >>> lengths(Reconstruction(minutes=10), 500, Cost(0.002, 0.01, 0.03), views=True)
        (9, 2)
    """
    assert options.minutes is not None  # options that leave a length open have a budget
    final = float(images * options.final_epochs * options.final_views)
    available = options.minutes * _MARGIN - spent
    least = cost.minutes(images * (options.views or 1), options.epochs or 1, final)
    if least > available:
        raise ConfigError(
            "the time budget is too short for one pass over the images",
            expected=f"minutes={math.ceil(10 * (least + spent) / _MARGIN) / 10:g} or more on this machine",
            found=f"minutes={options.minutes:g}",
            hint="or give fewer images",
        )

    def most(limit: int, minutes: Callable[[int], float]) -> int:
        return max((n for n in range(1, limit + 1) if minutes(n) <= available), default=1)

    rounds = options.views if views else 1
    if rounds is None:
        least_epochs = options.epochs or (_EPOCHS if cost.minutes(images, _EPOCHS, final) <= available else 1)
        rounds = most(_MOST_VIEWS, lambda n: cost.minutes(images * n, least_epochs, final))
    epochs = options.epochs or most(
        _MOST_EPOCHS if views else _MOST_WITHOUT_VIEWS, lambda n: cost.minutes(images * rounds, n, final)
    )
    return rounds, epochs
