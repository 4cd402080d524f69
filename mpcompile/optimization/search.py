"""The search: climb from the safest choice to the fastest that keeps the accuracy, then build and time it everywhere.

For each set of levers, choices are tried in the order of their predicted damage, and the first that fails ends the
sequence (fixed-sequence testing). A reconstruction behind a failure and builds in bf16 are further tests on the same
images, for which the confidence is not corrected. Masks are judged on images that no fit saw; merging alone is fitted
to nothing, and is judged on all images that have labels. What was accepted is built in every runtime and precision,
and all builds are timed in one interleaved run.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

from torch import nn
from tqdm import tqdm

from mpcompile.config import Config
from mpcompile.data import ranks
from mpcompile.errors import MPCompileError
from mpcompile.ir.module import IRModule
from mpcompile.optimization.accuracy.images import Images
from mpcompile.optimization.accuracy.outcome import Outcome
from mpcompile.optimization.builds import SECONDS, Workshop
from mpcompile.optimization.contest import Contest
from mpcompile.optimization.frontier import Entry, Frontier
from mpcompile.optimization.goal import TORCH, Goal
from mpcompile.optimization.numbers.model import Choice, Model
from mpcompile.optimization.numbers.space import LATENCY, Space
from mpcompile.optimization.numbers.timetable import Times
from mpcompile.optimization.recipe import Recipe
from mpcompile.optimization.runner import Runner
from mpcompile.optimization.state import State
from mpcompile.passes.reconstruct.api import reconstruct
from mpcompile.pipeline import transform

log = logging.getLogger(__name__)

# Expected drop over max_drop, step by step. Expected drops count every changed class at the dense model's confidence;
# net drops are smaller, so the steps go beyond 1.
LADDER = (0.12, 0.25, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.2, 3.0, 4.0, 6.0)
WORTH = 0.97  # a choice must be predicted to cost less than this share of merging alone
BEYOND = 1.5  # masks are not tried beyond this multiple of the damage at which merging alone failed
NEAR = 2.5  # a choice that drops by more than this multiple of max_drop is not reconstructed
RESERVE = 0.35  # share of the time that building and timing may need behind the climb


class Clock:
    """The time budget of a search, the same on all ranks."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def left(self) -> float:
        """Return the seconds left for the climb."""
        return float(ranks.broadcast((1 - RESERVE) * self.seconds - self.used))


