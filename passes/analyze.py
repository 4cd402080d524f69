"""Analyze: fit the Marchenko-Pastur law to every weight. Decides nothing: it fills the Plan's columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpcompile.ir.module import IRModule
from mpcompile.ir.view import layers
from mpcompile.passes.base import Context, Pass
from mpcompile.plan import LayerPlan
from mpcompile.rmt.analysis import study_all


class Analyze(Pass):
    """Noise level, spectral edge and spikes of each linear and convolution weight; see :func:`mpcompile.analyze`."""

    name = "analyze"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        weights: dict[str, Tensor] = {}
        for layer in layers(gm, ctx.lifted):
            grouped = layer.geometry is not None and layer.geometry.groups > 1
            if not grouped and layer.pattern is None and layer.weight.tensor.dim() in (2, 4):
                weights.setdefault(layer.name, layer.weight.tensor.detach())
        return {"layers": {name: found.notes() for name, found in study_all(weights).items()}}

    def summary(self, decision: dict[str, Any]) -> str:
        verdicts = [fit["verdict"] for fit in decision["layers"].values()]
        count = {v: verdicts.count(v) for v in sorted(set(verdicts))}
        return "Marchenko-Pastur fits: " + (", ".join(f"{n} {v}" for v, n in count.items()) or "none")

    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        for layer in layers(gm, ctx.lifted):
            fit = decision["layers"].get(layer.name)
            if fit is not None:
                entry = LayerPlan(layer.kind, tuple(layer.weight.tensor.shape))
                ctx.plan.layers.setdefault(layer.name, entry).notes["analyze"] = fit
        return False
