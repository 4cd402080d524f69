"""The report of an audit: one row per build of the model, as a table or as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from mpcompile.errors import printable
from mpcompile.plan import Plan

DENSE_EAGER, DENSE_COMPILED, COMPILED = "dense eager", "dense compiled", "compiled sparse"
DENSE_FROZEN = "dense frozen"  # compiled, with constants folded and weights prepacked
DENSE_BF16 = "dense bf16"  # another dtype than the rest: shown in the table, but never a baseline


def finite(value: Any) -> Any:
    """Return JSON values with None for numbers that are not finite, which JSON cannot represent."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class Row:
    """One build of the model.

    Attributes:
        correct, samples: top-1 hits (None without labels) and the number of samples.
        interval: 95 % Wilson interval of the top-1 accuracy.
        agree: share of samples whose top-1 class is that of the dense model.
        lost, won: samples that only the dense model, or only this build, classifies correctly.
        difference: relative RMS difference of the outputs from those of the dense model.
        macs, paper_macs: MACs per sample, executed and by the paper's convention.
        weight_bytes: bytes of the parameters as this build stores them.
        latency_ms, quartiles_ms: median and quartiles of the time of one batch.
        speedup: median latency of the best dense build over that of this one.
        runtime: what runs the build.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"int8"``; None if it is not known.
        dense: True for the dense model, untransformed.
        baseline: True if speed-ups are measured against this build when it is the fastest such: the dense model at the
            audited precision.
        reason: why the build was not measured.
    """

    name: str
    correct: int | None = None
    samples: int = 0
    interval: tuple[float, float] | None = None
    agree: float | None = None
    lost: int | None = None
    won: int | None = None
    difference: float | None = None
    macs: int | None = None
    paper_macs: int | None = None
    weight_bytes: int = 0
    latency_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    speedup: float | None = None
    runtime: str = "torch"
    precision: str | None = None
    dense: bool = False
    baseline: bool = False
    reason: str | None = None

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy on the labelled samples, 0 to 1."""
        return None if self.correct is None or not self.samples else self.correct / self.samples


@dataclass
class Report:
    """The result of :func:`mpcompile.audit`. Prints as a table; ``report[name]`` is the row of a build.

    Attributes:
        rows: one per build: the dense ones, others, and the audited build last.
        environment: see :func:`mpcompile.measure.environment.conditions`.
        plan: plan of the audited build, or None.
        notes: remarks on the figures.
        fell_back: dynamo runs the model's own eager code instead of the compiled graph.
        predicted_saving_ms: time that the lowered layers save over the best dense layers, each timed alone; None if
            they were not timed.

    Example:
        >>> report = Report([Row("dense eager", latency_ms=2.0), Row("mpsparse", latency_ms=1.0)], {})
        >>> report["mpsparse"].latency_ms
        1.0
    """

    rows: list[Row]
    environment: dict[str, Any]
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)
    fell_back: bool = False
    predicted_saving_ms: float | None = None

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    @property
    def best_dense(self) -> Row | None:
        """The fastest dense build at the audited precision, in whatever runtime; None without latencies."""
        timed = [row for row in self.rows if row.baseline and row.latency_ms is not None]
        return min(timed, key=lambda row: row.latency_ms or math.inf, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that are not finite are None."""
        rows = [{**asdict(row), "top1": row.top1} for row in self.rows]
        plan = self.plan.to_dict() if self.plan is not None else None
        return {
            "rows": finite(rows),
            "environment": self.environment,
            "notes": self.notes,
            "fell_back": self.fell_back,
            "predicted_saving_ms": self.predicted_saving_ms,
            "plan": plan,
        }

    def to_json(self, indent: int | None = None) -> str:
        """Return the report and its plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> str:
        """Return a table with one row per build."""
        labelled = any(row.correct is not None for row in self.rows)
        dense = self.rows[0]
        lines = []
        for row in self.rows:
            line = [printable(row.name, 200)]
            if labelled:
                low, high = row.interval or (0, 0)
                line.append("" if row.top1 is None else f"{row.top1:.2%} [{low:.1%}, {high:.1%}]")
            paired = f" (-{row.lost} +{row.won})" if row.lost is not None and row is not dense else ""
            line.append("" if row.agree is None else f"{row.agree:.2%}{paired}")
            line.append(f"{row.difference:.1e}" if row.difference is not None and row is not dense else "")
            share = f" (-{1 - row.macs / dense.macs:.2%})" if row.macs and dense.macs and row.macs != dense.macs else ""
            line.append(f"{row.macs / 1e6:,.2f}{share}" if row.macs else "")
            line.append(f"{row.weight_bytes / 2**20:,.3f}" if row.weight_bytes else "")
            low, high = row.quartiles_ms or (0, 0)
            unmeasured = "" if row.reason is None else "not run"
            line.append(unmeasured if row.latency_ms is None else f"{row.latency_ms:.2f} [{low:.2f}, {high:.2f}]")
            line.append("" if row.speedup is None else f"{row.speedup:.2f}x")
            lines.append(line)
        head = ["build", *(["top-1 [95 %]"] if labelled else []), "agree (lost, won)", "rel. diff"]
        head += ["MMAC executed", "weights MiB", "latency ms [quartiles]", "vs best dense"]
        return tabulate(lines, headers=head, disable_numparse=True, colalign=("left",) + ("right",) * (len(head) - 1))

    def __str__(self) -> str:
        env = printable(", ".join(f"{k} {v}" for k, v in self.environment.items()))
        return "\n".join([self.table(), "", env, *(f"note: {printable(n, 560)}" for n in self.notes)])
