"""FoldNorm: a BatchNorm behind a masked convolution goes into the convolution's weight and bias.

In inference a BatchNorm multiplies each channel and adds to it. Inductor's freezing folds that into dense
convolutions, but can't look into a packed weight. Here it happens before the weight is packed. Scaling the rows of a
weight leaves its zeros where they are, so the mask stays valid.

What is folded is a copy of the tensors as they are now: for graphs whose weights nobody changes any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.ir.effects import erase_orphans, storage, written_tensors
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import argument
from mpcompile.ir.parts import FOLDED, attribute, keep, set_attribute
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels import ops
from mpcompile.passes.base import Context, Pass

_MODULES = frozenset({"torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d"})
_TORCH_ORDER = frozenset({torch.batch_norm, torch.ops.aten.batch_norm.default})
_TENSORS = ("running_mean", "running_var", "weight", "bias")
_PLACES, _TORCH_PLACES = (1, 2, 3, 4), (3, 4, 1, 2)

_ROOTS = ((FOLDED, "weight"), (f"{FOLDED}_bias", "bias"))  # apart, so that Lower can drop the weight alone


@dataclass(frozen=True)
class Norm:
    """A BatchNorm node: its tensors (None where it has none), and why it can't be folded, or None."""

    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    obstacle: str | None = None


