"""Computes the masks and refitted values of every layer from the scores and the calibration data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from mpcompile.calibration.moments import Moments, collect
from mpcompile.calibration.norms import Statistics
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.base import Context
from mpcompile.passes.mask.choice import Masks
from mpcompile.pruning.project import Projection, in_sequence, project
from mpcompile.pruning.ser import source_masks


def uses_by_name(gm: IRModule, ctx: Context) -> dict[str, list[LayerOp]]:
    """Return the uses of every layer, in graph order."""
    uses: dict[str, list[LayerOp]] = {}
    for layer in layers(gm, ctx.lifted):
        uses.setdefault(layer.name, []).append(layer)
    return uses


def sources(gm: IRModule, uses: list[LayerOp], ctx: Context) -> dict[str, Tensor]:
    """Return the source masks of ``score="ser"``, by layer name.

    Raises:
        InputError: the calibration data can be read only once, or the graph takes its weights as inputs.
    """
    calibration = ctx.calibration
    if calibration is None or not calibration.rereadable or ctx.lifted.tensors:
        once = calibration is None or not calibration.rereadable
        raise InputError(
            "score='ser' trains on the calibration data",
            expected="data that can be read again, and a graph that owns its weights",
            found="an iterator" if once else "lifted weights",
            hint="give a list or a DataLoader, and transform the module itself",
        )
    names = {use.weight.name: use.name for use in uses}
    edges = {}
    for use in uses:
        fit = ctx.plan.layers[use.name].notes.get("analyze") if use.name in ctx.plan.layers else None
        edges[use.weight.name] = float((fit or {}).get("edge") or 0.0)
    known = [edge for edge in edges.values() if edge]
    mean = sum(known) / len(known) if known else 1.0
    weights = {use.weight.name: use.weight.tensor for use in uses}
    edges = {name: edge or mean for name, edge in edges.items()}
    masks = source_masks(gm, weights, edges, calibration.batches(ctx.imported(gm)))
    return {names[name]: mask for name, mask in masks.items()}


class Projector:
    """Computes masks and refitted values of all layers of a choice. Layers that share a weight share both."""

    def __init__(self, gm: IRModule, choice: Masks, ctx: Context) -> None:
        self.gm, self.choice, self.ctx = gm, choice, ctx
        self.uses = uses_by_name(gm, ctx)
        self.weights = {name: self.uses[name][0].weight.tensor for name in choice.masked}
        self.patterns = {name: Pattern.parse(text) for name, text in choice.patterns.items()}
        self.owner: dict[int, str] = {}  # id of a weight -> the first layer that uses it
        for name, weight in self.weights.items():
            self.owner.setdefault(id(weight), name)

    def run(self) -> tuple[dict[str, Projection], Statistics]:
        """Return the projection of every layer, in graph order, and BatchNorm statistics computed along the way."""
        known: dict[str, Projection] = {}
        for name, weight in self.weights.items():
            mask = self.ctx.masks.get(name)
            if mask is not None and mask.shape == weight.shape:
                known[name] = Projection(mask, None, self.choice.masked[name])
        todo = [name for name, w in self.weights.items() if name not in known and self.owner[id(w)] == name]
        projected, norms = self._project(todo)
        known |= projected
        everything = {n: known[n] if n in known else known[self.owner[id(w)]] for n, w in self.weights.items()}
        return everything, norms

    def _project(self, todo: list[str]) -> tuple[dict[str, Projection], Statistics]:
        ctx, calibration = self.ctx, self.ctx.calibration
        decide = self._rule(todo)
        if calibration is None or (ctx.config.score == "magnitude" and not ctx.refit):
            return {name: decide(name, None) for name in todo}, {}
        model = ctx.imported(self.gm)
        if calibration.policy == "dense":
            sizes = {use.name: self.patterns[name].m for name, uses in self._sharing(todo).items() for use in uses}
            moments = collect(model, calibration.batches(model), sizes, calibration.memory)
            return {name: decide(name, moments[name]) for name in todo}, {}
        return in_sequence(
            model,
            self._sharing(todo),
            self.patterns,
            decide,
            calibration,
            memory=calibration.memory,
            policy=calibration.policy,
            renorm=ctx.renorm,
            statistics=calibration.statistics,
            options={**ctx.config.to_dict(), "seed": ctx.seed},
        )

    def _sharing(self, todo: list[str]) -> dict[str, list[LayerOp]]:
        """Return layer to decide -> all uses of its weight, including those under other layer names."""
        same = {first: [n for n, w in self.weights.items() if self.owner[id(w)] == first] for first in todo}
        return {first: [use for name in names for use in self.uses[name]] for first, names in same.items()}

    def _rule(self, todo: list[str]) -> Callable[[str, Moments | None], Projection]:
        """Return the function from a layer's name and the moments of its inputs to its mask and values."""
        ctx, score = self.ctx, self.ctx.config.score
        priors = ctx.run.prior
        if score == "ser" and ctx.calibration is not None:
            priors = {**sources(self.gm, [self.uses[name][0] for name in todo], ctx), **priors}
        measure = "covariance" if score == "ser" else score

        def decide(name: str, moments: Moments | None) -> Projection:
            weight, source = self.weights[name], priors.get(name)
            prior = None if source is None else (source.to(weight.device), ctx.run.prior_weight)
            refitted = ctx.refit and ctx.writable(self.uses[name][0])
            result = project(weight, moments, self.patterns[name], measure, refitted, prior)
            return replace(result, score="ser") if score == "ser" and result.score == measure else result

        return decide
