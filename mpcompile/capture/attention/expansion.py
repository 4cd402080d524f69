"""Rewrite every attention of an imported graph in its functional form."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn

from mpcompile.capture.attention.functions import REWRITES
from mpcompile.capture.attention.modules import Expander, Unsupported, is_attention
from mpcompile.capture.attention.views import untangle
from mpcompile.ir.module import Imported, IRModule
from mpcompile.ir.nodes import fake_value
from mpcompile.ir.parts import set_attribute
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import LEFT_WHOLE


def expand_attention(imported: Imported) -> None:
    """Rewrite calls that hide an attention, so that its projections are layers of the graph.

    These are modules of torch.nn (``nn.MultiheadAttention``, encoders and decoders), the function behind them, and
    torch's fused kernels, as dynamo and torch.export record them. Weights keep their names and values. A call that has
    no functional form here stays as it is, and its node says why.
    """
    gm = imported.gm
    if untangle(imported):
        gm.graph.lint()
        gm.recompile()
    calls = [node for node in gm.graph.nodes if _hides_attention(gm, node)]
    if not calls:
        return
    expand = Expander(gm)
    for node in calls:
        if any(not isinstance(fake_value(source), Tensor) for source in node.all_input_nodes):
            propagate(gm, imported.inputs)  # also where a source is the result of a call rewritten before
        _rewrite(expand, node)
    for node in gm.graph.nodes:
        if node.op == "call_module" and str(node.target) in expand.left:
            node.meta[LEFT_WHOLE] = expand.left[str(node.target)]
    _release(gm, expand.expanded)
    imported.notes += expand.notes
    gm.graph.lint()
    gm.recompile()


def _hides_attention(gm: IRModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return is_attention(gm.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target in REWRITES


def _rewrite(expand: Expander, node: fx.Node) -> None:
    """Rewrite one call, or leave the graph as it was and note why on the node."""
    graph = expand.gm.graph
    before, made = set(graph.nodes), dict(expand.masks.made)
    expand.wants_weights = any(u.target is not operator.getitem or (u.args[1] != 0 and u.users) for u in node.users)
    args, kwargs = expand.proxy((node.args, node.kwargs))
    try:
        with graph.inserting_before(node):
            expand.enter(node.all_input_nodes)
            if node.op == "call_module":
                results = expand.call(str(node.target), *args, **kwargs)
                if str(node.target) in expand.left:
                    raise Unsupported(expand.left[str(node.target)])
            else:
                results = REWRITES[node.target](expand, args, kwargs)
    except Unsupported as error:
        expand.masks.made = made
        for new in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(new)
        expand.undo()
        node.meta[LEFT_WHOLE] = str(error)
        return
    expand.done()
    _replace(node, fx.node.map_aggregate(results, lambda v: v.node if isinstance(v, fx.Proxy) else v))


def _replace(node: fx.Node, results: Any) -> None:
    """Let the users of a call read its results: a node, or several nodes or None."""
    if isinstance(results, fx.Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            if user.target is operator.getitem and user.args[0] is node and isinstance(user.args[1], int):
                if user.users:
                    _substitute(user, results[user.args[1]])
                node.graph.erase_node(user)
        _substitute(node, results)
    node.graph.erase_node(node)


def _substitute(node: fx.Node, value: Any) -> None:
    """Put a value in the place of a node in all calls that read it."""
    for reader in list(node.users):
        reader.args = fx.node.map_arg(reader.args, lambda n: value if n is node else n)
        reader.kwargs = fx.node.map_arg(reader.kwargs, lambda n: value if n is node else n)


def _release(gm: IRModule, paths: set[str]) -> None:
    """Replace rewritten modules, which are not called any more, by plain holders of their tensors and layers."""
    calls = [gm.get_submodule(str(node.target)) for node in gm.graph.nodes if node.op == "call_module"]
    # With all that is inside: another call of the same module may have stayed whole.
    called = {id(part) for module in calls for part in module.modules()}
    holders: dict[int, nn.Module] = {}
    for path in sorted(paths):  # a module comes before those inside it
        try:
            module = gm.get_submodule(path)
        except AttributeError:  # a second name of a module that has been replaced
            continue
        if id(module) not in called and type(module) is not nn.Module:
            set_attribute(gm, path, _holder(module, called, holders))


def _holder(module: nn.Module, called: set[int], holders: dict[int, nn.Module]) -> nn.Module:
    if id(module) in called:
        return module
    if id(module) not in holders:
        holder = holders[id(module)] = nn.Module()
        holder.training = module.training
        holder._parameters.update(module._parameters)
        holder._buffers.update(module._buffers)
        holder._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        for key, child in module._modules.items():
            holder.add_module(key, None if child is None else _holder(child, called, holders))
    return holders[id(module)]
