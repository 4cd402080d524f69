"""Rewrite a graph so that of each node only the parts are computed that a demand names."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mpcompile.ir.effects import erase_unread
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import reads_form, target_name
from mpcompile.passes.dead_tokens.boxes import FULL, Box, Runs, within
from mpcompile.passes.dead_tokens.demand import CHECKS, asked, is_tensor
from mpcompile.passes.dead_tokens.rules import Rules

_MEASURED = ("val", "example_value", "macs", "tensor_meta")  # keys of a node's meta that hold for its whole value


class Rewriter:
    """Adds the nodes that compute parts, in graph order.

    Args:
        gm: a graph whose nodes carry shapes.
        parts: node -> the parts of it to compute, none if nothing reads it. Other nodes are computed in full.
    """

    def __init__(self, gm: IRModule, lifted: Lifted, parts: Mapping[fx.Node, tuple[Box, ...]]) -> None:
        self.gm, self.graph, self.rules = gm, gm.graph, Rules(gm, lifted)
        self.parts = dict(parts)
        self.built: dict[tuple[fx.Node, Box], fx.Node] = {}
        self.cuts: dict[tuple[fx.Node, Box], fx.Node] = {}
        self.numbers: dict[fx.Node, fx.Node] = {}
        self.origin: fx.Node | None = None  # the node whose parts are being built

    def run(self) -> None:
        """Rewrite the graph, and erase the nodes that nothing reads."""
        nodes = list(self.graph.nodes)
        for node in nodes:
            if is_tensor(node):
                self._rebuild(node)
        changed = [node for node in nodes if node in self.parts]
        for node in nodes:
            if target_name(self.gm, node) in CHECKS and self._reads_parts(node):
                self.graph.erase_node(node)  # a check of a form that only the whole tensor has
        self._erase(nodes)
        for node in [node for node in nodes if not node._erased and not reads_form(node)]:
            self._redirect(node)
        self._erase(nodes)
        assert all(node._erased or self.parts[node] == (FULL,) for node in changed), "a part was left unread"

    def _erase(self, nodes: Sequence[fx.Node]) -> None:
        """Erase what nothing reads; parts stand for a node also if it overwrites its input."""
        for node in reversed(nodes):
            if not node._erased and not node.users:
                if self._is_partial(node):
                    self.graph.erase_node(node)
                else:
                    erase_unread(self.gm, [node])

    def _reads_parts(self, node: fx.Node) -> bool:
        return any(self.parts.get(source, (FULL,)) != (FULL,) for source in node.all_input_nodes)

    def _rebuild(self, node: fx.Node) -> None:
        for part in self.parts.get(node, (FULL,)):
            need = asked(self.rules, node, part)
            if part == FULL and (need is None or not any(map(self._is_partial, [*need.tensors, *need.forms]))):
                continue
            self.origin = node
            with self.graph.inserting_before(node):
                new = self.rules.apply(self, node, part)
            if part == FULL:
                node.replace_all_uses_with(new)
                self._stands_for(new, node)
            else:
                self.built[node, part] = new

    def _stands_for(self, new: fx.Node, node: fx.Node) -> None:
        """Let rules see the shape of the node that ``new`` replaces."""
        for key in _MEASURED:
            if key in node.meta:
                new.meta[key] = node.meta[key]

    def _is_partial(self, node: fx.Node) -> bool:
        return self.parts.get(node, (FULL,)) != (FULL,)

    def _redirect(self, node: fx.Node) -> None:
        """Let a node read sizes from parts where it read them from a whole tensor."""
        for source in node.all_input_nodes:
            if not is_tensor(source):
                with self.graph.inserting_before(node):
                    new = self._number(source)
                if new is not source:
                    node.replace_input_with(source, new)

    def tensor(self, node: fx.Node, part: Box = FULL) -> fx.Node:
        for held in self.parts.get(node, (FULL,)):
            rest = within(held, part)
            if rest is not None:
                return self.cut(node if held == FULL else self.built[node, held], rest)
        raise AssertionError(f"{part} of {node.name} is not computed")

    def form(self, node: fx.Node) -> fx.Node:
        held = self.parts.get(node, (FULL,))
        return node if FULL in held or not held else self.built[node, held[0]]

    def number(self, value: Any) -> Any:
        return self._number(value) if isinstance(value, fx.Node) else value

    def _number(self, node: fx.Node) -> fx.Node:
        """Return a node that computes the same number from parts."""
        if node not in self.numbers:
            sources = {s: self.form(s) if is_tensor(s) else self._number(s) for s in node.all_input_nodes}
            same = all(new is source for source, new in sources.items())
            self.numbers[node] = node if same else self.graph.node_copy(node, lambda source: sources[source])
        return self.numbers[node]

    def size(self, value: fx.Node, axis: int) -> fx.Node:
        return self.call(operator.getitem, (self._number(value), axis))

    def read(self, path: str, part: Box) -> fx.Node:
        return self.cut(self.graph.get_attr(path), part)

    def call(
        self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        kind = "call_method" if isinstance(target, str) else "call_function"
        return self._marked(self.graph.create_node(kind, target, args, dict(kwargs or {})))

    def again(self, node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        return self._marked(self.graph.create_node(node.op, node.target, args, dict(kwargs or {})))

    def _marked(self, new: fx.Node) -> fx.Node:
        """Give a new node the origin of the node that it computes a part of."""
        if self.origin is not None:
            new.meta = {key: value for key, value in self.origin.meta.items() if key not in _MEASURED}
        return new

    def cut(self, value: fx.Node, part: Box) -> fx.Node:
        if part == FULL:
            return value
        if (value, part) not in self.cuts:
            result = value
            single = {axis: runs[0] for axis, runs in part if len(runs) == 1}
            if single:
                picks = [_slice(single[axis]) if axis in single else slice(None) for axis in range(max(single) + 1)]
                result = self.call(operator.getitem, (result, picks[0] if len(picks) == 1 else tuple(picks)))
            for axis, runs in part:
                if len(runs) > 1:
                    result = self._several(result, axis, runs)
            self.cuts[value, part] = result
        return self.cuts[value, part]

    def _several(self, value: fx.Node, axis: int, runs: Runs) -> fx.Node:
        pieces = [self.call(operator.getitem, (value, (*[slice(None)] * axis, _slice(run)))) for run in runs]
        return self.call(torch.cat, (pieces, axis))


def _slice(run: tuple[int, int]) -> slice:
    start, stop = run
    return slice(start, stop if stop or start >= 0 else None)
