"""Packed weights in a saved graph: the numbers and contents that kernels rely on, and the nodes that may read them.

A kernel trusts the numbers of its node and the index of its values. Both come from the file, so both are checked
when it is loaded. No other node may read a packed tensor, because it could write to it before the kernel reads it.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from mpcompile.artifact.opset import Refusal
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule
from mpcompile.ir.parts import attribute
from mpcompile.kernels import ops
from mpcompile.kernels.nm_linear import checks

_HINT = "save the module again"


def check_packed(gm: IRModule) -> None:
    """Check the native operators of a graph and the packed tensors that they read.

    Raises:
        Refusal: a number, a tensor or an index that would make a kernel read out of bounds, or a packed tensor that
            something else reads; the node is named.
    """
    packed: dict[int, str] = {}
    for node in gm.graph.nodes:
        for weight in _weights(node):
            tensors = []
            for source in (weight.values, weight.index):
                if getattr(source, "op", None) != "get_attr":
                    raise Refusal(f"node {node.name} computes its packed weights", expected="tensors of the file")
                tensors.append(attribute(gm, str(source.target)))
                packed[_memory(tensors[-1])] = str(source.target)
            if any(tensor.is_meta for tensor in tensors):  # saving tests its texts without tensor contents
                continue
            try:
                checks.contents(weight, *tensors)
            except InputError as error:
                raise Refusal(f"node {node.name}: {error}", hint=_HINT) from error
    _check_readers(gm, packed)


def _weights(node: fx.Node) -> list[checks.PackedWeight]:
    try:
        return ops.packed_arguments(node)
    except InputError as error:
        raise Refusal(f"node {node.name}: {error}") from error


def _memory(tensor: Tensor) -> int:
    """Return the identity of a tensor's memory, which all its names and views share."""
    return int(tensor.untyped_storage()._cdata)


def _check_readers(gm: IRModule, packed: dict[int, str]) -> None:
    for node in gm.graph.nodes:
        if node.op == "get_attr" and _memory(attribute(gm, str(node.target))) in packed:
            for user in node.users:
                slots = [source for weight in _weights(user) for source in weight[:2]]
                if sum(source is node for source in slots) != _uses(node, user):
                    raise Refusal(
                        f"node {user.name} reads {node.target}, a packed weight",
                        expected="only mpcompile's own operators to read it, as values or index",
                        hint=_HINT,
                    )
    for path, module in gm.named_modules():
        own = (*module._parameters.values(), *module._buffers.values())
        if module is not gm and type(module) is not nn.Module:
            held = next((packed[_memory(t)] for t in own if t is not None and _memory(t) in packed), None)
            if held is not None:
                raise Refusal(f"layer {path} holds {held}, a packed weight", hint=_HINT)


def _uses(node: fx.Node, user: fx.Node) -> int:
    """Count how often a node is among the arguments of another."""
    matches: list[bool] = []
    fx.node.map_arg((user.args, user.kwargs), lambda source: matches.append(source is node))
    return sum(matches)
