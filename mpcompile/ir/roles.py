"""Roles of layers (stem, head, depthwise), determined by data flow, not by name."""

from __future__ import annotations

import re

from torch import fx

from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import real_inputs, target_name
from mpcompile.ir.view import layers


def _reads_input(node: fx.Node, stops: set[fx.Node], images: set[fx.Node]) -> bool:
    """Return True if data reaches ``node`` from a graph input without passing through a weighted layer."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in images:
            return True
        if current in seen or current in stops:
            continue
        seen.add(current)
        stack.extend(current.all_input_nodes)
    return False


_ELEMENTWISE_TAIL = re.compile(
    r"^(getitem|truediv|div|mul|true_divide|softmax|log_softmax|sigmoid|flatten|reshape|view|squeeze|float|to|dropout|"
    r"contiguous|clone|identity|Dropout|Identity|Flatten|Softmax|LogSoftmax|Sigmoid)(\..*)?$"
)


def roles(gm: fx.GraphModule, lifted: Lifted | None = None) -> dict[str, str]:
    """Return layer name -> ``"stem"``, ``"head"`` or ``"depthwise"``; other layers are absent.

    Stem: a convolution that reads a graph input with no weighted layer before it. Head: a layer whose result reaches
    the output only through reshaping, scaling, softmax, or one average of several heads.
    """
    lifted = lifted or Lifted()
    uses = layers(gm, lifted)
    by_node = {layer.node: layer for layer in uses}
    images = set(real_inputs(gm, lifted))
    result: dict[str, str] = {}
    for layer in uses:
        if layer.depthwise:
            result[layer.name] = "depthwise"
        elif layer.kind == "conv2d" and _reads_input(layer.input, set(by_node), images):
            result[layer.name] = "stem"
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    stack: list[tuple[fx.Node, bool]] = [(n, False) for n in output.all_input_nodes]
    while stack:
        node, averaged = stack.pop()
        name = target_name(gm, node)
        if node in by_node:
            result[by_node[node].name] = "head"
        elif _ELEMENTWISE_TAIL.match(name):
            stack.extend((n, averaged) for n in node.all_input_nodes)
        elif name in ("add", "mean", "stack") and not averaged and all(n in by_node for n in node.all_input_nodes):
            stack.extend((n, True) for n in node.all_input_nodes)
    return result
