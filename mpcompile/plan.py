"""Plan: the decisions of every pass, layer by layer, as data, as JSON, and as a readable table."""

from __future__ import annotations

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

from tabulate import tabulate
from torch import fx

from mpcompile.errors import InputError, printable
from mpcompile.io.reading import parse_json
from mpcompile.io.schema import Between, Length, Natural, check
from mpcompile.kernels import ops

_CELL, _LINE = 200, 560  # maximum characters that are printed of a name or reason, and of a remark


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per sample (convolution, linear and attention products; nothing elementwise).

    Attributes:
        dense: MACs of the model before any pass.
        executed: MACs of the graph as it runs. A masked layer counts as n/m only if its stored weight is legal N:M.
        paper: like ``executed``, but everything between a token merge and the next residual addition is charged at the
            token count before the merge (the convention of arXiv 2606.02608).
        matching: MACs for choosing the tokens to merge and averaging them; not included in the other three.
    """

    dense: int
    executed: int
    paper: int
    matching: int = 0

    @property
    def reduction(self) -> float:
        """1 - executed / dense."""
        return 1 - self.executed / self.dense if self.dense else 0.0

    @property
    def paper_reduction(self) -> float:
        """1 - paper / dense."""
        return 1 - self.paper / self.dense if self.dense else 0.0


@dataclass
class LayerPlan:
    """The decisions about one weight.

    Attributes:
        kind: ``"linear"``, ``"conv2d"`` or ``"other"``.
        shape: shape of the weight.
        pattern: ``"N:M"``, or ``"dense"``.
        reason: why the weight stays dense, or None.
        density: share of the values that the mask keeps.
        macs_dense, macs_executed: multiply-accumulates per sample, before and after.
        notes: pass name -> what that pass did to the layer.
    """

    kind: str
    shape: tuple[int, ...]
    pattern: str = "dense"
    reason: str | None = None
    density: float = 1.0
    macs_dense: int = 0
    macs_executed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


def is_lowered(gm: fx.GraphModule, plan: Plan) -> bool:
    """Return True if a graph was lowered: its masked layers are packed, or run dense without a mask."""
    return any(record.name == "lower" for record in plan.passes) or any(n.target in ops.PACKED for n in gm.graph.nodes)


def _why(layer: LayerPlan) -> str:
    """Return why a layer is dense, or the score that chose its mask; and why it was allocated its pattern."""
    first = layer.reason or layer.notes.get("mask", {}).get("score", "")
    budget = layer.notes.get("allocate", {}).get("why")
    return f"{first}: {budget}" if budget else first


@dataclass
class PassRecord:
    """One pass: its decision (JSON values) and a sentence about it."""

    name: str
    decision: dict[str, Any]
    summary: str


# Types of the fields of a plan's JSON that readers of a plan rely on. It may hold other fields.


class _Analyzed(TypedDict, total=False):
    edge: float | None
    spikes: int | None
    verdict: str


class _Masked(TypedDict, total=False):
    score: str
    kept_energy: float | None


class _Allocated(TypedDict, total=False):
    pattern: str
    why: str | None


class _Lowered(TypedDict, total=False):
    engine: str
    us: float | None
    dense_us: float | None


class _Notes(TypedDict, total=False):
    analyze: _Analyzed
    mask: _Masked
    allocate: _Allocated
    lower: _Lowered
    permute: dict[str, Any]
    restore: dict[str, Any]


@dataclass
class _Layer:
    kind: str
    shape: list[Natural]
    pattern: str = "dense"
    reason: str | None = None
    density: Annotated[float, Between(0, 1)] = 1.0
    macs_dense: Natural = 0
    macs_executed: Natural = 0
    notes: _Notes = field(default_factory=_Notes)


class _Class(TypedDict, total=False):
    layers: list[str]
    writers: list[str]
    order: list[list[Natural]]


class _Stream(TypedDict, total=False):
    prefix: Natural


class _Decision(TypedDict, total=False):
    classes: list[_Class]
    prefix: Natural
    streams: list[_Stream]


@dataclass
class _Record:
    name: str
    decision: _Decision
    summary: str


@dataclass
class _Macs:
    dense: Natural
    executed: Natural
    paper: Natural
    matching: Natural = 0


class Data(TypedDict, total=False):
    """How images are prepared for a model, as returned by :func:`mpcompile.data.images.data_config`."""

    input_size: Annotated[list[Annotated[int, Between(1, 1 << 14)]], Length(3)]
    interpolation: str
    mean: list[Annotated[float, Between(-1e6, 1e6)]]
    std: list[Annotated[float, Between(-1e6, 1e6)]]
    crop_pct: Annotated[float, Between(0.01, 10)]
    crop_mode: str


class _Provenance(TypedDict, total=False):
    data: Data
    num_classes: Annotated[int, Between(0, 1 << 31)] | None
    class_names: list[str]


class _Row(TypedDict, total=False):
    name: str
    correct: int | None
    samples: int
    macs: float | None
    weight_bytes: float | None
    latency_ms: float | None
    speedup: float | None
    top1: float | None
    agree: float | None
    lost: int | None
    won: int | None
    difference: float | None
    interval: tuple[float, float] | None
    quartiles_ms: tuple[float, float] | None


class Figures(TypedDict, total=False):
    """The measurements of an audit that other code reads back from a plan."""

    rows: list[_Row]
    environment: dict[str, Any]
    notes: list[str]
    fell_back: bool
    distillation: dict[str, Any]


@dataclass
class _Plan:
    layers: dict[str, _Layer]
    passes: list[_Record]
    macs: _Macs
    config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokens: list[Natural] | list[list[Natural]] = field(default_factory=list)
    provenance: _Provenance = field(default_factory=_Provenance)
    figures: Figures = field(default_factory=Figures)
    captured: str = ""


def _check_config(config: dict[str, Any]) -> None:
    """Check the types of known options; options of other versions are allowed."""
    from mpcompile.config import Config

    for name, hint in typing.get_type_hints(Config).items():
        if name in config:
            check(config[name], hint, f"config.{name}")


@dataclass
class Plan:
    """The decisions for a model.

    Attributes:
        config: the options, as returned by :meth:`mpcompile.Config.to_dict`.
        layers: the entry of every layer by name, in graph order.
        passes: the passes that ran, in order.
        macs: MACs of the whole model.
        notes: remarks about the whole model.
        tokens: number of tokens before the first block and after each; empty if none merge. One such list for each
            stream if several merge, such as two towers.
        provenance: where model and data came from (JSON values), as a command such as ``mpcompile compile`` enters it.
        figures: measurements (JSON values), such as :meth:`mpcompile.Report.to_dict` without its plan.
        captured: how the model's graph was made, such as ``"torch.export, strict, batch free"``.

    Example:
        >>> plan = Plan(config={"pattern": "2:4"})
        >>> plan.layers["fc"] = LayerPlan("linear", (8, 16), "2:4", None, 0.5, 128, 64)
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    config: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    macs: Macs = Macs(0, 0, 0)
    notes: list[str] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    captured: str = ""

    @property
    def masked(self) -> list[str]:
        """Names of the layers that have a mask."""
        return [name for name, layer in self.layers.items() if layer.pattern != "dense"]

    def note(self, text: str) -> None:
        """Add a remark about the whole model, once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return json.loads(self.to_json())

    def to_json(self, indent: int | None = None) -> str:
        """Return the whole plan as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from the JSON text of :meth:`to_json`.

        Raises:
            InputError: the text is not the JSON of a plan.
        """
        try:
            data = parse_json(text)
            check(data, _Plan)
            config = data.get("config", {})
            _check_config(config)
            if "tome_r" in config:  # plans saved before there was a choice merge tokens as ToMe does
                config.setdefault("tome_method", "tome")
            layers = {k: LayerPlan(**{**v, "shape": tuple(v["shape"])}) for k, v in data.pop("layers").items()}
            passes = [PassRecord(**record) for record in data.pop("passes")]
            return cls(layers=layers, passes=passes, macs=Macs(**data.pop("macs")), **data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError("this is not the JSON of a plan", found=str(error)) from error

    def table(self) -> str:
        """Return a table with one row per layer."""
        rows = []
        for name, layer in self.layers.items():
            mp = layer.notes.get("analyze", {})
            rows.append(
                [
                    printable(name, _CELL),
                    printable(layer.kind, _CELL),
                    printable("x".join(map(str, layer.shape)), _CELL),
                    printable(layer.pattern, _CELL),
                    f"{layer.density:.3g}",
                    f"{layer.macs_dense / 1e6:,.2f}",
                    f"{layer.macs_executed / 1e6:,.2f}",
                    f"{mp['edge']:.3g}" if mp.get("edge") is not None else "",
                    mp.get("spikes", ""),
                    printable(mp.get("verdict", ""), _CELL),
                    printable(_why(layer), _CELL),
                ]
            )
        head = ["layer", "kind", "weight", "pattern", "density", "MMAC", "MMAC run", "MP edge", "spikes", "MP", "why"]
        return tabulate(rows, headers=head, disable_numparse=True, colalign=("left",) * 4 + ("right",) * 5)

    def __str__(self) -> str:
        macs = self.macs
        lines = [self.table(), ""]
        lines += [f"{'graph':>14}: {printable(self.captured, _LINE)}"] if self.captured else []
        lines += [f"{printable(p.name, _CELL):>14}: {printable(p.summary, _LINE)}" for p in self.passes]
        lines += [f"{'note':>14}: {printable(note, _LINE)}" for note in self.notes]
        lines += [
            f"{'MACs / sample':>14}: dense {macs.dense / 1e9:.4f} G, executed {macs.executed / 1e9:.4f} G "
            f"(-{macs.reduction:.2%}), paper convention {macs.paper / 1e9:.4f} G (-{macs.paper_reduction:.2%})"
            + (f", merging itself {macs.matching / 1e9:.4f} G" if macs.matching else "")
        ]
        return "\n".join(lines)
