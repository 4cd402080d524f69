"""The choice of a schedule: what the user gave, a shape solved for a target, or the result of a search."""

from __future__ import annotations

from collections.abc import Callable

from mpcompile.config import Config
from mpcompile.ir.module import Imported, IRModule
from mpcompile.passes.context import Calibration
from mpcompile.passes.merge_tokens.schedules.curves import NAMED
from mpcompile.passes.merge_tokens.schedules.search import Search, search, without_data
from mpcompile.passes.merge_tokens.schedules.solve import Budget, Schedule, solve
from mpcompile.passes.merge_tokens.schedules.trials import LEAST, Trials, divide


def choose(
    config: Config,
    budget: Budget,
    model: Imported,
    calibration: Calibration | None,
    insert: Callable[[Schedule], IRModule],
    seed: int,
) -> tuple[Schedule, str, Search | None]:
    """Return the schedule that meets a budget, how it was chosen, and the search for it.

    Args:
        config: its ``tome_r`` is ``"auto"``.
        budget: the budget.
        model: the graph, without merges.
        calibration: calibration data, or None.
        insert: a schedule -> a copy of the graph with its merges.
        seed: seeds the division of the images, and the search.

    Raises:
        ConfigError: the target cannot be met; the message gives the largest that can.
    """
    if config.tome_schedule in NAMED:
        return solve(budget, NAMED[config.tome_schedule]), f"{config.tome_schedule} schedule, as requested", None
    fallback, name = without_data(budget)
    if budget.meets([[0] * len(stream.sites) for stream in budget.streams]):
        return fallback, "nothing has to merge for this target", None
    if calibration is None:
        return fallback, f"{name} schedule: there is no calibration data to search on", None
    memory = calibration.memory // 2
    parts, first, second = divide(model, calibration.batches(model), memory, seed)
    if not parts:
        why = f"a search needs {LEAST} images, in more than one batch and within half of the memory allowed"
        return fallback, f"{name} schedule: {why}", None
    trials = Trials(model, insert, parts, memory)
    with trials.bar:
        result = search(budget, trials, first, second, trials.measure, seed)
    return result.best.r, str(result), result
