"""Reconstruct: the kept weights, biases and norms of masked regions, trained towards the dense model's activations.

Row-wise least squares fits every layer by itself; a region with a nonlinearity inside (a block, or its attention or
MLP) reaches a smaller error with less data. The masks stay as they are. The science is in mpcompile/reconstruction/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpcompile.errors import GraphError
from mpcompile.ir.module import IRModule
from mpcompile.ir.parts import attribute
from mpcompile.ir.view import layers
from mpcompile.passes.base import UNRECORDED, Context, Decision, Dense, Pass, Request
from mpcompile.passes.reconstruct.sides import fixed_size, sides
from mpcompile.reconstruction.finish import Outputs
from mpcompile.reconstruction.fit import Fit
from mpcompile.reconstruction.options import Reconstruction
from mpcompile.reconstruction.regions import Region, find
from mpcompile.reconstruction.run import run


@dataclass(frozen=True)
class Rebuilt:
    """A region, and its relative squared error: over the energy of what the dense region adds to its input.

    Attributes:
        name: module path of the region.
        kind: ``"block"``, ``"half"`` or ``"layer"``.
        before, after: error on images that it was trained on; None if it is not finite.
        held_before, held_after: error on held-out images; None if there are none, too.
        reason: why it keeps the values that it had; None if it has new ones.
    """

    name: str
    kind: str
    before: float | None
    after: float | None
    held_before: float | None = None
    held_after: float | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Reconstructed(Decision):
    """The result of a reconstruction.

    Attributes:
        regions: the regions, in order.
        images, held: number of calibration images, and how many of them were held out.
        views, epochs: rounds over the images, and epochs in each region.
        final: losses of the pass over the whole model; None without one.
        outputs: loss of the whole model's outputs on held-out images (the divergence of class probabilities from the
            dense model's, or a relative squared error) before and after, and the share of the change of all values
            that was kept: less than 1 if all of it did not lower this loss. None if nothing changed.
        reason: why nothing was reconstructed, or None.
        notes: remarks.
        values: new values of parameters and BatchNorm statistics, by name.
    """

    regions: tuple[Rebuilt, ...] = ()
    images: int = 0
    held: int = 0
    views: int = 0
    epochs: int = 0
    final: Rebuilt | None = None
    outputs: Outputs | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    values: dict[str, Tensor] = field(default_factory=dict, metadata=UNRECORDED)


class Reconstruct(Pass):
    """Train masked regions towards the dense model's activations; needs calibration data, behind Mask and Restore.

    Args:
        options: lengths, learning rates, and so on.
        shared: share the images with the other ranks, each of which has to run this pass.
    """

    name = "reconstruct"
    decision_type = Reconstructed
    requests = frozenset({Request.DENSE})

    def __init__(self, options: Reconstruction | None = None, *, shared: bool = False) -> None:
        super().__init__()
        self.options, self.shared = options or Reconstruction(), shared

    def plan(self, gm: IRModule, ctx: Context) -> Reconstructed:
        reason = self._obstacle(gm, ctx)
        if reason is not None:
            return Reconstructed(reason=reason)
        dense, data = ctx.results.get(Dense), ctx.calibration
        if dense is None:
            raise GraphError(
                "the weights of the dense model are not known",
                expected="the pass Mask before Reconstruct",
                found="a graph that was masked before",
                hint="call mpcompile.reconstruct(gm, model, calibration) with the dense model",
            )
        assert data is not None  # checked by _obstacle()
        student, twin = sides(gm, dense.tensors)
        regions = find(student, halves=self.options.halves)
        if not regions:
            return Reconstructed(reason="no region holds a masked layer")
        notes = []
        if all(region.kind == "layer" for region in regions):
            notes.append("no block found: each masked layer is trained by itself")
        outside = _outside(student, regions)
        if outside:
            notes.append(f"in no region, and left as they are: {', '.join(outside)}")
        result = run(
            student,
            twin,
            regions,
            data.batches(ctx.imported(gm)),
            self.options,
            fixed=fixed_size(student, ctx.inputs),
            folder=data.statistics,
            memory=data.memory,
            shared=self.shared,
        )
        final = result.final
        return Reconstructed(
            regions=tuple(_entry(region.name, region.kind, fit) for region, fit in result.fits),
            images=result.images,
            held=result.held,
            views=result.views,
            epochs=result.epochs,
            outputs=result.outputs,
            final=None if final is None else _entry("", "model", final),
            notes=(*notes, *result.notes),
            values=result.values,
        )

    @staticmethod
    def _obstacle(gm: IRModule, ctx: Context) -> str | None:
        """Return why nothing can be reconstructed, or None."""
        if not ctx.owned or ctx.lifted.tensors:
            return "the graph does not own its weights"
        if ctx.calibration is None:
            return "no calibration data"
        if all(layer.pattern is None for layer in layers(gm, ctx.lifted)):
            return "no layer is masked"
        return None

    def summary(self, decision: Reconstructed) -> str:
        if decision.reason is not None:
            return f"none: {decision.reason}"
        better = [region for region in decision.regions if region.reason is None]
        text = f"{len(better)} of {len(decision.regions)} regions trained on {decision.views} views of "
        text += f"{decision.images} images for {decision.epochs} epochs"
        if better:
            before, after = (sum(pair) / len(better) for pair in zip(*map(_held, better), strict=True))
            text += f", mean relative error {before:.3g} -> {after:.3g}"
        if decision.final is not None and decision.final.reason is None:
            before, after = _held(decision.final)
            text += f"; then as a whole, loss {before:.3g} -> {after:.3g}"
        if decision.outputs is not None:
            text += f"; {_told(decision.outputs)}"
        return "; ".join([text, *decision.notes])

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: Reconstructed, ctx: Context) -> bool:
        for name, values in decision.values.items():
            attribute(gm, name).copy_(values)
        return bool(decision.values)


def _outside(gm: IRModule, regions: Sequence[Region]) -> list[str]:
    """Return the names of masked layers that no region holds."""
    inside = {node for region in regions for node in region.nodes}
    return sorted({layer.name for layer in layers(gm) if layer.pattern is not None and layer.node not in inside})


def _told(outputs: Outputs) -> str:
    before, after = f"{outputs.before:.3g}", f"{outputs.after:.3g}"
    if not outputs.share:
        return f"taken back: the loss of the outputs on held-out images, {before}, did not fall"
    text = f"loss of the outputs {before} -> {after}"
    return text if outputs.share == 1 else f"{text} with {outputs.share:g} of all changes, which was better"


def _entry(name: str, kind: str, fit: Fit) -> Rebuilt:
    def finite(error: float | None) -> float | None:
        return error if error is not None and math.isfinite(error) else None

    before, after, held_before, held_after = map(finite, (fit.before, fit.after, fit.held_before, fit.held_after))
    return Rebuilt(name, kind, before, after, held_before, held_after, fit.reason)


def _held(region: Rebuilt) -> tuple[float, float]:
    """Return the errors of a trained region before and after, on held-out images if there are any."""
    held = region.held_before is not None and region.held_after is not None
    before, after = (region.held_before, region.held_after) if held else (region.before, region.after)
    return before or 0.0, after or 0.0
