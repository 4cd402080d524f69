"""Allocate: give each layer a pattern of its own, so that a share of the MACs (or bytes) is saved at least damage.

The damage of every layer under every pattern of the menu is predicted (pruning/damage.py), the best choice is an
exact knapsack (pruning/knapsack.py), and with data it has to beat the uniform choice of equal savings on
calibration samples that it has not seen: the better one is kept, and the Plan names it.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from mpcompile.calibration.moments import Moments, collect
from mpcompile.calibration.sensitivity import Batch, batch_length, divergence, output_energy, samples
from mpcompile.calibration.stream import batch_norms
from mpcompile.errors import ConfigError, InputError, NotEligibleError
from mpcompile.ir.macs import count, node_macs
from mpcompile.ir.module import Imported, IRModule
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels.nm_format import Pattern, packed_bytes
from mpcompile.passes.base import Allocated, Context, Pass
from mpcompile.passes.mask import eligible
from mpcompile.plan import LayerPlan
from mpcompile.pruning import damage, knapsack
from mpcompile.pruning.edge_budget import layer_weights
from mpcompile.pruning.project import reestimate, write_norms
from mpcompile.rmt.analysis import study

DAMAGES = ("calibrated", "mp", "magnitude", "seb", "uniform")
HELD_OUT = 0.25  # share of the calibration samples that the comparison is made on
GRADIENT_SAMPLES = 128
_PART = 8  # samples whose activations a backward pass holds


@dataclass
class _Layer:
    """A weight and what it may become; the first option is the densest."""

    uses: list[LayerOp]
    names: list[str]
    options: list[Pattern | None]
    saved: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    @property
    def density(self) -> list[float]:
        return [1.0 if p is None else p.density for p in self.options]


@dataclass
class _Data:
    """Calibration data, in parts: one to predict with, one to compare on."""

    fit: list[Batch]
    held_out: list[Batch]
    moments: dict[str, Moments]


@dataclass
class _Choice:
    """What one kind of damage chooses (``best``), and the uniform choice (``even``), as places in the layers' menus."""

    kind: str
    found: list[_Layer]
    costs: list[list[float]]
    saved: list[list[float]]
    best: list[int]
    even: list[int]
    price: float
    inadmissible: dict[str, str]


