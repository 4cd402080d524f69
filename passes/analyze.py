"""Analyze: fit the Marchenko-Pastur law to every weight. Decides nothing: it fills the Plan's columns."""

from __future__ import annotations

from typing import Any

from mpcompile.errors import InputError
from mpcompile.graph import IRModule, layers
from mpcompile.passes.base import Context, Pass
from mpcompile.plan import LayerPlan
from mpcompile.rmt import fit as fit_spectrum


class Analyze(Pass):
    """Noise level, spectral edge and spikes of each linear and convolution weight (convolutions unfolded)."""

    name = "analyze"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        fits: dict[str, Any] = {}
        for layer in layers(gm, ctx.lifted):
            weight = layer.weight.tensor.detach()
            if layer.name in fits or layer.depthwise or layer.pattern is not None:
                continue
            try:
                fit = fit_spectrum(weight)
            except InputError as error:
                raise InputError(str(error), layer=layer.name) from error
            fits[layer.name] = {
                "sigma": fit.sigma,
                "edge": fit.edge,
                "edge_tw": fit.edge_tw,
                "spikes": fit.n_spikes,
                "fit_error": fit.fit_error,
                "noise_share": fit.noise_share,
                "verdict": fit.verdict,
            }
        return {"layers": fits}

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
