"""Analyze: fit the Marchenko-Pastur law to every weight. Changes nothing; fills columns of the Plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpcompile.ir.module import IRModule
from mpcompile.ir.view import layers
from mpcompile.passes.base import Context, Decision, Pass
from mpcompile.plan import LayerPlan
from mpcompile.rmt.analysis import study_all


@dataclass(frozen=True, eq=False)
class Fits(Decision):
    """Layer name -> the figures of its Marchenko-Pastur fit."""

    layers: Mapping[str, Any]


class Analyze(Pass):
    """Noise level, spectral edge and spikes of each linear and convolution weight; see :func:`mpcompile.analyze`."""

    name = "analyze"
    decision_type = Fits

    def plan(self, gm: IRModule, ctx: Context) -> Fits:
        weights: dict[str, Tensor] = {}
        for layer in layers(gm, ctx.lifted):
            grouped = layer.geometry is not None and layer.geometry.groups > 1
            if not grouped and layer.pattern is None and layer.weight.tensor.dim() in (2, 4):
                weights.setdefault(layer.name, layer.weight.tensor.detach())
        return Fits({name: fit.notes() for name, fit in study_all(weights).items()})

    def summary(self, decision: Fits) -> str:
        verdicts = [fit["verdict"] for fit in decision.layers.values()]
        counts = {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}
        return "Marchenko-Pastur fits: " + (", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "none")

    def apply(self, gm: IRModule, decision: Fits, ctx: Context) -> bool:
        for layer in layers(gm, ctx.lifted):
            fit = decision.layers.get(layer.name)
            if fit is not None:
                entry = LayerPlan(layer.kind, tuple(layer.weight.tensor.shape))
                ctx.plan.layers.setdefault(layer.name, entry).notes["analyze"] = dict(fit)
        return False