def parameter(gm: fx.GraphModule, value: Any, lifted: Lifted) -> Tensor | None:
    """The parameter or buffer that a node brings in, or that a module holds."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        value = attribute(gm, str(value.target))
    elif isinstance(value, fx.Node):
        value = lifted.tensors.get(value.name) if value.op == "placeholder" else None
    return value if isinstance(value, Tensor) else None


def norm_of(gm: fx.GraphModule, node: fx.Node, lifted: Lifted) -> Norm | None:
    """A node as a BatchNorm over the channels of images, or None where it is something else."""
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        if f"{type(module).__module__}.{type(module).__qualname__}" not in _MODULES:
            return None
        given = [getattr(module, key) for key in _TENSORS]
        training, eps = module.training, module.eps
        obstacle = "its BatchNorm has hooks" if module._forward_hooks or module._forward_pre_hooks else None
    elif node.op == "call_function" and (node.target is F.batch_norm or node.target in _TORCH_ORDER):
        places = _TORCH_PLACES if node.target in _TORCH_ORDER else _PLACES
        given = [argument(node, place, key) for place, key in zip(places, _TENSORS, strict=True)]
        training, eps = argument(node, 5, "training", False), argument(node, 7, "eps", 1e-5)
        obstacle = None
    else:
        return None
    tensors = [parameter(gm, value, lifted) for value in given]
    if training is not False:
        obstacle = "its BatchNorm is in training mode"
    elif given[0] is None or given[1] is None:
        obstacle = "its BatchNorm has no running statistics"
    elif any(value is not None and tensor is None for value, tensor in zip(given, tensors, strict=True)):
        obstacle = "its BatchNorm's parameters are computed"
    elif not isinstance(eps, (int, float)):
        obstacle = "its BatchNorm's eps varies from call to call"
    mean, variance, weight, bias = tensors
    return Norm(mean, variance, weight, bias, eps, obstacle)


class FoldNorm(Pass):
    """Masked convolution + BatchNorm in eval mode -> masked convolution on tensors of the graph's own.

    Runs before Lower. The layer keeps its name and its mask; neither module nor parameter of the user is written.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower
        >>> Pipeline([*Pipeline(), FoldNorm(), Lower()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, fold_norm, lower])
    """

    name = "fold_norm"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        found = [layer for layer in layers(gm, ctx.lifted) if layer.kind == "conv2d"]
        names, changing = [layer.name for layer in found], written_tensors(gm, ctx.lifted)
        decision: dict[str, Any] = {"folded": [], "left": {}}
        for layer in found:
            norms = [norm for user in layer.node.users if (norm := norm_of(gm, user, ctx.lifted)) is not None]
            if not norms:
                continue
            why = self._refusal(gm, layer, norms[0], names.count(layer.name), ctx)
            held = (layer.weight.tensor, *(getattr(norms[0], key) for key in ("mean", "variance", "weight", "bias")))
            if why is None and changing.intersection(storage(t) for t in held if t is not None):
                why = "the graph itself writes into what would be folded"
            if why is None:
                decision["folded"].append(layer.name)
            else:
                decision["left"][layer.name] = why
        return decision

    @staticmethod
    def _refusal(gm: IRModule, layer: LayerOp, norm: Norm, uses: int, ctx: Context) -> str | None:
        if layer.pattern is None or layer.mask is None:
            return "not masked: Inductor folds it"
        if len(layer.node.users) > 1:
            return f"{len(layer.node.users)} users of its output"
        if uses > 1:
            return f"its weight is used {uses} times"
        if isinstance(layer.bias, fx.Node) and parameter(gm, layer.bias, ctx.lifted) is None:
            return "its bias is computed"
        return layer.obstacle or norm.obstacle

    def summary(self, decision: dict[str, Any]) -> str:
        return f"{len(decision['folded'])} BatchNorms folded, {len(decision['left'])} left"

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        for layer in layers(gm, ctx.lifted):
            if layer.name in decision["folded"]:
                self._fold(gm, layer, ctx.lifted)
        return bool(decision["folded"])

    def _fold(self, gm: IRModule, layer: LayerOp, lifted: Lifted) -> None:
        graph, node, geometry = gm.graph, layer.node, layer.geometry
        after = next(iter(node.users))
        norm = norm_of(gm, after, lifted)
        assert norm is not None and geometry is not None and layer.pattern is not None  # as plan() found them
        folded = self._tensors(layer.weight.tensor, parameter(gm, layer.bias, lifted), norm)
        with graph.inserting_before(node):
            weight, bias = (self._keep(gm, f"{root}.{layer.name}", key, folded[key]) for root, key in _ROOTS)
            mask = graph.get_attr(f"{layer.name}.mask") if node.op == "call_module" else node.args[2]
            axes = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
            args = (argument(node, 0, "input"), weight, mask, bias, *axes, *layer.pattern)
            new = end = graph.call_function(ops.masked_conv2d, args)
        new.meta = dict(node.meta)
        if after.op == "call_module":  # timm's BatchNormAct2d does more than its name says first
            end = self._parts(gm, after, end)
        after.replace_all_uses_with(end)
        read = [*after.all_input_nodes, *node.all_input_nodes]
        graph.erase_node(after)
        graph.erase_node(node)
        erase_orphans(graph, read)

    @staticmethod
    def _parts(gm: IRModule, norm: fx.Node, end: fx.Node) -> fx.Node:
        """Calls of what stands behind a norm in one module with it; such a module then holds these parts alone."""
        module, parts = gm.get_submodule(str(norm.target)), nn.Module()
        for key in ("drop", "act"):
            part = getattr(module, key, None)
            if part is not None and not isinstance(part, nn.Identity):
                parts.add_module(key, part)
                with gm.graph.inserting_before(norm):
                    end = gm.graph.call_module(f"{norm.target}.{key}", (end,))
                end.meta = dict(norm.meta)
        called = [n for n in gm.graph.nodes if n.op == "call_module" and gm.get_submodule(str(n.target)) is module]
        if parts._modules and called == [norm]:
            set_attribute(gm, str(norm.target), parts.train(module.training))
        return end

    @staticmethod
    def _tensors(weight: Tensor, bias: Tensor | None, norm: Norm) -> dict[str, Tensor]:
        """The folded weight and bias, computed in float64 and kept in the weight's dtype."""
        assert norm.mean is not None and norm.variance is not None  # plan() leaves such a norm alone
        scale = (norm.variance.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
        scaled = weight.detach().double() * scale.view(-1, 1, 1, 1)
        return {"weight": scaled.to(weight.dtype), "bias": shift.to(weight.dtype)}

    @staticmethod
    def _keep(gm: IRModule, path: str, key: str, tensor: Tensor) -> fx.Node:
        keep(gm, path, {key: tensor})
        return gm.graph.get_attr(f"{path}.{key}")
