"""The result of a search."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.artifact import save
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule
from mpcompile.optimization.accuracy.outcome import images_needed
from mpcompile.optimization.frontier import Entry, Frontier
from mpcompile.optimization.recipe import Recipe
from mpcompile.optimization.runner import Runner


@dataclass
class Optimized:
    """The result of :func:`mpcompile.optimize`; ``print`` shows what was chosen, and how sure that is.

    Attributes:
        module: the transformed graph: trainable, saves, lowers and exports like that of :func:`mpcompile.transform`.
        runner: a callable, the fastest build in the runtime where it is fastest. On other ranks than the first: None.
        frontier: every build that was tried.

    Example:
        >>> gm = mpcompile.transform(nn.Linear(4, 2).eval(), torch.randn(2, 4), mpcompile.Config(pattern="dense"))
        >>> entry = Entry("dense, torch", runtime="torch", dense=True, latency_ms=1.0, verdict="chosen")
        >>> Optimized(gm, Runner(gm), Frontier([entry], 0.01, 0.8)).speedup
        1.0
    """

    module: IRModule
    runner: Runner | None
    frontier: Frontier

    @property
    def chosen(self) -> Entry:
        """The entry of the build that was chosen."""
        return self.frontier.chosen

    @property
    def recipe(self) -> Recipe:
        """What was changed in the model."""
        return self.chosen.recipe

    @property
    def speedup(self) -> float:
        """Latency of the best dense build over that of the chosen one, both measured in one interleaved run."""
        return self.chosen.speedup or 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to a file, and the runner beside it, for :func:`mpcompile.load_runner`.

        Args:
            path: a file, conventionally ``*.mpc``.

        Raises:
            ArtifactError: a file cannot be written.
            InputError: this rank has no runner.
        """
        if self.runner is None:
            raise InputError("this process has no runner", expected="the first rank", found="another one")
        save_all(self.module, self.runner, path)

    def __str__(self) -> str:
        return "\n".join([str(self.frontier), "", self.statement()])

    def statement(self) -> str:
        """Return what was reached, in words."""
        frontier, chosen, best = self.frontier, self.chosen, self.frontier.best_dense
        outcome, batch = chosen.outcome, frontier.conditions.get("batch")
        goal = f"at most {frontier.max_drop:.2%}"
        elsewhere = self._elsewhere()
        if elsewhere is not None:
            return "\n".join([elsewhere, *self._needed()])
        if chosen.dense or best is None:
            lines = [f"nothing beats the best dense build, {chosen.name}, at a drop of {goal}: it is returned as it is"]
            return "\n".join([*lines, *self._needed()])
        time = f"{chosen.latency_ms:.3g} ms for a batch of {batch}, {best.name} {best.latency_ms:.3g} ms"
        text = f"{chosen.name}: {self.speedup:.2f}x as fast as the best dense build ({time})"
        if outcome is not None and chosen.recipe != Recipe():
            low, high = outcome.interval()
            what = "top-1 drops by" if outcome.labelled else "the top-1 class changes in"
            text += (
                f"; {what} {outcome.drop:.2%} [{low:.2%}, {high:.2%}] on {outcome.samples} held-out images, "
                f"{goal} with {frontier.confidence:.0%} confidence"
            )
        elif chosen.precision == "fp32":
            text += "; it returns the same outputs"
        return "\n".join([text, *self._needed()])

    def _elsewhere(self) -> str | None:
        """Return what was reached by the times of another machine; None if this one's counted."""
        machine, chosen = self.frontier.conditions.get("times of", "this machine"), self.chosen
        exact = next((e for e in self.frontier if e.recipe == Recipe() and e.predicted_ms), None)
        if machine == "this machine" or exact is None or not chosen.predicted_ms or not exact.predicted_ms:
            return None
        ratio = exact.predicted_ms / chosen.predicted_ms
        return f"{chosen.name}: its timed layers are predicted to be {ratio:.2f}x as fast as dense ones on {machine}"

    def _needed(self) -> list[str]:
        """Return what a faster build would have needed."""
        frontier = self.frontier
        failed = [e for e in frontier if e.outcome is not None and not frontier.keeps(e)]
        lines = []
        near = [e for e in failed if e.outcome is not None and e.outcome.drop < frontier.max_drop]
        for entry in sorted(near, key=lambda e: e.predicted_ms or 1e30)[:1]:
            assert entry.outcome is not None  # near has outcomes
            needed = _enough(entry, frontier)
            if needed is not None:
                lines.append(
                    f"{entry.name} drops by {entry.outcome.drop:.2%} on {entry.outcome.samples} images, too few to be "
                    f"sure: about {needed:,} would show it, if the rates stay"
                )
        if failed:
            least = min(e.outcome.upper(frontier.confidence) for e in failed if e.outcome is not None)
            lines.append(f"the next step needs max_drop={least:.3f} on these images")
        return lines


def _enough(entry: Entry, frontier: Frontier) -> int | None:
    """Return the number of images at which the drop seen would pass, or None if none would do."""
    outcome = entry.outcome
    if outcome is None or outcome.drop >= frontier.max_drop:
        return None
    pairs = outcome.changed if outcome.lost is None or outcome.won is None else outcome.lost + outcome.won
    return max(
        outcome.samples + 1,
        images_needed(frontier.max_drop - max(0.0, outcome.drop), frontier.confidence, pairs / outcome.samples),
    )


def save_all(module: nn.Module, runner: Runner, path: str | os.PathLike[str]) -> None:
    """Write a module, and its runner beside it.

    Raises:
        ArtifactError: a file cannot be written, or the path is that of a folder.
    """
    assert isinstance(module, IRModule)  # of a search
    save(module, path)
    runner.save(Path(path))


def provenance(goal: dict[str, Any], fitted: int, judged: int) -> dict[str, Any]:
    """Return what the plan of the result records of the search."""
    return {"optimized": {**goal, "fit_images": fitted, "held_out_images": judged}}
