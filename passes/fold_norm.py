"""FoldNorm: fold a BatchNorm that follows a masked convolution into the convolution's weight and bias.

In inference a BatchNorm multiplies each channel by a factor and adds a shift. Inductor's freezing folds both into dense
convolutions, but cannot see into a packed weight, so they are folded here, before the weight is packed. Scaling the
rows of a weight leaves its zeros where they are: the mask stays valid.

The folded tensors are copies of the current values. The pass is for graphs whose weights are final.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.calibration.norms import TENSORS, call_of
from mpcompile.ir.effects import storage, written_tensors
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.parts import set_attribute
from mpcompile.ir.view import LayerOp, layers
from mpcompile.passes.base import Context, Pass
from mpcompile.passes.rewriting import Folded, folded_call, parameter, supersede

_MODULES = frozenset({"torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d"})


@dataclass(frozen=True)
class Norm:
    """A BatchNorm node: its tensors (None for those it lacks), and why it cannot be folded, or None."""

    mean: Tensor | None
    variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    obstacle: str | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.mean, self.variance, self.weight, self.bias) if t is not None]


def norm_of(gm: fx.GraphModule, node: fx.Node, lifted: Lifted) -> Norm | None:
    """Return the BatchNorm over the channels of images that a node computes, or None if it computes anything else."""
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        if f"{type(module).__module__}.{type(module).__qualname__}" not in _MODULES:
            return None
        operands = [getattr(module, key) for key in TENSORS]
        training, eps = module.training, module.eps
        obstacle = "its BatchNorm has hooks" if module._forward_hooks or module._forward_pre_hooks else None
    elif (call := call_of(gm, node)) is not None:
        operands, training, eps, obstacle = list(call.tensors.values()), call.training, call.eps, None
    else:
        return None
    tensors = [parameter(gm, value, lifted) for value in operands]
    mean, variance, weight, bias = tensors
    return Norm(mean, variance, weight, bias, eps, _norm_obstacle(operands, tensors, training, eps) or obstacle)


def _norm_obstacle(operands: Sequence[Any], tensors: Sequence[Tensor | None], training: Any, eps: Any) -> str | None:
    if training is not False:
        return "its BatchNorm is in training mode"
    if operands[0] is None or operands[1] is None:
        return "its BatchNorm has no running statistics"
    if any(value is not None and tensor is None for value, tensor in zip(operands, tensors, strict=True)):
        return "its BatchNorm's parameters are computed"
    if not isinstance(eps, (int, float)):
        return "its BatchNorm's eps varies from call to call"
    return None


class FoldNorm(Pass):
    """Masked convolution + BatchNorm in eval mode -> masked convolution on tensors that the graph owns.

    Runs before Lower. The layer keeps its name and its mask. The user's modules and parameters are not written.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower
        >>> Pipeline([*Pipeline(), FoldNorm(), Lower()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, skip_dead_tokens, fold_norm, lower])
    """

    name = "fold_norm"
    decision_type = Folded

    def plan(self, gm: IRModule, ctx: Context) -> Folded:
        convolutions = [layer for layer in layers(gm, ctx.lifted) if layer.kind == "conv2d"]
        names, changing = [layer.name for layer in convolutions], written_tensors(gm, ctx.lifted)
        folded: list[str] = []
        left: dict[str, str] = {}
        for layer in convolutions:
            norm = next((n for user in layer.node.users if (n := norm_of(gm, user, ctx.lifted)) is not None), None)
            if norm is None:
                continue
            why = self._obstacle(gm, layer, norm, names.count(layer.name), ctx)
            if why is None and changing.intersection(map(storage, (layer.weight.tensor, *norm.tensors))):
                why = "the graph itself writes into a tensor that would be folded"
            if why is None:
                folded.append(layer.name)
            else:
                left[layer.name] = why
        return Folded(folded, left)

    @staticmethod
    def _obstacle(gm: IRModule, layer: LayerOp, norm: Norm, uses: int, ctx: Context) -> str | None:
        """Return why a norm cannot be folded into a layer, or None."""
        if layer.pattern is None or layer.mask is None:
            return "not masked: Inductor folds it"
        if len(layer.node.users) > 1:
            return f"{len(layer.node.users)} users of its output"
        if uses > 1:
            return f"its weight is used {uses} times"
        if isinstance(layer.bias, fx.Node) and parameter(gm, layer.bias, ctx.lifted) is None:
            return "its bias is computed"
        return layer.obstacle or norm.obstacle

    def summary(self, decision: Folded) -> str:
        return f"{len(decision.folded)} BatchNorms folded, {len(decision.left)} left"

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: Folded, ctx: Context) -> bool:
        for layer in layers(gm, ctx.lifted):
            if layer.name in decision.folded:
                _fold(gm, layer, ctx.lifted)
        return bool(decision.folded)


def _fold(gm: IRModule, layer: LayerOp, lifted: Lifted) -> None:
    norm_node = next(iter(layer.node.users))
    norm = norm_of(gm, norm_node, lifted)
    assert norm is not None  # plan() has checked it
    weight, bias = _folded(layer.weight.tensor, parameter(gm, layer.bias, lifted), norm)
    new = end = folded_call(gm, layer, weight, bias)
    new.meta = dict(layer.node.meta)
    if norm_node.op == "call_module":
        end = _call_parts(gm, norm_node, end)
    supersede(gm.graph, [layer.node, norm_node], end)


def _folded(weight: Tensor, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return the folded weight and bias, computed in float64 and rounded to the weight's dtype."""
    assert norm.mean is not None and norm.variance is not None  # plan() leaves such a norm alone
    scale = (norm.variance.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.mean.double() if bias is None else bias.double() - norm.mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    scaled = weight.detach().double() * scale.view(-1, 1, 1, 1)
    return scaled.to(weight.dtype), shift.to(weight.dtype)


def _call_parts(gm: IRModule, norm: fx.Node, end: fx.Node) -> fx.Node:
    """Call the activation and dropout inside a norm's module (timm's BatchNormAct2d) on ``end``; return the last call.

    A module that nothing else calls is replaced by a holder of these parts alone.
    """
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
