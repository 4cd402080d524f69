"""FoldScale: fold a factor per output channel after a layer (LayerScale) into its weight and bias.

``gamma * (W x + b)`` equals ``(gamma W) x + gamma b``. Folded, the multiplication costs nothing, and the operation
after it, most often a residual addition, directly follows the product, where Fuse can absorb it. Scaling the rows of a
weight leaves its zeros where they are: a mask stays valid. Masked layers and dense linear ones are folded into;
Inductor folds what multiplies a dense convolution.

As in :mod:`mpcompile.passes.fold_norm`, the folded tensors are copies of the current values: the pass is for
graphs whose weights are final.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.ir.effects import storage, written_tensors
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import fake_value
from mpcompile.ir.view import LayerOp, layers
from mpcompile.passes.base import Context, Pass
from mpcompile.passes.rewriting import Folded, folded_call, follow, parameter, supersede

_aten = torch.ops.aten
_MUL = frozenset({operator.mul, operator.imul, torch.mul, torch.multiply, _aten.mul.Tensor, _aten.mul_.Tensor})
_IN_PLACE = (operator.imul, _aten.mul_.Tensor, "mul_")


def _multiplier(product: fx.Node, carrier: fx.Node) -> Any:
    """Return the operand that a node multiplies ``carrier`` by; None if the node does anything else."""
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
    """Return why a factor cannot be folded into a layer, or None."""
    weight = layer.weight.tensor
    axis = 1 if layer.kind == "linear" else 3  # the axis of channels, counted from the end
    sizes = tuple(factor.shape)[::-1]
    if any(size != 1 for place, size in enumerate(sizes, 1) if place != axis):
        return f"its factor of shape {tuple(factor.shape)} is not one per channel"
    if len(sizes) >= axis and sizes[axis - 1] not in (1, len(weight)):
        return f"its factor of shape {tuple(factor.shape)} is not one per channel"
    if factor.dtype != weight.dtype:
        return f"its factor is {factor.dtype}, its weight {weight.dtype}"
    return layer.obstacle


def _promotion(layer: LayerOp, product: fx.Node) -> str | None:
    """Return why a layer's dtype cannot be the product's, or None: under autocast, its output times fp32 is fp32."""
    before, after = fake_value(layer.node), fake_value(product)
    if isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype != after.dtype:
        return f"its output is {before.dtype}, and {after.dtype} once multiplied"
    return None


def _scaled(gm: IRModule, layer: LayerOp, ctx: Context) -> tuple[list[fx.Node], Tensor] | None:
    """Return the nodes from a layer to its product with a parameter, and that parameter; None if there is none."""
    idle, product = follow(gm, layer.node)
    chain = [layer.node, *idle]
    if product is None:
        return None
    factor = parameter(gm, _multiplier(product, chain[-1]), ctx.lifted)
    return None if factor is None else ([*chain, product], factor)


class FoldScale(Pass):
    """Masked or linear layer, then a parameter times its output -> the layer on tensors that the graph owns.

    Runs after FoldNorm and before Lower.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower
        >>> Pipeline([*Pipeline(), FoldScale(), Lower()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, skip_dead_tokens, fold_scale, lower])
    """

    name = "fold_scale"
    decision_type = Folded

    def plan(self, gm: IRModule, ctx: Context) -> Folded:
        found = [layer for layer in layers(gm, ctx.lifted) if layer.mask is not None or layer.kind == "linear"]
        names, changing = [layer.name for layer in found], written_tensors(gm, ctx.lifted)
        folded: list[str] = []
        left: dict[str, str] = {}
        for layer in found:
            scaled = _scaled(gm, layer, ctx)
            if scaled is None:
                continue
            chain, factor = scaled
            why = _obstacle(layer, factor) or _promotion(layer, chain[-1])
            if changing.intersection(storage(t) for t in (factor, layer.weight.tensor)):
                why = "the graph itself writes into its weight or its factor"
            elif names.count(layer.name) > 1:
                why = f"its weight is used {names.count(layer.name)} times"
            elif layer.bias is not None and parameter(gm, layer.bias, ctx.lifted) is None:
                why = "its bias is computed"
            if why is None:
                folded.append(layer.name)
            else:
                left[layer.name] = why
        return Folded(folded, left)

    def summary(self, decision: Folded) -> str:
        return f"{len(decision.folded)} scales folded, {len(decision.left)} left"

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: Folded, ctx: Context) -> bool:
        for layer in layers(gm, ctx.lifted):
            if layer.name in decision.folded:
                _fold(gm, layer, ctx)
        return bool(decision.folded)


def _fold(gm: IRModule, layer: LayerOp, ctx: Context) -> None:
    scaled = _scaled(gm, layer, ctx)
    assert scaled is not None  # plan() has checked it
    chain, factor = scaled
    weight, bias = layer.weight.tensor.detach(), parameter(gm, layer.bias, ctx.lifted)
    rows = factor.detach().double().reshape(-1)
    new_weight = (weight.double() * rows.reshape(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    new_bias = None if bias is None else (bias.detach().double() * rows).to(bias.dtype)
    new = folded_call(gm, layer, new_weight, new_bias)
    new.meta = dict(chain[-1].meta)
    supersede(gm.graph, chain, new)
