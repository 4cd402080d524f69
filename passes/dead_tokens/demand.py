"""Demand: which part of each node's value something reads, found backwards from the output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from mpcompile.ir.effects import writes
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import argument, fake_value, reads_form, shape_of, target_name
from mpcompile.passes.dead_tokens.boxes import FULL, Box, count, pieces, share, without
from mpcompile.passes.dead_tokens.rules import Rules
from mpcompile.passes.dead_tokens.selections import Whole, Wider

CHECKS = frozenset({"_assert_tensor_metadata"})  # read a tensor's form, and yield nothing


def is_tensor(node: fx.Node) -> bool:
    """Return True if a node yields a tensor."""
    return isinstance(fake_value(node), Tensor)


class Asked:
    """What a rule asks for, without building anything: a :class:`mpcompile.passes.dead_tokens.rules.Builder`.

    Attributes:
        tensors: operand -> the boxes of it that are read.
        numbers: nodes that yield numbers or other values that are no tensors.
        forms: tensors of which only dtype, device and rank are read.
        lengths: nodes that yield a whole shape, with an axis whose length is read.
    """

    def __init__(self) -> None:
        self.tensors: dict[fx.Node, list[Box]] = defaultdict(list)
        self.numbers: list[fx.Node] = []
        self.forms: list[fx.Node] = []
        self.lengths: list[tuple[fx.Node, int]] = []

    def tensor(self, node: fx.Node, part: Box = FULL) -> Any:
        self.tensors[node].append(part)

    def number(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            self.numbers.append(value)

    def form(self, node: fx.Node) -> Any:
        self.forms.append(node)

    def size(self, value: Any, axis: int) -> Any:
        self.number(value)
        self.lengths.append((value, axis))

    def read(self, path: str, part: Box) -> Any:
        return None

    def call(self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        return None

    def again(self, node: fx.Node, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        return None


def asked(rules: Rules, node: fx.Node, part: Box) -> Asked | None:
    """Return what a node needs so that ``part`` of its value can be computed; None if only all of it can.

    Raises:
        Wider: some axes have to be whole.
    """
    found = Asked()
    try:
        rules.apply(found, node, part)
    except Whole:
        return None
    return found


def _everything(node: fx.Node) -> Asked:
    found = Asked()
    for source in node.all_input_nodes:
        (found.tensor if is_tensor(source) else found.number)(source)
    return found


@dataclass
class Demand:
    """The parts of a graph that are read.

    Attributes:
        parts: node that yields a tensor -> the boxes of it to compute. Nodes that nothing reads have no entry.
    """

    parts: dict[fx.Node, tuple[Box, ...]] = field(default_factory=dict)

    @property
    def partial(self) -> dict[fx.Node, tuple[Box, ...]]:
        """The nodes of which not all is computed."""
        return {node: parts for node, parts in self.parts.items() if parts != (FULL,)}

    def share(self, node: fx.Node) -> float:
        """Return which share of a node's value is computed, between 0 and 1."""
        shape = shape_of(node)
        if shape is None:
            return 1.0
        return min(1.0, sum(share(part, shape) for part in self.parts.get(node, ())))


