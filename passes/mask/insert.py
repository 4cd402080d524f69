"""Mask: choose N of every M values of each eligible weight, and fix the choice in the graph.

The scores are in pruning/scores.py. With calibration data, the masks are chosen one layer after another along the
graph, each from the outputs of the pruned layers before it, and the layers are refitted along the way if a later pass
requests that. With ``calibrate="dense"``, all masks come from one pass over the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpcompile.calibration.norms import batch_norms, own_statistics
from mpcompile.errors import GraphError
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument
from mpcompile.ir.parts import set_attribute
from mpcompile.ir.roles import roles
from mpcompile.ir.view import LayerOp, layers, unsupported
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.passes.accounts import owner_of
from mpcompile.passes.base import Allocated, Context, Dense, Pass, Request
from mpcompile.passes.mask.choice import ALREADY, Masked, Masks, choose
from mpcompile.passes.mask.eligibility import pattern_words, reason
from mpcompile.passes.mask.projector import Projector, uses_by_name
from mpcompile.passes.rewriting import masked_call
from mpcompile.plan import LayerPlan, is_lowered
from mpcompile.pruning.project import Projection


class Mask(Pass):
    """N:M masks on every eligible layer; the field ``exclude`` of :class:`mpcompile.Config` lists the exceptions."""

    name = "mask"
    decision_type = Masks
    provides = (Masked,)
    needs = (("mac_reduction", Allocated),)
    decides = True

    def check(self, gm: IRModule, ctx: Context) -> None:
        """Refuse another pattern for a layer that already has a mask, which it keeps; and refuse a lowered module.

        Raises:
            GraphError: names the layer, its pattern, and the pattern that was requested.
        """
        config, role = ctx.config, roles(gm, ctx.lifted)
        if config.pattern != "dense" and is_lowered(gm, ctx.plan):
            raise GraphError(
                "a lowered module cannot be masked: its weights are packed",
                expected="a module that is not lowered",
                found="packed weights",
                hint="transform the model that it was made from, then lower that",
            )
        for layer in layers(gm, ctx.lifted):
            if layer.pattern is None or reason(layer, role.get(layer.name), ctx) is not None:
                continue
            if config.mac_reduction is None and ctx.pattern_for(layer) == layer.pattern:
                continue
            requested = (
                pattern_words(config) if config.mac_reduction is None else f"mac_reduction={config.mac_reduction}"
            )
            raise GraphError(
                "this layer is already masked, and a second one could only choose from the values that the first left",
                layer=layer.name,
                expected=f"its pattern='{layer.pattern}', or pattern='dense' to leave all masks alone",
                found=requested,
                hint="for another pattern, transform the dense model, or name the layer in exclude",
            )

    @torch.no_grad()
    def plan(self, gm: IRModule, ctx: Context) -> Masks:
        choice = choose(gm, ctx)
        fell_back = sum(score == "magnitude" for score in choice.masked.values())
        projections, norms = Projector(gm, choice, ctx).run()
        return replace(
            choice,
            fell_back=fell_back if ctx.config.score != "magnitude" else 0,
            projections=projections,
            norms=norms,
        )

    def summary(self, decision: Masks) -> str:
        patterns = list(decision.patterns.values())
        parts = [f"{patterns.count(p)} layers {p}" for p in dict.fromkeys(patterns)]
        text = ", ".join([*(parts or [f"0 layers {decision.pattern}"]), f"{len(decision.dense)} dense"])
        if decision.fell_back:
            text += f"; no calibration data for {decision.fell_back}: score is magnitude"
        return text

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: Masks, ctx: Context) -> bool:
        uses = uses_by_name(gm, ctx)
        shapes = {name: shape for name, (shape, _) in unsupported(gm, ctx.lifted).items()}
        for name, why in decision.dense.items():
            if name not in uses:
                ctx.plan.layers[name] = LayerPlan("other", shapes[name], reason=why)
                continue
            layer = uses[name][0]
            entry = ctx.plan.layers.setdefault(name, LayerPlan(layer.kind, tuple(layer.weight.tensor.shape)))
            if why != ALREADY:
                entry.reason = why
        if Request.DENSE in ctx.requests:
            ctx.results.put(_dense(gm, [uses[name][0] for name in decision.projections]))
        for name, projection in decision.projections.items():
            self._mask_layer(gm, uses[name], projection, Pattern.parse(decision.patterns[name]), ctx)
        for name in uses:  # graph order, regardless of the order in which earlier passes added the layers
            for moved in filter(None, (owner_of(name, ctx.plan.layers), name)):
                ctx.plan.layers[moved] = ctx.plan.layers.pop(moved)
        ctx.results.put(Masked(decision.projections, decision.norms))
        return bool(decision.masked)

    def _mask_layer(
        self, gm: IRModule, uses: list[LayerOp], projection: Projection, pattern: Pattern, ctx: Context
    ) -> None:
        """Write a layer's values, put its mask into the graph, and record both in the Plan."""
        weight = uses[0].weight.tensor
        mask = projection.mask.to(weight.device)
        energy = weight.detach().square()  # before the masked values are set to zero
        kept = float((energy * mask).sum() / energy.sum().clamp(min=1e-30))
        if projection.weight is not None and ctx.writable(uses[0]):
            weight.copy_(projection.weight.to(weight.device).masked_fill(~mask, 0))
        for use in uses:
            self._mask_use(gm, use, mask, pattern, ctx)
        entry = ctx.plan.layers.setdefault(uses[0].name, LayerPlan(uses[0].kind, tuple(weight.shape)))
        entry.pattern, entry.density, entry.reason = str(pattern), pattern.density, None
        entry.notes["mask"] = {"score": projection.score, "kept_energy": kept}

    def _mask_use(self, gm: IRModule, use: LayerOp, mask: Tensor, pattern: Pattern, ctx: Context) -> None:
        """Replace one use of a layer by its masked module or operator."""
        node = use.node
        if node.op == "call_module":
            module = gm.get_submodule(use.name)
            if isinstance(module, (MaskedLinear, MaskedConv2d)):  # an earlier use of a shared layer
                return
            masked: MaskedLinear | MaskedConv2d
            if isinstance(module, torch.nn.Conv2d):
                masked = MaskedConv2d.from_conv(module, mask, pattern)
            else:
                masked = MaskedLinear.from_linear(module, mask, pattern)  # type: ignore[arg-type]
            set_attribute(gm, use.name, masked)
            if ctx.owned:
                masked.apply_mask()
            return
        if use.weight.owned:
            owner, _, leaf = use.weight.name.rpartition(".")
            buffer = "mask" if leaf == "weight" else f"{leaf}_mask"
            holder, path = gm.get_submodule(owner), f"{owner}.{buffer}".lstrip(".")
        else:
            buffer = path = "mask_" + use.name.replace(".", "_")
            holder = gm
        holder.register_buffer(buffer, mask)
        with gm.graph.inserting_before(node):
            weight = argument(node, 1, "weight")  # not use.weight.node: it may have been replaced
            new = masked_call(gm.graph, use, weight, gm.graph.get_attr(path), use.bias, pattern)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        if ctx.writable(use):
            use.weight.tensor.masked_fill_(~mask, 0)


def _dense(gm: IRModule, masked: Sequence[LayerOp]) -> Dense:
    """Return copies of what masks and re-estimated statistics are about to replace."""
    tensors = {use.weight.name: use.weight.tensor.detach().clone() for use in masked}
    for norm in batch_norms(gm):
        tensors |= {path: value.clone() for path, value in own_statistics(gm, norm).items()}
    return Dense(tensors)
