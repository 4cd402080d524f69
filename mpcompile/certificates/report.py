"""The results of a certification: tiers, layers and statements, as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from mpcompile.measure.report import finite

DETERMINISTIC, PROBABLE, NONE = "deterministic", "high probability", "not certified"


@dataclass(frozen=True)
class Statement:
    """One sentence and its basis.

    Attributes:
        kind: ``"deterministic"`` (about these samples, without assumptions), ``"high probability"`` (assumes that the
            samples were drawn independently of how the sparse model was made), or ``"not certified"``.
        text: the sentence; if nothing is certified, the reason.
    """

    kind: str
    text: str


@dataclass
class Tier:
    """The result of one tier over all samples.

    Attributes:
        certified: number of samples whose label is proven to stay the dense model's.
        settled: with true labels, number of samples for which right or wrong is proven to stay; None without.
        kept: for every sample, True if it is certified.
        eta: for every sample, the bound on the change of any logit; infinite where there is none.
        median: the median of eta.
        ce_mean: mean over the samples of 2 eta, which bounds the rise of cross-entropy (the paper's B_T).
        ce_sharp: mean of log(p_y + (1 - p_y) exp(2 eta)), a sharper bound on the same; None without true labels.
        objective: ce_sharp (or else ce_mean) plus the change of the elastic net, an upper bound on the change of the
            training objective: a negative value certifies a decrease. None if no lambda was given.
        least_l2: with lambda_1 = 0, the smallest lambda_2 for which a decrease is certified; None if there is none.
    """

    name: str
    samples: int
    certified: int
    settled: int | None
    kept: list[bool]
    eta: list[float]
    median: float
    ce_mean: float
    ce_sharp: float | None
    objective: float | None
    least_l2: float | None

    @property
    def label_changes(self) -> float:
        """Upper bound on the share of these samples whose label changes."""
        return 1 - self.certified / self.samples


@dataclass
class Layer:
    """One step: one layer replaced, all layers before it sparse and all after it dense.

    Attributes:
        split: ``"mask"`` if values were only set to zero, ``"moved"`` if kept values changed too, ``""`` if no weight
            changed (only normalisation statistics).
        removed: Frobenius norm of the change of its weights, relative to that of the dense weights.
        median: tier -> median bound on the change of any logit.
        certified: tier -> number of samples whose label this step is proven to preserve.
        objective: ce_mean of this step in tier 1 (or else 0) plus its change of the elastic net; None without lambdas.
        reason: why tiers 1 and 2 are missing or infinite, or None.
    """

    name: str
    split: str
    removed: float
    median: dict[str, float] = field(default_factory=dict)
    certified: dict[str, int] = field(default_factory=dict)
    objective: float | None = None
    reason: str | None = None


@dataclass
class Certificates:
    """The result of :func:`mpcompile.certify`; prints as text.

    Attributes:
        samples: number of samples.
        classes: number of logits.
        disagreements: samples for which the two models, run in their own precision, give different labels.
        allowance: largest rounding allowance of a logit.
        l1, l2: as passed to :func:`mpcompile.certify`.
        ce_change: measured change of the mean cross-entropy; None without labels.
        violations: number of bounds that a measured change exceeded. Anything but 0 is a defect in the bounds or the
            machine.

    Example:
        >>> report = Certificates(8, 2, 0, 1e-6, 0.0, 0.0, [], [], [Statement(DETERMINISTIC, "nothing changed")])
        >>> print(report.statements[0].text)
        nothing changed
    """

    samples: int
    classes: int
    disagreements: int
    allowance: float
    l1: float
    l2: float
    tiers: list[Tier]
    layers: list[Layer]
    statements: list[Statement]
    ce_change: float | None = None
    violations: int = 0

    def __getitem__(self, tier: str | int) -> Tier:
        """Return a tier by its name or number."""
        return next(t for t in self.tiers if t.name == tier or t.name.startswith(f"{tier} "))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values; infinite bounds become None."""
        data = asdict(self)
        for tier in data["tiers"]:
            tier["label_changes"] = 1 - tier["certified"] / tier["samples"]
        return finite(data)

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def table(self) -> str:
        """A table with one row per tier."""
        rows = []
        for tier in self.tiers:
            rows.append(
                [
                    tier.name,
                    f"{tier.certified} of {tier.samples}",
                    _number(tier.median),
                    f"{tier.label_changes:.2%}",
                    "" if tier.settled is None else f"{1 - tier.settled / tier.samples:.2%}",
                    _number(tier.ce_mean),
                    "" if tier.ce_sharp is None else _number(tier.ce_sharp),
                    "" if tier.objective is None else _number(tier.objective),
                    "" if tier.least_l2 is None else _number(tier.least_l2),
                ]
            )
        head = ["tier", "label kept", "median bound", "labels change <=", "accuracy moves <=", "CE <= 2 eta"]
        head += ["CE <= sharp", "objective <=", "least lambda_2"]
        return _table(rows, head)

    def layer_table(self) -> str:
        """A table with one row per step."""
        names = list(dict.fromkeys(name for layer in self.layers for name in layer.median))
        rows = []
        for layer in self.layers:
            row = [layer.name, layer.split, f"{layer.removed:.3f}"]
            for name in names:
                known = name in layer.median
                row.append(f"{_number(layer.median[name])} ({layer.certified[name]})" if known else "")
            rows.append([*row, layer.reason or ""])
        return _table(rows, ["layer", "weights", "|R| / |A|", *names, "why not"], left=(0, 1, 3 + len(names)))

    def __str__(self) -> str:
        parts = [self.table()]
        if self.layers:
            head = "One layer at a time, those before it sparse, those after it dense: median bound (labels kept)"
            parts.append(f"{head}\n{self.layer_table()}")
        width = max((len(s.kind) for s in self.statements), default=0)
        parts.append("\n".join(f"[{s.kind}]".ljust(width + 3) + s.text for s in self.statements))
        return "\n\n".join(parts)


def _number(value: float) -> str:
    return "none" if not math.isfinite(value) else f"{value:.3g}"


def _table(rows: list[list[str]], head: list[str], left: tuple[int, ...] = (0,)) -> str:
    align = tuple("left" if i in left else "right" for i in range(len(head)))
    return tabulate(rows, headers=head, disable_numparse=True, colalign=align if rows else None)
