"""FoldScale: a factor per output channel behind a masked layer (LayerScale) goes into its weight and bias.

``gamma * (W x + b)`` is ``(gamma W) x + gamma b``. Folded, the multiplication costs nothing, and what stands behind it,
most often a residual addition, is next to the product, where Fuse takes it in. Scaling rows of a weight leaves its
zeros where they are, so the mask stays valid.

As with :mod:`mpcompile.passes.fold_norm`, copies of the tensors as they are now are folded: for frozen graphs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.ir.effects import erase_orphans, storage, written_tensors
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument, fake_value
from mpcompile.ir.parts import FOLDED, keep
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels import ops
from mpcompile.passes.base import Context, Pass
from mpcompile.passes.fold_norm import parameter
from mpcompile.passes.fuse import follow

_aten = torch.ops.aten
_MUL = frozenset({operator.mul, operator.imul, torch.mul, torch.multiply, _aten.mul.Tensor, _aten.mul_.Tensor})
_IN_PLACE = (operator.imul, _aten.mul_.Tensor, "mul_")


def _factor(product: fx.Node, carrier: fx.Node) -> Any:
    """What a node multiplies ``carrier`` by; None where it does something else."""
    method = product.op == "call_method" and product.target in ("mul", "mul_", "multiply")
    if not method and (product.op != "call_function" or product.target not in _MUL):
        return None
    if len(product.args) != 2 or product.kwargs:
        return None
    first, second = product.args
    if first is carrier:
        return second
    return None if product.target in _IN_PLACE else first


def _obstacle(layer: LayerOp, factor: Tensor) -> str | None:
    """Why a factor can't go into a layer, or None."""
    weight = layer.weight.tensor
    axis = 1 if layer.kind == "linear" else 3  # of the channels, from the back
    sizes = tuple(factor.shape)[::-1]
    if any(size != 1 for place, size in enumerate(sizes, 1) if place != axis):
        return f"its factor of shape {tuple(factor.shape)} is not one a channel"
    if len(sizes) >= axis and sizes[axis - 1] not in (1, len(weight)):
        return f"its factor of shape {tuple(factor.shape)} is not one a channel"
    if factor.dtype != weight.dtype:
        return f"its factor is {factor.dtype}, its weight {weight.dtype}"
    return layer.obstacle


class FoldScale(Pass):
    """Masked layer, then a parameter times its output -> masked layer on tensors of the graph's own.

    Runs before Lower, and behind FoldNorm.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower
        >>> Pipeline([*Pipeline(), FoldScale(), Lower()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, fold_scale, lower])
    """

    name = "fold_scale"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        found = [layer for layer in layers(gm, ctx.lifted) if layer.mask is not None]
        names, changing = [layer.name for layer in found], written_tensors(gm, ctx.lifted)
        decision: dict[str, Any] = {"folded": [], "left": {}}
        for layer in found:
            factor = self._behind(gm, layer, ctx)
            if factor is None:
                continue
            why = _obstacle(layer, factor) or self._changed(gm, layer)
            if changing.intersection(storage(t) for t in (factor, layer.weight.tensor)):
                why = "the graph itself writes into it"
            elif names.count(layer.name) > 1:
                why = f"its weight is used {names.count(layer.name)} times"
            elif layer.bias is not None and parameter(gm, layer.bias, ctx.lifted) is None:
                why = "its bias is computed"
            if why is None:
                decision["folded"].append(layer.name)
            else:
                decision["left"][layer.name] = why
        return decision

    @staticmethod
    def _changed(gm: IRModule, layer: LayerOp) -> str | None:
        """Why the layer can't yield the product: under autocast, the product of its output and fp32 is fp32 again."""
        _, product = follow(gm, layer.node)
        before, after = (fake_value(n) if n is not None else None for n in (layer.node, product))
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype != after.dtype:
            return f"it yields {before.dtype}, and {after.dtype} behind the factor"
        return None

    @staticmethod
    def _behind(gm: IRModule, layer: LayerOp, ctx: Context) -> Tensor | None:
        """The parameter that the layer's output is multiplied by, or None."""
        idle, user = follow(gm, layer.node)
        return None if user is None else parameter(gm, _factor(user, [layer.node, *idle][-1]), ctx.lifted)

    def summary(self, decision: dict[str, Any]) -> str:
        return f"{len(decision['folded'])} scales folded, {len(decision['left'])} left"

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        for layer in layers(gm, ctx.lifted):
            if layer.name in decision["folded"]:
                self._fold(gm, layer, ctx)
        return bool(decision["folded"])

    def _fold(self, gm: IRModule, layer: LayerOp, ctx: Context) -> None:
        graph, node, weight = gm.graph, layer.node, layer.weight.tensor.detach()
        factor, bias = self._behind(gm, layer, ctx), parameter(gm, layer.bias, ctx.lifted)
        idle, product = follow(gm, node)
        assert factor is not None and product is not None and layer.pattern is not None  # as plan() found them
        rows = factor.detach().double().reshape(-1)
        scaled = (weight.double() * rows.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        with graph.inserting_before(node):
            values, shift = self._keep(gm, f"{FOLDED}.{layer.name}", "weight", scaled), None
            if bias is not None:
                moved = (bias.detach().double() * rows).to(bias.dtype)
                shift = self._keep(gm, f"{FOLDED}_bias.{layer.name}", "bias", moved)
            mask = graph.get_attr(f"{layer.name}.mask") if node.op == "call_module" else node.args[2]
            head = (argument(node, 0, "input"), values, mask, shift)
            if (g := layer.geometry) is None:
                new = graph.call_function(ops.masked_linear, (*head, *layer.pattern))
            else:
                axes = (g.stride, g.padding, g.dilation, g.groups)
                new = graph.call_function(ops.masked_conv2d, (*head, *axes, *layer.pattern))
        new.meta = dict(product.meta)
        product.replace_all_uses_with(new)
        read = [*product.all_input_nodes, *node.all_input_nodes]
        for gone in [product, *reversed(idle), node]:
            graph.erase_node(gone)
        erase_orphans(graph, read)

    @staticmethod
    def _keep(gm: IRModule, path: str, key: str, tensor: Tensor) -> fx.Node:
        keep(gm, path, {key: tensor})
        return gm.graph.get_attr(f"{path}.{key}")
