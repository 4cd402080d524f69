"""The frontier: every build that was tried, what it loses and what it takes, and why it was kept or dropped."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mpcompile.errors import ConfigError, printable
from mpcompile.io.writing import write_atomically
from mpcompile.measure.report import finite
from mpcompile.optimization.accuracy.outcome import Outcome
from mpcompile.optimization.recipe import Recipe

CHOSEN = "chosen"


@dataclass
class Entry:
    """One build.

    Attributes:
        name: of the build: its recipe, runtime and precision.
        recipe: what it changes in the model.
        runtime: ``"torch"``, ``"onnxruntime"`` or ``"openvino"``; None if it was judged, but not built.
        precision: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        dense: True for the model as it is: no recipe, another runtime or precision at most.
        predicted_drop: what the damage model predicts; None for dense builds.
        outcome: what it loses on the held-out images; None if it was not judged.
        predicted_ms: predicted latency of one batch; None if it was not predicted.
        latency_ms, quartiles_ms: median and quartiles of one batch in the final interleaved run; None if not timed.
        speedup: latency of the fastest dense build that keeps the accuracy over that of this build.
        macs: multiply-accumulates per sample.
        weight_bytes: bytes of the weights as the build stores them.
        verdict: ``"chosen"``, or why it was not.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    runtime: str | None = None
    precision: str = "fp32"
    dense: bool = False
    predicted_drop: float | None = None
    outcome: Outcome | None = None
    predicted_ms: float | None = None
    latency_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    speedup: float | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    verdict: str = ""

    @property
    def key(self) -> tuple[Recipe, str | None, str]:
        """What makes a build another one."""
        return self.recipe, self.runtime, self.precision

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON values, with the drop and its bounds."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["recipe"] = self.recipe.record()
        if self.outcome is not None:
            values["outcome"] = self.outcome.record()
            values["drop"], values["interval"] = self.outcome.drop, list(self.outcome.interval())
        return dict(finite(values))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Entry:
        """Return the entry that :meth:`record` wrote."""
        names = {f.name for f in dataclasses.fields(cls)}
        given = {key: value for key, value in values.items() if key in names}
        given["recipe"] = Recipe.read(values["recipe"])
        if values.get("outcome"):
            given["outcome"] = Outcome(**values["outcome"])
        if values.get("quartiles_ms"):
            given["quartiles_ms"] = tuple(values["quartiles_ms"])
        return cls(**given)


