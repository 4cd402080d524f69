"""Restore: refitted values for masked weights, and BatchNorm statistics that match the pruned network.

Statistics are re-estimated even if nothing is refitted. Masks reduce the variance of the outputs, most of all those
chosen for the smallest error (a removed value takes its share of the variance with it); in a ResNet these reductions
add up from layer to layer.

Values are refitted where the masks are chosen, layer by layer (pruning/refit.py, pruning/project.py): a mask and its
values are one decision, and later layers are fitted to the result. This pass requests both from Mask. It adds the
BatchNorm statistics, and records in the Plan the error of every layer before and after the refit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcompile.calibration.norms import Statistics, batch_norms, write
from mpcompile.ir.module import IRModule
from mpcompile.passes.base import UNRECORDED, Context, Decision, Pass, Request
from mpcompile.passes.mask import Masked
from mpcompile.pruning.project import reestimate


@dataclass(frozen=True, eq=False)
class Restored(Decision):
    """Refitted layers and re-estimated BatchNorms.

    Attributes:
        requested: False if the options switch refitting off.
        restored: names of the refitted layers, sorted.
        skipped: layer name -> why it was not refitted.
        error_masked, error_refitted: mean relative error of the outputs of refitted layers, before and after.
        norms: where the BatchNorm statistics come from, or why they are left unchanged.
        norm_count: number of BatchNorms that get new statistics.
        layers: layer name -> its notes in the Plan.
        statistics: running statistics of BatchNorms, by their paths.
    """

    requested: bool
    restored: list[str]
    skipped: Mapping[str, str]
    error_masked: float
    error_refitted: float
    norms: str
    norm_count: int
    layers: Mapping[str, Any] = field(default_factory=dict, metadata=UNRECORDED)
    statistics: Statistics = field(default_factory=dict, metadata=UNRECORDED)


class Restore(Pass):
    """Refitted values and re-estimated BatchNorm statistics; needs calibration data."""

    name = "restore"
    decision_type = Restored
    requests = frozenset({Request.REFIT, Request.NORMS})

    @torch.no_grad()
    def plan(self, gm: IRModule, ctx: Context) -> Restored:
        masked = ctx.results.get(Masked) or Masked()
        notes = {name: projection.notes for name, projection in masked.projections.items() if projection.notes}
        refitted = {name: note for name, note in notes.items() if "error_refitted" in note}
        source, statistics = self._source(gm, ctx, masked), masked.norms
        if source == "after":
            assert ctx.calibration is not None  # checked by _source()
            statistics = reestimate(ctx.imported(gm), ctx.calibration, ctx.calibration.memory)
        return Restored(
            requested=ctx.config.restore,
            restored=sorted(refitted),
            skipped={name: note["skipped"] for name, note in notes.items() if "skipped" in note},
            error_masked=sum(note["error_masked"] for note in refitted.values()) / max(1, len(refitted)),
            error_refitted=sum(note["error_refitted"] for note in refitted.values()) / max(1, len(refitted)),
            norms=source,
            norm_count=len(statistics) // 2,
            layers=notes,
            statistics=statistics,
        )

    @staticmethod
    def _source(gm: IRModule, ctx: Context, masked: Masked) -> str:
        """Return where the statistics of BatchNorms come from, or why they are left unchanged."""
        if masked.norms:
            return "in sequence"
        if not ctx.renorm or not masked.projections:
            return "nothing was masked with data"
        if not batch_norms(gm):
            return "there are none"
        rereadable = ctx.calibration is not None and ctx.calibration.rereadable
        return "after" if rereadable else "data can be read once only"

    def summary(self, decision: Restored) -> str:
        if not decision.requested:
            text = "off"
        elif not decision.restored:
            why = sorted(set(decision.skipped.values()))
            text = "nothing refitted: " + ("; ".join(why) or "no layer was masked with data")
        else:
            text = f"{len(decision.restored)} layers refitted, mean relative error {decision.error_masked:.3g}"
            text += f" -> {decision.error_refitted:.3g}"
            if decision.skipped:
                text += f", {len(decision.skipped)} not"
        return text + (f", {decision.norm_count} BatchNorms re-estimated" if decision.norm_count else "")

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: Restored, ctx: Context) -> bool:
        for name, notes in decision.layers.items():
            if name in ctx.plan.layers:
                ctx.plan.layers[name].notes["restore"] = dict(notes)
        write(gm, decision.statistics)
        return bool(decision.restored) or bool(decision.statistics)
