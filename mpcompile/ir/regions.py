"""Regions: parts of a graph that torch.compile and torch.export hold as separate graphs inside an operator.

A region that only sets how its nodes run (activation checkpointing, autocast, recording of gradients) is inlined into
the surrounding graph, so that passes see its layers. Tags on the nodes preserve checkpointing: AOTAutograd recomputes
tagged nodes in the backward pass. Branches and loops stay whole; :func:`mpcompile.ir.view.unsupported` reports their
weights.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.amp import autocast_mode
from torch.utils.checkpoint import CheckpointPolicy

CHECKPOINT, AUTOCAST, GRAD = "tag_activation_checkpoint", "wrap_with_autocast", "wrap_with_set_grad_enabled"
_BODY = {CHECKPOINT: 0, "wrap": 0, GRAD: 1, "invoke_subgraph": 0, AUTOCAST: 4}  # argument with an operator's graph
_OPERANDS = {"invoke_subgraph": 2}  # argument with the graph's first operand, if not the one after the graph
_OPTIONS = frozenset({"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"})


def opaque(node: fx.Node) -> str | None:
    """Return the name of a higher-order operator, which holds graphs of its own, or None for any other node."""
    target = node.target
    return str(target.name()) if isinstance(target, torch._ops.HigherOrderOperator) else None


def _inside(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that a node holds if it can be inlined, or None."""
    name = opaque(node)
    if name not in _BODY or not _OPTIONS.issuperset(node.kwargs):
        return None  # other options set a policy for each operator, or are inputs of the graph
    body = node.args[_BODY[name]]
    if not isinstance(body, fx.Node) or body.op != "get_attr":
        return None
    if any(user.target is not operator.getitem for user in node.users):
        return None
    module = gm.get_submodule(str(body.target))
    return module if isinstance(module, fx.GraphModule) else None


def _enter(graph: fx.Graph, node: fx.Node) -> Any:
    """Insert the nodes that enter the mode of a region, and return the node that :func:`_leave` needs, if any."""
    name = opaque(node)
    if name == AUTOCAST:
        return graph.call_function(autocast_mode._enter_autocast, tuple(node.args[:4]))
    if name != GRAD:
        return None
    before = graph.call_function(torch.is_grad_enabled)
    graph.call_function(torch._C._set_grad_enabled, (node.args[0],))
    return before


def _leave(graph: fx.Graph, node: fx.Node, mode: Any) -> None:
    name = opaque(node)
    if name == AUTOCAST:
        graph.call_function(autocast_mode._exit_autocast, (mode,))
    elif name == GRAD:
        graph.call_function(torch._C._set_grad_enabled, (mode,))


def _inline(gm: fx.GraphModule, node: fx.Node, inner: fx.GraphModule, number: int) -> None:
    """Replace ``node`` by the nodes of ``inner``."""
    graph, name = gm.graph, opaque(node) or ""
    body: Any = node.args[_BODY[name]]
    operands = node.args[_OPERANDS.get(name, _BODY[name] + 1) :]
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    copies: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
    with graph.inserting_before(node):
        mode = _enter(graph, node)
        for old in inner.graph.nodes:
            if old.op in ("placeholder", "output"):
                continue
            new = copies[old] = graph.node_copy(old, lambda n: copies[n])
            if old.op in ("get_attr", "call_module"):
                new.target = f"{body.target}.{old.target}"
            if name == CHECKPOINT:
                new.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
                new.meta.setdefault("ac_graph_id", number)
        _leave(graph, node, mode)
    output = next(n for n in reversed(inner.graph.nodes) if n.op == "output")
    results: Any = fx.node.map_arg(output.args[0], lambda n: copies[n])
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not body.users:
        graph.erase_node(body)
    used = [f"{n.target}." for n in graph.nodes if n.op in ("get_attr", "call_module")]
    if not any(name.startswith(f"{body.target}.") for name in used):
        gm.delete_submodule(str(body.target))


def inline_regions(gm: fx.GraphModule) -> bool:
    """Inline every region that only sets how its nodes run. Return True if there was one."""
    number, changed = 0, False
    while True:
        region = next(((n, inner) for n in gm.graph.nodes if (inner := _inside(gm, n)) is not None), None)
        if region is None:
            break
        number, changed = number + 1, True
        _inline(gm, *region, number)
    if changed:
        gm.recompile()
    return changed
