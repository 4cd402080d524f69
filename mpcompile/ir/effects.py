"""Effects: nodes that do more than yield a value, so that no pass may move, merge or erase them.

torch.fx assumes that every method and every module is pure. In a model, ``h.mul_(0.1)``, ``F.relu(h, inplace=True)``,
``torch.add(x, y, out=h)`` and ``h[0] = 1`` are statements: later readers of ``h`` depend on them, although no edge of
the graph says so. :func:`explicit` adds the edges where it can.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import argument, dynamo_name, fake_value, target_name
from mpcompile.ir.parts import attribute, whole_of

AUGMENTED = {  # in-place operator (``h += 1`` writes into a tensor) -> the operator that returns a new result
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
UNDECIDED = "mpcompile.augmented"  # meta key of an in-place operator's node until :func:`settle` has looked at it
_IN_PLACE = frozenset({"setitem", *(function.__name__ for function in AUGMENTED)})
_SWITCHES = frozenset({"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode"})
_KNOWN = ("torch", "timm", "mpcompile", "operator", "_operator", "builtins", "math", "einops")


def switches(node: fx.Node) -> bool:
    """Return True if a node changes the mode in which later nodes run: autocast, or the recording of gradients."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _SWITCHES


def known(target: Any) -> bool:
    """Return True if a function or class comes from a library whose names show which functions write in place."""
    if isinstance(target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(target, (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)):
        return True
    return (getattr(target, "__module__", None) or "torch").split(".")[0] in _KNOWN


def written(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the inputs that a node is known to write into."""
    inputs = node.all_input_nodes
    if node.op == "call_module":
        inplace = any(getattr(part, "inplace", False) is True for part in gm.get_submodule(str(node.target)).modules())
        return inputs[:1] if inplace else []
    if node.op not in ("call_function", "call_method"):
        return []
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        marked = [(i, a) for i, a in enumerate(target._schema.arguments) if a.alias_info and a.alias_info.is_write]
        values: list[Any] = [argument(node, i, a.name) for i, a in marked]
        return [n for v in values for n in (v if isinstance(v, (tuple, list)) else [v]) if isinstance(n, fx.Node)]
    out = node.kwargs.get("out")
    if out is not None:
        return [n for n in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(n, fx.Node)]
    name = target_name(gm, node)
    flag = node.kwargs.get("inplace", False) is not False or any(a is True for a in node.args)  # F.relu(x, True)
    return inputs[:1] if flag or name in _IN_PLACE or name.endswith("_") else []


def writes(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if a node may write into one of its inputs, or change the mode of later nodes."""
    if node.op == "call_module":
        if not known(type(gm.get_submodule(str(node.target)))):
            return True
    elif node.op == "call_function" and not isinstance(node.target, torch._ops.OpOverload) and not known(node.target):
        return True
    return switches(node) or bool(written(gm, node))


def _place(value: Any) -> tuple[Any, ...] | None:
    """Return storage, offset, shape and strides of a fake tensor. Fake views share a storage, as real ones do."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return value.untyped_storage()._cdata, value.storage_offset(), tuple(value.shape), tuple(value.stride())


def explicit(gm: IRModule) -> bool:
    """Make readers of a tensor after an in-place statement read the result of that statement.

    The result is the same tensor: ``h.mul_(0.1); f(h)`` becomes ``f(h.mul_(0.1))``, so data flow implies the order.
    Statements that yield something else (``h[0] = 1``), and those on a view, stay as they are. The nodes must carry
    fake values.

    Returns:
        True if anything changed.
    """
    changed = False
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in gm.graph.nodes:
        place = _place(fake_value(node)) if node.op.startswith("call") else None
        if place is None:
            continue
        for source in written(gm, node):
            if _place(fake_value(source)) != place:
                continue
            for user in [u for u in source.users if order[u] > order[node]]:
                user.replace_input_with(source, node)
                changed = True
    return changed


def settle(gm: IRModule) -> bool:
    """Replace a traced ``h += 1`` by ``h = h + 1`` where neither ``h`` nor a view of it is read again.

    That is almost always the case, and leaves passes fewer forms to handle. The nodes must carry fake values.

    Returns:
        True if anything changed.
    """
    nodes = list(gm.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    storages = {node: {storage(t) for t in pytree.tree_leaves(fake_value(node)) if _place(t)} for node in nodes}
    changed = False
    for node in nodes:
        if not node.meta.pop(UNDECIDED, False):
            continue
        source, other = (fake_value(a) if isinstance(a, fx.Node) else a for a in node.args)
        if isinstance(source, Tensor):
            if _place(source) is None or torch.result_type(source, other) != source.dtype:
                continue
            before = [n for n in nodes[: order[node]] if storage(source) in storages[n]]
            if any(n.op == "get_attr" or any(order[user] > order[node] for user in n.users) for n in before):
                continue
        elif not isinstance(source, (int, float, tuple, torch.SymInt, torch.SymFloat)):
            continue
        node.target = AUGMENTED[node.target]
        changed = True
    return changed


def written_tensors(gm: IRModule, lifted: Lifted) -> set[int]:
    """Return the storages of parameters and buffers that the graph itself writes into, directly or through views."""
    held: dict[Any, Tensor] = {}
    for node in gm.graph.nodes:
        tensor = attribute(gm, str(node.target)) if node.op == "get_attr" else lifted.tensors.get(node.name)
        place = _place(fake_value(node))
        if isinstance(tensor, Tensor) and place is not None:
            held[place[0]] = tensor
    storages = set()
    for node in gm.graph.nodes:
        for source in written(gm, node):
            place = _place(fake_value(source))
            if place is not None and place[0] in held:
                storages.add(storage(held[place[0]]))
    return storages


def own_copies(gm: fx.GraphModule, values: Sequence[Any]) -> list[Any]:
    """Return inputs that are safe to run a graph on: copies if it writes in place, since it may write into its inputs.

    Parameters are passed as they are.
    """
    if not any(written(gm, node) for node in gm.graph.nodes):
        return list(values)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    held = (isinstance(v, torch.nn.Parameter) for v in values)
    return [
        v.clone() if isinstance(v, Tensor) and not parameter and dynamo_name(n) is None else v
        for n, v, parameter in zip(placeholders, values, held, strict=True)
    ]


def storage(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share memory."""
    return tensor.untyped_storage()._cdata


def erase_orphans(graph: fx.Graph, nodes: Iterable[fx.Node | None]) -> None:
    """Erase those of the given nodes that read an attribute, or take rows of a parameter, and have no user left.

    All other nodes stay: a node without users may be a statement.
    """
    stack = [node for node in dict.fromkeys(nodes) if node is not None and whole_of(node) is not None]
    while stack:
        node = stack.pop()
        if not node._erased and not node.users and node.op != "placeholder":
            stack += node.all_input_nodes  # the whole that it takes rows of
            graph.erase_node(node)


def erase_unread(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Erase those of the given nodes that nothing reads, and then those of their sources that nothing reads any more.

    Inputs and statements stay.
    """
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node._erased or node.users or node.op in ("placeholder", "output") or writes(gm, node):
            continue
        stack += node.all_input_nodes
        gm.graph.erase_node(node)