class Allocate(Pass):
    """A pattern for each layer, for :attr:`Config.mac_reduction`.

    Args:
        damage: ``"calibrated"`` predicts the loss of the model's output from the inputs and gradients of the layers;
            ``"mp"`` takes weights for noise and structure as the Marchenko-Pastur fit has them, noise being lost as
            rho(N:M). None: with calibration data both, and what loses least on held-out samples is kept; without,
            ``"mp"``. ``"magnitude"`` is the energy of the removed weights over the mean square of the layer; ``"seb"``
            over the square of the weights of Spectral Edge Budgeting (arXiv 2606.02608). ``"uniform"`` predicts
            nothing: one density for all, or two mixed evenly.
        bytes_reduction: share of the bytes of all parameters to save, in place of multiply-accumulates.
        compare: with data, compare with the uniform pattern on held-out samples and keep the better one.

    Raises:
        ConfigError: an unknown damage, both targets, or ``"calibrated"`` without data.
        NotEligibleError: the target can't be reached; the message gives the range that can.

    Example:
        >>> from mpcompile import Config, transform
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
        >>> gm = transform(model, torch.randn(2, 64), Config(mac_reduction=0.3, patterns=("2:4", "dense")))
        >>> gm.plan.layers["0"].pattern
        '2:4'
    """

    name = "allocate"
    provides = (Allocated,)

    def __init__(
        self, damage: str | None = None, *, bytes_reduction: float | None = None, compare: bool = True
    ) -> None:
        super().__init__()
        if damage is not None and damage not in DAMAGES:
            raise ConfigError("there is no such damage", expected=f"one of {', '.join(DAMAGES)}", found=repr(damage))
        if bytes_reduction is not None and not 0 < bytes_reduction < 1:
            raise ConfigError("bytes_reduction is no share", expected="between 0 and 1", found=bytes_reduction)
        self.damage, self.bytes_reduction, self.compare = damage, bytes_reduction, compare

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        target = ctx.config.mac_reduction if self.bytes_reduction is None else self.bytes_reduction
        if target is None:
            return {"requested": False}
        if self.bytes_reduction is not None and ctx.config.mac_reduction is not None:
            raise ConfigError("two targets", expected="mac_reduction or bytes_reduction", found="both")
        if ctx.patterns:  # other graphs of the same model
            return {"requested": True, "given": len(ctx.patterns)}
        found = self._layers(gm, ctx)
        total = self._savings(gm, ctx, found)
        if not total:
            raise NotEligibleError(
                f"{self._unit} can't be reduced: there are none",
                expected="example inputs with at least one sample",
                found="an empty batch, or a model without products",
                hint="give a batch that isn't empty",
            )
        low, high = (v / total for v in knapsack.reachable([item.saved for item in found]))
        if not low * (1 - 1e-9) <= target <= high * (1 + 1e-9):
            menu = ", ".join(dict.fromkeys("dense" if p is None else str(p) for item in found for p in item.options))
            raise NotEligibleError(
                f"{self._unit} can't be reduced by {target:.2%}",
                expected=f"{low:.2%} to {high:.2%}, with {menu} on {len(found)} layers",
                found=f"{target:.2%}",
                hint="give a denser or a sparser pattern in Config(patterns=...), or include more layers",
            )
        kinds = [self.damage] if self.damage else ["mp"] if ctx.calibration is None else ["calibrated", "mp"]
        data = self._data(gm, ctx, found, kinds[0])
        if data is None or not data.held_out:
            kinds = kinds[:1]
        choices = [self._choose(gm, ctx, found, kind, data, target * total) for kind in kinds]
        lost: dict[str, float] = {}
        if data is not None and data.held_out and any(c.best != c.even for c in choices):
            lost = {c.kind: self._lost(gm, ctx, c.found, data, c.best) for c in choices}
        c = min(choices, key=lambda choice: lost.get(choice.kind, 0.0))
        decision: dict[str, Any] = {
            "requested": True,
            "damage": c.kind,
            "unit": self._unit,
            "target": target,
            "reachable": [low, high],
            "predicted": {"allocation": _sum(c.costs, c.best), "uniform": _sum(c.costs, c.even)},
            "uniform": _described(c.found, c.even),
            "held_out": None,
            "kept": "uniform" if c.kind == "uniform" else "allocation",
            "inadmissible": c.inadmissible,
        }
        if data is not None and lost:
            model = ctx.imported(gm)
            held_out: dict[str, Any] = {"samples": sum(batch_length(b, model) for b in data.held_out)}
            held_out |= {"allocation": lost[c.kind], "uniform": self._lost(gm, ctx, c.found, data, c.even)}
            decision["held_out"] = {**held_out, "tried": lost}
            decision["kept"] = self._better(decision["held_out"])
        chosen = c.best if decision["kept"] == "allocation" else c.even
        decision["saved"] = _sum(c.saved, chosen) / total
        decision["layers"] = _explained(c.found, chosen, c.price, total, decision["kept"], self._unit)
        return decision

    def _choose(
        self, gm: IRModule, ctx: Context, found: list[_Layer], kind: str, data: _Data | None, target: float
    ) -> _Choice:
        """What one kind of damage chooses for a target, and the uniform choice from the same menu."""
        found = [replace(item) for item in found]  # each kind has costs and a menu of its own
        inadmissible = self._predict(gm, ctx, found, kind, data, target)
        costs, saved = [item.costs for item in found], [item.saved for item in found]
        even = knapsack.even_mix([item.density for item in found], saved, target)
        best, price = (even, 0.0) if kind == "uniform" else knapsack.solve(costs, saved, target)
        return _Choice(kind, found, costs, saved, best, even, price, inadmissible)

    @staticmethod
    def _better(held_out: Mapping[str, Any]) -> str:
        return "uniform" if held_out["uniform"] < held_out["allocation"] else "allocation"

    @property
    def _unit(self) -> str:
        return "MACs" if self.bytes_reduction is None else "bytes"

    def _layers(self, gm: IRModule, ctx: Context) -> list[_Layer]:
        """Every weight that may be masked, once, with its options; layers that share a weight share its pattern."""
        names, found = set(eligible(gm, ctx)), dict[int, _Layer]()
        dense = not ctx.config.patterns or "dense" in ctx.config.patterns
        for use in layers(gm, ctx.lifted):
            if use.name not in names:
                continue
            weight = use.weight.tensor
            menu: list[Pattern | None] = [p for p in ctx.config.menu(weight) if p.n < p.m]
            options = [None, *menu] if dense or not menu else menu
            item = found.setdefault(id(weight), _Layer([], [], options))
            item.uses.append(use)
            if use.name not in item.names:
                item.names.append(use.name)
        if not found:
            raise NotEligibleError(
                "no layer can be masked",
                expected="a linear or convolution layer that one of the patterns fits",
                found="none",
                hint="choose other patterns, or a narrower exclude",
            )
        return list(found.values())

    def _savings(self, gm: IRModule, ctx: Context, found: list[_Layer]) -> float:
        """Fill in what every option saves; returns what the whole model has."""
        if self.bytes_reduction is not None:
            for item in found:
                weight = item.uses[0].weight.tensor
                size = weight.numel() * weight.itemsize
                packed = [size if p is None else packed_bytes(weight.shape, weight.itemsize, *p) for p in item.options]
                item.saved = [float(size - part) for part in packed]
            parameters = {id(p): p for p in [*gm.parameters(), *ctx.lifted.tensors.values()]}
            return float(sum(p.numel() * p.itemsize for p in parameters.values()))
        macs = node_macs(gm, ctx.lifted)
        for item in found:
            own = sum(macs[name] for name in item.names)
            item.saved = [own * (1 - density) for density in item.density]
        return float(count(gm, lifted=ctx.lifted)[0].dense or count(gm, lifted=ctx.lifted)[0].executed)

    def _data(self, gm: IRModule, ctx: Context, found: list[_Layer], kind: str) -> _Data | None:
        """The calibration samples in two parts, and the moments of the first; None where nothing needs them."""
        if ctx.calibration is None:
            if kind == "calibrated":
                raise ConfigError(
                    "damage='calibrated' needs calibration data", expected="calibration=...", found="None"
                )
            return None
        if kind == "uniform" or (kind != "calibrated" and not self.compare):
            return None
        model = ctx.imported(gm)
        everything = list(ctx.calibration.batches(model))
        if not everything:
            raise InputError("calibration is empty", expected="at least one batch", found="none")
        if len(everything) == 1:  # what can't be cut stays one part, and nothing is compared
            everything = list(samples(everything[0], model, max(1, batch_length(everything[0], model) // 4)))
        held = math.ceil(HELD_OUT * len(everything)) if self.compare and len(everything) > 1 else 0
        fit = everything[: len(everything) - held]
        sizes = {item.names[0]: max((p.m for p in item.options if p is not None), default=1) for item in found}
        moments = collect(model, fit, sizes, ctx.calibration.memory)
        return _Data(fit, everything[len(fit) :], moments)

    def _predict(
        self, gm: IRModule, ctx: Context, found: list[_Layer], kind: str, data: _Data | None, target: float
    ) -> dict[str, str]:
        """Fill in the damage of every option; returns the options that were taken from the menu, and why."""
        if kind == "calibrated":
            assert data is not None
            model = ctx.imported(gm)
            seen = batch_length(data.fit[0], model)
            some = data.fit[:: max(1, len(data.fit) * seen // GRADIENT_SAMPLES)]
            uses = {item.names[0]: item.uses for item in found}
            energy = output_energy(model, uses, some, ctx.seed, _PART)
            for item in tqdm(found, desc="allocate", unit="layer", disable=None):
                weight, name = item.uses[0].weight.tensor, item.names[0]
                masks = [p for p in item.options if p is not None]
                cost = damage.calibrated(weight, data.moments[name], masks, energy[name], ctx.refit)
                item.costs = [0.0] * (len(item.options) - len(masks)) + cost
            return {}
        if kind == "uniform":
            for item in found:
                item.costs = [0.0] * len(item.options)
            return {}
        fits = [self._fit(item, ctx) for item in found]
        weights = [1.0] * len(found)
        if kind == "seb":
            weights = self._seb(found, fits, target)
        for item, fit, w in zip(found, fits, weights, strict=True):
            weight = item.uses[0].weight.tensor
            masks = [p for p in item.options if p is not None]
            square = float(weight.detach().double().square().mean()) or 1.0
            if kind == "seb":
                cost = [e / w**2 for e in damage.removed_energy(weight, masks)]
            elif kind == "magnitude" or fit["verdict"] != "mp":
                share = weight.numel() if kind == "mp" else 1.0
                cost = [e / square / share for e in damage.removed_energy(weight, masks)]
            else:
                noise = fit["noise_share"] * float(weight.detach().double().square().sum())
                cost = damage.gaussian(weight, noise, masks)
            item.costs = [0.0] * (len(item.options) - len(masks)) + cost
        return self._admit(found, fits, target) if kind in ("mp", "seb") else {}

    @staticmethod
    def _fit(item: _Layer, ctx: Context) -> dict[str, Any]:
        entry = ctx.plan.layers.get(item.names[0])
        known = {} if entry is None else entry.notes.get("analyze", {})
        return known or study(item.names[0], item.uses[0].weight.tensor.detach()).notes()

    @staticmethod
    def _seb(found: list[_Layer], fits: Sequence[Mapping[str, Any]], target: float) -> list[float]:
        most = sum(item.saved[-1] / max(1e-9, 1 - item.density[-1]) for item in found)
        sparsity = min(1.0, target / most)
        edges = {item.names[0]: fit["edge"] for item, fit in zip(found, fits, strict=True)}
        return list(layer_weights(edges, sparsity).values())

    @staticmethod
    def _admit(found: list[_Layer], fits: Sequence[Mapping[str, Any]], target: float) -> dict[str, str]:
        """Take patterns from the menu under which a layer would lose more than noise, as far as the target allows."""
        refused: dict[str, str] = {}
        kept: list[list[int]] = []
        for item, fit in zip(found, fits, strict=True):
            bad = damage.inadmissible(item.uses[0].weight.tensor, fit, [p for p in item.options if p is not None])
            places = [i for i, p in enumerate(item.options) if p is None or p not in bad]
            kept.append(places or [0])
            for pattern, why in bad.items():
                refused[f"{item.names[0]} {pattern}"] = why
        most = sum(max(item.saved[i] for i in places) for item, places in zip(found, kept, strict=True))
        if most < target:
            return {"": "patterns that remove structure were left in the menu: the target can't be met without them"}
        for item, places in zip(found, kept, strict=True):
            item.options = [item.options[i] for i in places]
            item.saved, item.costs = [item.saved[i] for i in places], [item.costs[i] for i in places]
        return refused

    def _lost(self, gm: IRModule, ctx: Context, found: list[_Layer], data: _Data, chosen: list[int]) -> float:
        """What the whole model loses on held-out samples under a choice.

        All layers are projected as the damage has it, from moments of the dense model, and BatchNorms estimated anew:
        cheaper than the masks to come, and alike for all choices.
        """
        places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        own = [n.name not in ctx.lifted.tensors for n in places]
        as_given = [{str(n.target): v for n, v, o in zip(places, b, own, strict=True) if o} for b in data.fit]
        trial = copy.deepcopy(gm)
        lifted = replace(ctx.lifted, tensors=dict(ctx.lifted.tensors))
        weights = {layer.name: layer.weight for layer in layers(trial, lifted)}
        for item, i in zip(found, chosen, strict=True):
            pattern, weight = item.options[i], weights[item.names[0]]
            if pattern is None:
                continue
            new = damage.projected(weight.tensor, data.moments[item.names[0]], pattern, ctx.refit)
            if weight.node is not None and weight.node.op == "placeholder":
                lifted.tensors[weight.node.name] = new
            else:
                weight.tensor.data.copy_(new)
        pruned = Imported(trial, ctx.inputs, lifted, [])
        if batch_norms(trial):
            assert ctx.calibration is not None
            write_norms(trial, reestimate(pruned, as_given, ctx.calibration.memory))
        values = [[lifted.tensors.get(n.name, v) for n, v in zip(places, b, strict=True)] for b in data.held_out]
        return divergence(gm, trial, data.held_out, values)

    def summary(self, decision: dict[str, Any]) -> str:
        if not decision["requested"]:
            return "off"
        if "given" in decision:
            return f"{decision['given']} layers as in another graph of this model"
        counts = Counter(entry["pattern"] for entry in decision["layers"].values())
        text = f"{decision['unit']} -{decision['saved']:.2%} (target {decision['target']:.2%}): "
        text += ", ".join(f"{n} {pattern}" for pattern, n in sorted(counts.items()))
        predicted, seen = decision["predicted"], decision["held_out"]
        if decision["damage"] == "uniform":
            return f"{text}; {decision['uniform']}, as asked"
        if seen is None:
            ratio = predicted["allocation"] / (predicted["uniform"] or 1.0)
            text += f"; predicted damage ({decision['damage']}) {ratio:.3g}x that of {decision['uniform']}"
            return f"{text}, not compared: no held-out data"
        tried = ", ".join(f"{kind} {lost:.4g}" for kind, lost in seen["tried"].items())
        return (
            f"{text}; {decision['kept']} kept: on {seen['samples']} held-out samples the output loses "
            f"{seen['allocation']:.4g} by allocation ({tried}), {seen['uniform']:.4g} by {decision['uniform']}"
        )

    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        known = {layer.name: layer for layer in layers(gm, ctx.lifted)}
        patterns = dict(ctx.patterns)
        for name, entry in decision.get("layers", {}).items():
            pattern = entry["pattern"]
            patterns[name] = None if pattern == "dense" else Pattern.parse(pattern)
            layer = known[name]
            plan = LayerPlan(layer.kind, tuple(layer.weight.tensor.shape))
            ctx.plan.layers.setdefault(name, plan).notes["allocate"] = entry
        ctx.results.put(Allocated(patterns))
        return False  # masks come later


def _sum(values: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return float(sum(row[i] for row, i in zip(values, chosen, strict=True)))


def _patterns(found: Sequence[_Layer], chosen: Sequence[int]) -> dict[str, Pattern | None]:
    return {name: item.options[i] for item, i in zip(found, chosen, strict=True) for name in item.names}


def _label(pattern: Pattern | None) -> str:
    return "dense" if pattern is None else str(pattern)


def _described(found: Sequence[_Layer], chosen: Sequence[int]) -> str:
    """A uniform choice in words."""
    used = Counter(_label(item.options[i]) for item, i in zip(found, chosen, strict=True))
    names = " and ".join(sorted(used))
    return f"{names} everywhere" if len(used) == 1 else f"{names} mixed evenly"


def _explained(
    found: Sequence[_Layer], chosen: Sequence[int], price: float, total: float, kept: str, unit: str
) -> dict[str, dict[str, Any]]:
    """For every layer: its pattern, the damage and savings of each option, and why it got this one."""
    result = {}
    uniform = "uniform: better than allocation on held-out samples" if price else "uniform, as asked"
    for item, i in zip(found, chosen, strict=True):
        options = {
            _label(p): {"damage": c, "saved": s / total}
            for p, c, s in zip(item.options, item.costs, item.saved, strict=True)
        }
        why = _why(item, i, price, unit) if kept == "allocation" else uniform
        for name in item.names:
            result[name] = {"pattern": _label(item.options[i]), "why": why, "options": options}
    return result


def _why(item: _Layer, i: int, price: float, unit: str) -> str:
    """What the next sparser and the next denser option would cost, against the going price of what they save."""

    def ratio(a: int, b: int) -> str:
        gain = (item.saved[b] - item.saved[a]) * price
        return f"{(item.costs[b] - item.costs[a]) / gain:.2g}x" if gain > 0 else "more than"

    parts = []
    if i + 1 < len(item.options):
        parts.append(f"{_label(item.options[i + 1])} would cost {ratio(i, i + 1)} what its {unit} cost elsewhere")
    else:
        parts.append("the sparsest on its menu")
    if i > 0:
        parts.append(f"over {_label(item.options[i - 1])} it pays {ratio(i - 1, i)}")
    return ", ".join(parts)
