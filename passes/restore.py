"""Restore: what was refitted behind the masks, and BatchNorm statistics that fit the pruned network.

Statistics are taken anew even if nothing is refitted: masks take variance away, most of it those that cost the outputs
least (a removed value takes its share of it along), and in a ResNet that adds up from layer to layer.

The values are refitted where the masks are chosen, layer by layer (pruning/refit.py, pruning/project.py): a mask and
its values are one decision, and later layers are fitted to what comes out. This pass in a pipeline asks for it; here
BatchNorm statistics follow, and the Plan gets the error of every layer before and after.
"""

from __future__ import annotations

from typing import Any

import torch

from mpcompile.calibration.stream import batch_norms
from mpcompile.ir.module import Imported, IRModule
from mpcompile.passes.base import Context, Pass
from mpcompile.pruning.project import reestimate


class Restore(Pass):
    """Refitted values and re-estimated BatchNorm statistics; needs calibration data."""

    name = "restore"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        done = {name: p.notes for name, p in ctx.projections.items() if "error_refitted" in p.notes}
        skipped = {name: p.notes["skipped"] for name, p in ctx.projections.items() if "skipped" in p.notes}
        requested = ctx.config.restore
        return {
            "requested": requested,
            "restored": sorted(done),
            "skipped": skipped,
            "error_masked": sum(n["error_masked"] for n in done.values()) / max(1, len(done)),
            "error_refitted": sum(n["error_refitted"] for n in done.values()) / max(1, len(done)),
            "norms": self._norms(gm, ctx),
        }

    def _norms(self, gm: IRModule, ctx: Context) -> str:
        """Where the statistics of BatchNorms come from, or why they stay."""
        if ctx.norms:
            return "in sequence"
        if not ctx.renorm or not ctx.projections:
            return "nothing was masked with data"
        if not batch_norms(gm):
            return "there are none"
        return "after" if ctx.again else "data can be read once only"

    def summary(self, decision: dict[str, Any]) -> str:
        count = len(decision["restored"])
        if not decision["requested"]:
            text = "off"
        elif not count:
            why = sorted(set(decision["skipped"].values()))
            text = "nothing refitted: " + ("; ".join(why) or "no layer was masked with data")
        else:
            text = f"{count} layers refitted, mean relative error {decision['error_masked']:.3g}"
            text += f" -> {decision['error_refitted']:.3g}"
            if decision["skipped"]:
                text += f", {len(decision['skipped'])} not"
        return text + (f", {decision['norm_count']} BatchNorms re-estimated" if decision.get("norm_count") else "")

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        for name, projection in ctx.projections.items():
            if projection.notes and name in ctx.plan.layers:
                ctx.plan.layers[name].notes["restore"] = projection.notes
        norms = ctx.norms
        if decision["norms"] == "after":
            norms = reestimate(Imported(gm, ctx.inputs, ctx.lifted, []), ctx)
        for node, (mean, variance) in norms.items():
            module: Any = gm.get_submodule(str(node.target))
            module.running_mean.copy_(mean)
            module.running_var.copy_(variance)
        decision["norm_count"] = len(norms)
        return bool(decision["restored"]) or bool(norms)
