"""Permute: reorder channels so that the masks keep more energy, by reordering the weights themselves.

An analysis that works on any graph (channels/axes.py) finds the channels that can be reordered without changing the
network. For each class of them, the layers that read it are collected, and pruning/column_order.py searches the order
under which masks remove least. Names, shapes and run time stay the same. If channels are split into heads or
convolution groups, each head or group has its own order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.calibration.moments import DIAGONAL, collect
from mpcompile.capture.signature import call_graph, call_of
from mpcompile.data.outputs import tensors_of
from mpcompile.ir.effects import own_copies
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import device_of
from mpcompile.ir.view import LayerOp, layers
from mpcompile.passes.base import Context, Decision, Pass
from mpcompile.passes.channels.axes import ChannelAnalysis, analyse
from mpcompile.passes.mask import eligible
from mpcompile.passes.permute.channel_classes import ChannelClass, Orders, classes, fold, folded
from mpcompile.passes.permute.order_search import Reordered, best_order

_TOLERANCE = 1e-5  # largest relative difference between the outputs of the reordered and the original graph, in fp32


@dataclass(frozen=True, eq=False)
class Permutation(Decision):
    """The channels to reorder.

    Attributes:
        requested: False if the options switch reordering off.
        classes: the classes of channels that get a new order.
        unknown: operators whose effect on channels is not known; the channels around them are not reordered.
        reason: why nothing is reordered, or None.
        difference: relative difference of the reordered graph's output, or None if nothing was tried.
    """

    requested: bool
    classes: tuple[Reordered, ...] = ()
    unknown: tuple[str, ...] = ()
    reason: str | None = None
    difference: float | None = None

    def record(self) -> dict[str, Any]:
        values = super().record()
        for entry in values["classes"]:
            del entry["readers"]
            if not entry["writers"]:
                del entry["writers"]
        if self.difference is None:
            del values["difference"]
        return values


class Permute(Pass):
    """Reorder channels so that N:M masks remove less, and check that the outputs of the network do not change."""

    name = "permute"
    decision_type = Permutation

    @torch.no_grad()
    def plan(self, gm: IRModule, ctx: Context) -> Permutation:
        option = ctx.config.permute
        requested = ctx.calibration is not None if option is None else option
        if not requested or ctx.config.pattern == "dense":
            return Permutation(requested)
        if not ctx.owned or ctx.lifted.tensors:
            return Permutation(requested, reason="the graph does not own its weights")
        if any(layer.pattern is not None for layer in layers(gm, ctx.lifted)):
            return Permutation(requested, reason="existing masks are tied to the present order of channels")
        names = [name for name in eligible(gm, ctx) if name not in ctx.masks]
        if not names:
            return Permutation(requested, reason="no layer to mask")
        uses, analysis = _first_uses(gm, ctx), analyse(gm, ctx.inputs)
        candidates = classes(analysis, {name: uses[name] for name in names})
        power = self._power(gm, ctx, {name: layer for c in candidates for name, layer in c.readers.items()})
        orders = [best_order(candidate, analysis, power, ctx) for candidate in candidates]
        decision = Permutation(requested, tuple(o for o in orders if o is not None), tuple(sorted(analysis.unknown)))
        return self._checked(gm, ctx, analysis, decision) if decision.classes else decision

    @staticmethod
    def _checked(gm: IRModule, ctx: Context, analysis: ChannelAnalysis, decision: Permutation) -> Permutation:
        """Return the decision if the reordered graph computes the same outputs, else one that reorders nothing."""
        inputs = [_random(value) for value in ctx.inputs]
        state = folded(gm, analysis, _orders(gm, ctx, analysis, decision.classes))
        with training_flags(gm, False):
            expected = call_graph(gm, own_copies(gm, inputs))
            result = torch.func.functional_call(gm, state, *call_of(gm, own_copies(gm, inputs)))
        difference = _difference(result, expected)
        if difference <= _TOLERANCE * _looser(gm):
            return replace(decision, difference=difference)
        why = f"the reordered graph differed by {difference:.1e}: the original order was kept"
        return replace(decision, classes=(), reason=why, difference=difference)

    def _power(self, gm: IRModule, ctx: Context, uses: dict[str, LayerOp]) -> dict[str, Tensor]:
        """Return the mean square of each layer's inputs, if the score uses data and the data can be read again."""
        data = ctx.calibration
        if data is None or not data.rereadable or ctx.config.score == "magnitude" or not uses:
            return {}
        model = ctx.imported(gm)
        moments = collect(model, data.batches(model), dict.fromkeys(uses, 1), kind=DIAGONAL)
        return {name: m.power for name, m in moments.items()}

    def summary(self, decision: Permutation) -> str:
        if not decision.requested:
            return "off"
        if decision.reason:
            return f"none: {decision.reason}"
        entries = decision.classes
        readers = sum(len(entry.layers) for entry in entries)
        text = f"{len(entries)} classes of channels reordered for {readers} layers"
        if entries:
            before = sum(entry.lost_before for entry in entries) / len(entries)
            after = sum(entry.lost_after for entry in entries) / len(entries)
            text += f", magnitude masks remove {after:.1%} instead of {before:.1%} of the energy"
        if decision.unknown:
            text += f"; left alone around {', '.join(decision.unknown)}"
        return text

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: Permutation, ctx: Context) -> bool:
        if decision.classes:
            analysis = analyse(gm, ctx.inputs)
            fold(gm, analysis, _orders(gm, ctx, analysis, decision.classes))
        for entry in decision.classes:
            for name in entry.layers:
                if name in ctx.plan.layers:
                    notes = {"lost_before": entry.lost_before, "lost_after": entry.lost_after}
                    ctx.plan.layers[name].notes["permute"] = notes
        return False  # tensors changed, the graph did not


def _first_uses(gm: IRModule, ctx: Context) -> dict[str, LayerOp]:
    """Return the first use of every layer, by name."""
    uses: dict[str, LayerOp] = {}
    for layer in layers(gm, ctx.lifted):
        uses.setdefault(layer.name, layer)
    return uses


def _orders(gm: IRModule, ctx: Context, analysis: ChannelAnalysis, entries: Sequence[Reordered]) -> Orders:
    """Return the orders of a decision, keyed by the atoms of an analysis of the same graph."""
    uses = _first_uses(gm, ctx)
    by_reader: dict[str, ChannelClass] = {}
    for candidate in classes(analysis, {name: uses[name] for entry in entries for name in entry.readers}):
        by_reader |= dict.fromkeys(candidate.readers, candidate)
    orders: Orders = {}
    for entry in entries:
        candidate = by_reader[entry.readers[0]]
        orders[candidate.atom] = (candidate.owner, torch.tensor(entry.order, device=device_of(gm)))
    return orders


def _looser(gm: nn.Module) -> float:
    """Return the factor on the tolerance: 1 for fp32 weights, more for dtypes with coarser rounding."""
    eps = max((torch.finfo(p.dtype).eps for p in gm.parameters() if p.is_floating_point()), default=1.2e-7)
    return max(1.0, eps / torch.finfo(torch.float32).eps)


def _random(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return value


def _difference(actual: Any, expected: Any) -> float:
    """Return the largest difference over the largest value, as the maximum over all tensors that a graph returns."""
    pairs = zip(tensors_of(actual), tensors_of(expected), strict=True)
    return max((_relative(a.double(), b.double()) for a, b in pairs if b.numel()), default=0.0)


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
