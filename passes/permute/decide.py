"""Permute: reorder channels so that the masks keep more, folded into the weights.

Channels that may be reordered without changing the network are found on any graph (channels/axes.py); for each such
class the layers that read it are collected, and an order is searched (pruning/column_order.py) that leaves the least
to remove. Names, shapes and run time stay as they are. Where the channels are split into heads or convolution groups,
each has an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.calibration.moments import DIAGONAL, collect
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

_TOLERANCE = 1e-5  # relative difference of the reordered from the original graph's output


@dataclass(frozen=True, eq=False)
class Permutation(Decision):
    """Which channels are reordered.

    Attributes:
        requested: False if the options switch reordering off.
        classes: the classes of channels that get a new order.
        unknown: operators around which channels stay as they are, since it isn't known how they treat them.
        reason: why nothing is reordered, or None.
        difference: relative difference of the reordered graph's output, or None where nothing was tried.
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
    """Orders of channels under which N:M masks remove less; checked to leave the network as it was."""

    name = "permute"
    decision_type = Permutation

    @torch.no_grad()
    def plan(self, gm: IRModule, ctx: Context) -> Permutation:
        asked = ctx.config.permute
        requested = ctx.calibration is not None if asked is None else asked
        if not requested or ctx.config.pattern == "dense":
            return Permutation(requested)
        if not ctx.owned or ctx.lifted.tensors:
            return Permutation(requested, reason="the graph doesn't own its weights")
        if any(layer.pattern is not None for layer in layers(gm, ctx.lifted)):
            return Permutation(requested, reason="masks that are there already hold for the present order of channels")
        names = [name for name in eligible(gm, ctx) if name not in ctx.masks]
        if not names:
            return Permutation(requested, reason="no layer to mask")
        uses, analysis = _first_uses(gm, ctx), analyse(gm, ctx.inputs)
        candidates = classes(analysis, {name: uses[name] for name in names})
        power = self._power(gm, ctx, {name: layer for c in candidates for name, layer in c.readers.items()})
        found = [best_order(candidate, analysis, power, ctx) for candidate in candidates]
        decision = Permutation(requested, tuple(c for c in found if c is not None), tuple(sorted(analysis.unknown)))
        return self._checked(gm, ctx, analysis, decision) if decision.classes else decision

    @staticmethod
    def _checked(gm: IRModule, ctx: Context, analysis: ChannelAnalysis, decision: Permutation) -> Permutation:
        """The decision if the reordered graph computes what the original does, else one that reorders nothing."""
        inputs = [_random(value) for value in ctx.inputs]
        state = folded(gm, analysis, _orders(gm, ctx, analysis, decision.classes))
        with training_flags(gm, False):
            expected = gm(*own_copies(gm, inputs))
            result = torch.func.functional_call(gm, state, tuple(own_copies(gm, inputs)))
        difference = _difference(result, expected)
        if difference <= _TOLERANCE * _looser(gm):
            return replace(decision, difference=difference)
        why = f"the reordered graph differed by {difference:.1e}: every order was put back"
        return replace(decision, classes=(), reason=why, difference=difference)

    def _power(self, gm: IRModule, ctx: Context, uses: dict[str, LayerOp]) -> dict[str, Tensor]:
        """Mean square of each layer's inputs, if the score uses data and the data can be read again."""
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
    """The first use of every layer, by name."""
    uses: dict[str, LayerOp] = {}
    for layer in layers(gm, ctx.lifted):
        uses.setdefault(layer.name, layer)
    return uses


def _orders(gm: IRModule, ctx: Context, analysis: ChannelAnalysis, entries: Sequence[Reordered]) -> Orders:
    """The orders of a decision by the atoms of an analysis of the same graph."""
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
    """1 for fp32 weights, more where rounding is coarser."""
    eps = max((torch.finfo(p.dtype).eps for p in gm.parameters() if p.is_floating_point()), default=1.2e-7)
    return max(1.0, eps / torch.finfo(torch.float32).eps)


def _random(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return value


def _difference(found: Any, expected: Any) -> float:
    """Largest difference over the largest value, over all tensors that a graph returns."""
    if isinstance(expected, Tensor):
        scale = float(expected.double().abs().max()) if expected.numel() else 1.0
        return float((found.double() - expected.double()).abs().max()) / max(scale, 1e-30) if expected.numel() else 0.0
    values = expected.values() if isinstance(expected, dict) else expected
    others = found.values() if isinstance(found, dict) else found
    return max((_difference(a, b) for a, b in zip(others, values, strict=True)), default=0.0)
