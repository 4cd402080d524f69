"""Rewriting: helpers of several passes that find calls in a graph and replace them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.ir.effects import erase_orphans
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import argument
from mpcompile.ir.parts import FOLDED, keep
from mpcompile.ir.view import LayerOp, parameter_read
from mpcompile.kernels import ops, schema
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import number
from mpcompile.passes.base import Decision

_DROPOUT = frozenset({F.dropout, torch.dropout, torch.ops.aten.dropout.default})
_DROPOUT_MODULES = {"torch.nn.modules.dropout.Dropout": "p", "timm.layers.drop.DropPath": "drop_prob"}


def parameter(gm: fx.GraphModule, value: Any, lifted: Lifted) -> Tensor | None:
    """Return the parameter, buffer or rows of one that a node reads or a module holds; None for anything computed."""
    if isinstance(value, fx.Node):
        ref = parameter_read(gm, value, lifted)
        return None if ref is None else ref.tensor
    return value if isinstance(value, Tensor) else None


def exact_class(module: nn.Module) -> str | None:
    """Return the qualified name of a module's class, or None if it has hooks, which may change its result."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    return f"{type(module).__module__}.{type(module).__qualname__}"


def does_nothing(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if a node yields its input: an identity, or dropout that is off."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        name = exact_class(module) or ""
        if name in _DROPOUT_MODULES:
            return not module.training or not getattr(module, _DROPOUT_MODULES[name])
        return name == "torch.nn.modules.linear.Identity"
    if node.op != "call_function" or node.target not in _DROPOUT:
        return False
    p, on = argument(node, 1, "p", 0.5), argument(node, 2, "training", node.kwargs.get("train", True))
    return number(gm, p) == 0 or number(gm, on) in (False, 0)


def follow(gm: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """Walk from a node along single users past those that do nothing.

    Returns:
        The users that do nothing, and the first one that does something, or None if several users branch off before.
    """
    idle: list[fx.Node] = []
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not does_nothing(gm, user) or argument(user, 0, "input") is not node:
            return idle, user
        idle.append(user)
        node = user
    return idle, None


def supersede(graph: fx.Graph, chain: Sequence[fx.Node], new: fx.Node) -> None:
    """Let the users of a chain's last node read ``new``; erase the chain, and attributes that only it read.

    Args:
        chain: nodes in graph order, each but the last read by its successor alone.
    """
    sources = [*chain[-1].all_input_nodes, *chain[0].all_input_nodes]
    chain[-1].replace_all_uses_with(new)
    for node in reversed(chain):
        graph.erase_node(node)
    for node in sources:  # a ByMode, such as the training flag of a BatchNorm
        if node.op == "call_module" and not node.all_input_nodes and not node.users and not node._erased:
            graph.erase_node(node)
    erase_orphans(graph, sources)


def fold_read(read: fx.Node, constant: Any) -> None:
    """Replace a node by a constant in the arguments of its users."""

    def fold(node: fx.Node) -> Any:
        return constant if node is read else node

    for user in list(read.users):
        user.args = fx.node.map_arg(user.args, fold)
        user.kwargs = fx.node.map_arg(user.kwargs, fold)


@dataclass(frozen=True, eq=False)
class Folded(Decision):
    """Names of the layers that another call is folded into; and layers left as they are -> why."""

    folded: list[str]
    left: Mapping[str, str]


def masked_call(graph: fx.Graph, layer: LayerOp, weight: Any, mask: Any, bias: Any, pattern: Pattern) -> fx.Node:
    """Call a layer's masked operator on other operands, at the graph's insertion point.

    Args:
        weight, mask, bias: nodes; the bias may be None.
    """
    x, (n, m) = argument(layer.node, 0, "input"), pattern  # not layer.input: it may have been replaced
    if (g := layer.geometry) is None:
        linear = schema.MaskedLinearArgs(x, weight, mask, bias, n, m)
        return graph.call_function(ops.masked_linear, tuple(linear))
    conv = schema.MaskedConv2dArgs(x, weight, mask, bias, g.stride, g.padding, g.dilation, g.groups, n, m)
    return graph.call_function(ops.masked_conv2d, tuple(conv))


def folded_call(gm: IRModule, layer: LayerOp, weight: Tensor, bias: Tensor | None) -> fx.Node:
    """Insert a call of a masked layer, or of a dense linear one, on new tensors, which the graph then owns.

    It stands before the layer's own call, which the caller replaces. The mask, the input and the layer's name stay.
    """
    assert layer.pattern is not None or layer.kind == "linear"  # no other layers are folded into
    with gm.graph.inserting_before(layer.node):
        new_weight = _owned(gm, f"{FOLDED}.{layer.name}", "weight", weight)
        # Stored apart from the weight, so that Lower can drop the weight alone.
        new_bias = None if bias is None else _owned(gm, f"{FOLDED}_bias.{layer.name}", "bias", bias)
        if layer.pattern is None:
            x = argument(layer.node, 0, "input")
            return gm.graph.call_function(F.linear, (x, new_weight, new_bias))
        module = layer.node.op == "call_module"
        mask = gm.graph.get_attr(f"{layer.name}.mask") if module else schema.bind(layer.node).mask
        return masked_call(gm.graph, layer, new_weight, mask, new_bias, layer.pattern)


def _owned(gm: IRModule, path: str, key: str, tensor: Tensor) -> fx.Node:
    keep(gm, path, {key: tensor})
    return gm.graph.get_attr(f"{path}.{key}")