@dataclass
class Frontier:
    """All entries of a search, dense builds first.

    Attributes:
        entries: the builds.
        max_drop, confidence: what was asked for.
        conditions: processor, instruction set, threads, batch size and versions of the latencies.
        notes: remarks on the search.

    Example:
        >>> frontier = Frontier([Entry("dense", dense=True, latency_ms=4.0, verdict="chosen")], 0.01, 0.8)
        >>> frontier.chosen.name, len(frontier)
        ('dense', 1)
    """

    entries: list[Entry]
    max_drop: float
    confidence: float
    conditions: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def chosen(self) -> Entry:
        """The build that was chosen."""
        return next(entry for entry in self.entries if entry.verdict == CHOSEN)

    @property
    def best_dense(self) -> Entry | None:
        """The fastest dense build that keeps the accuracy, against which speed-ups are measured."""
        timed = [e for e in self.entries if e.dense and e.latency_ms is not None and self.keeps(e)]
        return min(timed, key=lambda entry: entry.latency_ms or 0.0, default=None)

    def keeps(self, entry: Entry) -> bool:
        """Return True if a build is shown to drop by at most ``max_drop``; the model itself drops nothing."""
        if entry.outcome is None:
            return entry.dense and entry.precision == self.conditions.get("precision", "fp32")
        return self.passes(entry.outcome)

    def passes(self, outcome: Outcome) -> bool:
        """Return True if an outcome shows a drop of at most ``max_drop``."""
        return outcome.upper(self.confidence) <= self.max_drop

    def shortfall(self, outcome: Outcome) -> str:
        """Return the verdict on an outcome that does not."""
        return f"drop may be {outcome.upper(self.confidence):.2%}"

    def to_dict(self) -> dict[str, Any]:
        """Return the frontier as JSON values."""
        entries = []
        for entry in self.entries:
            values = entry.record()
            if entry.outcome is not None:
                values["upper"] = entry.outcome.upper(self.confidence)
            entries.append(values)
        goal = {"max_drop": self.max_drop, "confidence": self.confidence}
        return {**goal, "conditions": self.conditions, "notes": self.notes, "entries": entries}

    def to_json(self, indent: int | None = None) -> str:
        """Return the frontier as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file, atomically.

        Raises:
            ArtifactError: it cannot be written.
        """
        write_atomically(Path(path), self.to_json(indent=1) + "\n")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Frontier:
        """Return the frontier that :meth:`to_dict` wrote."""
        entries = [Entry.read(entry) for entry in values["entries"]]
        return cls(entries, values["max_drop"], values["confidence"], dict(values["conditions"]), list(values["notes"]))

    def __str__(self) -> str:
        what = "drop" if any(e.outcome is not None and e.outcome.labelled for e in self.entries) else "changed"
        head = ["build", "runtime", f"{what} [95 %]", f"at most ({self.confidence:.0%})", "predicted"]
        head += ["ms [quartiles]", "speed", "MMAC", "MiB", "verdict"]
        rows = [self._row(entry) for entry in self.entries]
        align = ("left", "left", *("right" for _ in range(7)), "left")
        table = tabulate(rows, headers=head, disable_numparse=True, colalign=align if rows else None)
        return "\n".join([table, *(f"note: {note}" for note in self.notes)])

    def _row(self, entry: Entry) -> list[str]:
        runtime = "" if entry.runtime is None else f"{entry.runtime} {entry.precision}"
        drop = upper = ""
        if entry.outcome is not None:
            low, high = entry.outcome.interval()
            drop = f"{entry.outcome.drop:.2%} [{low:.2%}, {high:.2%}]"
            upper = f"{entry.outcome.upper(self.confidence):.2%}"
        predicted = "" if entry.predicted_drop is None else f"{entry.predicted_drop:.2%}"
        time = "" if entry.latency_ms is None else f"{entry.latency_ms:.2f}"
        if entry.quartiles_ms is not None:
            time += " [{:.2f}, {:.2f}]".format(*entry.quartiles_ms)
        elif entry.latency_ms is None and entry.predicted_ms is not None:
            time = f"about {entry.predicted_ms:.2f}"
        speed = "" if entry.speedup is None else f"{entry.speedup:.2f}x{' slower' if entry.speedup < 1 else ''}"
        macs = "" if entry.macs is None else f"{entry.macs / 1e6:,.0f}"
        size = "" if entry.weight_bytes is None else f"{entry.weight_bytes / 2**20:.1f}"
        return [printable(entry.name, 80), runtime, drop, upper, predicted, time, speed, macs, size, entry.verdict]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw accuracy kept against speed, every timed build a point, the chosen one marked.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigError("a plot needs matplotlib", hint="run pip install 'mpcompile[plot]'") from error
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for label, marker, colour, chosen in (
            ("dense", "s", "C7", [e for e in self.entries if e.dense]),
            ("transformed", "o", "C0", [e for e in self.entries if not e.dense]),
            ("chosen", "*", "C3", [e for e in self.entries if e.verdict == CHOSEN]),
        ):
            points = [(e.speedup, 0.0 if e.outcome is None else -100 * e.outcome.drop) for e in chosen if e.speedup]
            size = 140 if label == "chosen" else 36
            axes.scatter([x for x, _ in points], [y for _, y in points], s=size, c=colour, marker=marker, label=label)
        axes.axhline(-100 * self.max_drop, color="C3", linewidth=0.8, linestyle=":")
        axes.axvline(1, color="C7", linewidth=0.8)
        axes.set_xlabel("speed against the best dense build, higher is better")
        axes.set_ylabel("change of top-1 on held-out images, points")
        axes.grid(alpha=0.3)
        axes.legend()
        write_atomically(Path(path), lambda temporary: figure.savefig(temporary, dpi=150), suffix=Path(path).suffix)