class _Walk:
    """One walk backwards over a graph whose nodes carry shapes.

    Args:
        whole: nodes to compute in full.
    """

    def __init__(self, gm: IRModule, rules: Rules, whole: Iterable[fx.Node]) -> None:
        self.gm, self.rules, self.whole = gm, rules, set(whole)
        self.boxes: dict[fx.Node, list[Box]] = defaultdict(list)
        self.axes: dict[fx.Node, set[int | None]] = defaultdict(set)  # axes whose length is read; None: no length
        self.numbers: set[fx.Node] = set()
        self.picked: dict[tuple[fx.Node, fx.Node], set[int]] = defaultdict(set)  # (shape, reader) -> axes
        self.demand = Demand()

    def run(self) -> Demand:
        for node in reversed(self.gm.graph.nodes):
            if target_name(self.gm, node) in CHECKS:
                continue
            if node.op == "output" or self._is_statement(node):
                self._ask(node, _everything(node))
                if is_tensor(node):
                    self.demand.parts[node] = (FULL,)
            elif is_tensor(node):
                self._tensor(node)
            elif node in self.numbers:
                self._number(node)
            elif self.boxes.get(node):  # a tuple of tensors that is read as a whole
                self._ask(node, _everything(node))
        return self.demand

    def _is_statement(self, node: fx.Node) -> bool:
        """Return True if a node does more than yield a value."""
        if not node.op.startswith("call"):
            return False
        return self.rules.writes(node) if writes(self.gm, node) else node.is_impure(False)

    def _ask(self, reader: fx.Node, found: Asked) -> None:
        for node, boxes in found.tensors.items():
            self.boxes[node] += boxes
        for node in found.forms:
            self.axes[node].add(None)
        self.numbers.update(found.numbers)
        for shape, axis in found.lengths:
            self.picked[shape, reader].add(axis)

    def _number(self, node: fx.Node) -> None:
        """Note of which tensors a number reads the form."""
        name = target_name(self.gm, node)
        for source in node.all_input_nodes:
            if not is_tensor(source):
                self.numbers.add(source)
            elif reads_form(node):
                self.axes[source] |= self._lengths(node, name)
            else:
                self.boxes[source].append(FULL)  # a number that is computed from values

    def _lengths(self, node: fx.Node, name: str) -> set[int | None]:
        """Return the axes whose lengths a node reads."""
        axis = argument(node, 1, "dim") if name in ("size", "sym_size") else None
        rank = len(shape_of(node.all_input_nodes[0]) or ())
        if isinstance(axis, int):
            return {axis % rank}
        if name not in ("size", "sym_size") and not (name == "getattr" and node.args[1] == "shape"):
            return set(range(rank)) if name in ("numel", "nelement", "sym_numel", "stride", "sym_stride") else {None}
        axes: set[int | None] = set()
        for user in self._live(node):
            if (node, user) in self.picked:
                axes |= self.picked[node, user]
            elif target_name(self.gm, user) == "getitem" and isinstance(user.args[1], int):
                axes.add(user.args[1] % rank)
            else:
                axes |= set(range(rank))
        return axes

    def _live(self, node: fx.Node) -> list[fx.Node]:
        return [u for u in node.users if u in self.numbers or u in self.demand.parts or u.op == "output"]

    def _tensor(self, node: fx.Node) -> None:
        boxes = self.boxes.get(node, [])
        lengths = self.axes.get(node)
        if not boxes and not lengths:
            return
        shape = shape_of(node) or ()
        parts = pieces(boxes, shape) if boxes else (FULL,)
        parts = self._rounded(node, parts, shape)
        if node in self.whole or node.op in ("placeholder", "get_attr") or (lengths and self._cuts(parts, lengths)):
            parts = (FULL,)
        parts, needs = self._needs(node, parts, shape)
        self.demand.parts[node] = parts
        for need in needs:
            self._ask(node, need)

    def _needs(
        self, node: fx.Node, parts: tuple[Box, ...], shape: tuple[int, ...]
    ) -> tuple[tuple[Box, ...], list[Asked]]:
        """Return the parts that can be computed and hold the given ones, and what they need."""
        while True:
            try:
                needs = [asked(self.rules, node, part) for part in parts]
            except Wider as wider:
                parts = pieces([without(part, wider.axes) for part in parts], shape)
                continue
            known = [need for need in needs if need is not None]
            if len(known) == len(parts):
                return parts, known
            if parts == (FULL,):
                return parts, [_everything(node)]
            parts = (FULL,)

    @staticmethod
    def _cuts(parts: Iterable[Box], lengths: Iterable[int | None]) -> bool:
        """Return True if the parts are shorter along an axis whose length is read."""
        return any(axis in dict(part) for part in parts for axis in lengths if axis is not None)

    def _rounded(self, node: fx.Node, parts: tuple[Box, ...], shape: tuple[int, ...]) -> tuple[Box, ...]:
        """Let products compute all tokens where most are read: to compute a few less saves nothing."""
        if not node.meta.get("macs"):
            return parts
        last = len(shape) - 1
        wide = [
            without(part, [axis for axis, runs in part if axis != last and 2 * count(runs) > shape[axis]])
            for part in parts
        ]
        if len(wide) == 1 or all(without(part, [last]) == FULL for part in wide):
            wide = [without(part, [last]) for part in wide]  # channels that nothing reads stay
        return pieces(wide, shape)


def find_demand(gm: IRModule, lifted: Lifted | None = None) -> Demand:
    """Return which parts of a graph's tensors are read, where that saves multiply-accumulates.

    Args:
        gm: a graph whose nodes carry shapes and ``macs`` (see :func:`mpcompile.ir.shapes.propagate`).
        lifted: parameters that are graph inputs.

    Returns:
        The demand. Nodes upstream of which no product computes less are computed in full.
    """
    rules = Rules(gm, lifted or Lifted())
    whole: set[fx.Node] = set()
    while True:
        demand = _Walk(gm, rules, whole).run()
        useful = _useful(gm, demand)
        idle = demand.partial.keys() - useful - whole
        if not idle:
            return demand
        whole |= idle


def _useful(gm: IRModule, demand: Demand) -> set[fx.Node]:
    """Return the nodes, computed in part or not at all, at or upstream of which a product computes less."""
    useful: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if reads_form(node) or demand.parts.get(node) == (FULL,):
            continue
        multiplies = is_tensor(node) and node.meta.get("macs")
        if multiplies or any(source in useful for source in node.all_input_nodes):
            useful.add(node)
    return useful


def saved_macs(gm: IRModule, demand: Demand, skipped: Mapping[Any, Any] | None = None) -> int:
    """Return the multiply-accumulates of the whole batch that are not executed, of dense weights.

    Args:
        skipped: targets whose multiply-accumulates are not the model's own.
    """
    return round(
        sum(
            node.meta.get("macs", 0) * (1 - demand.share(node))
            for node in gm.graph.nodes
            if node.target not in (skipped or {})
        )
    )