class Search:
    """One search.

    Args:
        model: the dense model.
        batch: the batch that latency counts for.
        fit, held: images for fits, and images that judge.
        goal: what to reach.
        config: the options that recipes leave alone.
        state: what is known from an earlier run.
        workshop: makes the builds.
        improved: called with the entry, its graph and its runner whenever a faster build that keeps the accuracy is
            known; on the first rank only.
        progress: show progress bars (on a terminal).
        times: times of layers on another machine, in place of this one's.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        fit: Images,
        held: Images,
        goal: Goal,
        config: Config,
        state: State,
        workshop: Workshop,
        improved: Callable[[Entry, IRModule, Runner], None],
        progress: bool,
        times: Times | None = None,
    ) -> None:
        self.model, self.batch, self.fit, self.held, self.goal, self.config = model, batch, fit, held, goal, config
        labels_alike = (fit.labels is None) == (held.labels is None)
        self.everything = fit + held if labels_alike else held
        self.state, self.improved, self.progress = state, improved, progress
        self.clock = Clock(goal.minutes)
        self.space = Space(model, batch, config, fit, goal.objective, goal.seed, progress, times)
        self.graphs: dict[Recipe, IRModule] = {}
        self.contest = Contest(model, goal, workshop, self._graph, self._judges)
        self.best: Entry | None = None
        self.failed = math.inf  # the smallest damage that failed
        self.known: list[tuple[float, float, float]] = []  # damage of merging, sum over patterns, measured divergence

    @property
    def frontier(self) -> Frontier:
        """All entries so far."""
        return self.contest.frontier

    def run(self) -> tuple[IRModule, Runner | None]:
        """Return the chosen graph and its runner; no runner on other ranks than the first.

        Raises:
            InputError: no build could be made, or a target cannot be reached; the message says what can.
        """
        self._tell("building the dense model")
        self.contest.add_dense()
        self._keep_best()
        numbers = self._numbers()
        if self.goal.objective == LATENCY:
            self.contest.exact().predicted_ms = numbers.levels[0].cost / 1e3
        for masks, tokens in self._sets(numbers):
            self._build(self._sequence(numbers, masks, tokens))
            self._keep_best()
        for precision in self.contest.precisions(TORCH)[1:]:
            self.contest.make_judged(self.contest.entry(Recipe(), TORCH, precision, None))
        self.contest.time(SECONDS, self.progress)
        chosen = self.contest.choose()
        return self._graph(chosen.recipe), None if ranks.rank() else self.contest.runner(chosen)

    def _keep_best(self) -> None:
        """Time what there is, and hand over the best build so far."""
        self.contest.time(SECONDS / 4, self.progress)
        best = self.contest.best()
        if not ranks.rank() and best is not None and (self.best is None or best.key != self.best.key):
            self.best = best
            self.improved(best, self._graph(best.recipe), self.contest.runner(best))

    # --- The climb ---

    def _numbers(self) -> Model:
        """Return the numbers of the search: measured, or those of the run that this one resumes."""
        known = self.state.model
        if known is not None:
            return known
        self._tell("measuring what merging and patterns damage and cost")
        allow = self.goal.allow
        us = 1e3 * (self.contest.exact().latency_ms or 0.0)
        numbers: Model = ranks.broadcast(self.space.measure("tokens" in allow, "masks" in allow, us))
        self.frontier.notes += self.space.notes
        self.state.keep_model(numbers)
        return numbers

    def _sets(self, numbers: Model) -> list[tuple[bool, bool]]:
        """Return the sets of levers to search with: (masks, tokens)."""
        allow = self.goal.allow
        sets = [(False, True)] if "tokens" in allow and len(numbers.levels) > 1 else []
        return sets + ([(True, "tokens" in allow)] if "masks" in allow and numbers.menus else [])

    def _sequence(self, numbers: Model, masks: bool, tokens: bool) -> list[Choice]:
        """Return the choices of one set of levers that keep the accuracy, from the safest to the fastest."""
        accepted: list[Choice] = []
        tried: set[Recipe] = {Recipe()}
        for budget in self._budgets(numbers, masks):
            if self.clock.left() < 0:
                self._note("the time was over before the search was: more minutes may find more")
                break
            choice = numbers.best(budget(), masks, tokens)
            if choice.recipe in tried or (masks and tokens and not self._worth(numbers, choice)):
                continue
            if masks and choice.damage > BEYOND * self.failed:
                self._note("masks pay only at a damage at which merging alone loses too much")
                break
            tried.add(choice.recipe)
            outcome = self._judged(numbers, choice)
            if self.frontier.passes(outcome):
                accepted.append(choice)
                continue
            self.failed = min(self.failed, choice.damage)
            near = outcome.drop < NEAR * self.goal.max_drop
            rebuilt = self._rebuilt(numbers, choice) if masks and near else None
            return accepted if rebuilt is None else [*accepted, rebuilt]
        return accepted

    def _budgets(self, numbers: Model, masks: bool) -> Any:
        """Return the budgets of damage, each computed when its turn comes: the predictions improve meanwhile."""

        def expected(step: float) -> float:
            return numbers.drops.damage(step * self.goal.max_drop)

        steps: list[Callable[[], float]] = [functools.partial(expected, step) for step in LADDER]
        if not masks:  # every level is a step
            steps = [functools.partial(float, level.damage * (1 + 1e-9)) for level in numbers.levels]
        label = "masks" if masks else "tokens"
        return tqdm(steps, desc=label, unit="step", disable=None if self.progress else True)

    @staticmethod
    def _worth(numbers: Model, choice: Choice) -> bool:
        """Return True if masks are predicted to gain something over merging alone at equal damage."""
        return choice.cost < WORTH * numbers.best(choice.damage, masks=False).cost

    def _judged(self, numbers: Model, choice: Choice) -> Outcome:
        """Carry out a choice and judge it; learn from what it does to the images of the fits."""
        recipe = choice.recipe
        outcome, fitted = self.state.outcome(recipe), self.state.outcome(recipe, "fit")
        if outcome is None or fitted is None:
            gm = self._graph(recipe)
            outcome, fitted = self._judges(recipe).judge(gm), self.fit.judge(gm)
            self.state.keep_outcome(recipe, outcome)
            self.state.keep_outcome(recipe, fitted, "fit")
        entry = self.contest.entry(recipe, None, "fp32", outcome)
        entry.predicted_drop = numbers.drops.of(choice.damage)
        entry.predicted_ms = choice.cost / 1e3 if self.goal.objective == LATENCY else None
        passes = self.frontier.passes(outcome)
        entry.verdict = "keeps the accuracy" if passes else self.frontier.shortfall(outcome)
        if recipe.masked:
            self.known.append((numbers.levels[choice.level].damage, choice.masks, fitted.divergence))
            numbers.fit(self.known)
        self.space.pairs.append((fitted.divergence, fitted.expected))
        numbers.drops = numbers.drops.fit(self.space.pairs)
        self._tell(f"{recipe}: drop {outcome.drop:.2%}, at most {outcome.upper(self.goal.confidence):.2%}")
        return outcome

    def _rebuilt(self, numbers: Model, choice: Choice) -> Choice | None:
        """Reconstruct a choice that failed, if there is time; return it if it then keeps the accuracy."""
        minutes = round(self.clock.left() / 60 * 0.8, 1)
        if minutes < 1:
            return None
        self._tell(f"reconstructing {choice.recipe} for {minutes:g} minutes")
        dense, images, seed = self.model, self.fit.batches, self.goal.seed
        try:
            gm = reconstruct(self._graph(choice.recipe), dense, images, minutes=minutes, seed=seed).eval()
        except MPCompileError as error:
            self._note(f"not reconstructed: {error}")
            return None
        recipe = Recipe(choice.recipe.merges, choice.recipe.patterns, minutes)
        self.graphs[recipe] = gm
        rebuilt = Choice(recipe, choice.level, choice.masks, choice.damage, choice.cost)
        return rebuilt if self.frontier.passes(self._judged(numbers, rebuilt)) else None

    def _judges(self, recipe: Recipe) -> Images:
        """Return the images that a recipe was fitted to nothing of."""
        return self.held if recipe.masked else self.everything

    def _graph(self, recipe: Recipe) -> IRModule:
        """Return the transformed graph of a recipe."""
        if recipe not in self.graphs:
            config = recipe.config(self.config)
            calibration = self.fit.batches if recipe.masked else None
            self.graphs[recipe] = transform(self.model, self.batch, config, calibration, seed=self.goal.seed).eval()
        return self.graphs[recipe]

    # --- Builds ---

    def _build(self, choices: list[Choice]) -> None:
        """Build the fastest choice that was accepted, everywhere where it may be fastest; with a target, all."""
        for place in range(0 if self.goal.targeted else len(choices) - 1, len(choices)):
            if place < 0:
                return
            runtimes = (TORCH,) if choices[place].recipe.masked else self.contest.promising()
            for runtime in runtimes:
                for precision in self.contest.precisions(runtime):
                    self._built(choices[: place + 1], runtime, precision)

    def _built(self, choices: list[Choice], runtime: str, precision: str) -> None:
        """Build the last choice; in another precision in which it loses too much, the one before, and so on."""
        for choice in reversed(choices):
            entry = self.contest.entry(choice.recipe, runtime, precision, None)
            if precision == "fp32":
                entry.outcome = self.state.outcome(choice.recipe)
                self.contest.make(entry)
                return
            if self.contest.make_judged(entry) or self.goal.targeted:
                return

    def _note(self, text: str) -> None:
        if text not in self.frontier.notes:
            self.frontier.notes.append(text)

    def _tell(self, text: str) -> None:
        """Report the progress: the time used and budgeted, and the best so far."""
        if not ranks.rank():
            known = self.best is not None and self.best.speedup is not None and self.goal.elsewhere is None
            best = f"; best so far {self.best.speedup:.2f}x" if known else ""  # type: ignore[union-attr]
            log.info("%.0f s of %g min: %s%s", self.clock.used, self.goal.minutes, text, best)
