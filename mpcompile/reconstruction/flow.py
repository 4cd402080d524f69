"""Flow of values through a graph: what a node is computed from, apart from sizes and the choice of merged tokens.

Every node has a level. Constants depend on no input of the graph. Forms depend on the sizes, dtypes and devices of
tensors alone. All other nodes are values. Paths lead along values only: a node that reads the size of a tensor is not
computed from it, and a token merge is computed from its tokens, not from the keys, saliency and sizes that choose its
pairs, through which no gradient flows.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Callable, Iterable

from torch import fx

from mpcompile.ir.effects import switches, written
from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import reads_form, target_name
from mpcompile.kernels import ops, schema


class Level(enum.IntEnum):
    """What a node depends on."""

    CONSTANT = 0
    FORM = 1
    VALUE = 2


VIEW = re.compile(
    r"getitem|getattr|_*(unsafe_)?view(_as)?|_*reshape(_as)?|(un)?flatten|permute|(m|adjo)?[tT]|transpose|(move|swap)(axis|dim|axes|dims)|"
    r"(un)?squeeze|expand(_as)?|chunk|(tensor_)?split\w*|unbind|narrow|select|slice|diagonal|unfold|as_strided|rearrange|"
    r"contiguous|detach|alias|to|type|type_as|float|half|bfloat16|identity|dropout",
    re.IGNORECASE,
)


def memory(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return the first node of the chain of views and in-place operations by which a node shares memory."""
    while node.all_input_nodes and (VIEW.fullmatch(target_name(gm, node)) or written(gm, node)):
        node = (written(gm, node) or node.all_input_nodes)[0]
    return node


class Flow:
    """Levels, sources and paths of the nodes of a graph. Sets of nodes are bits of an int, by their place in the graph.

    Statements (``h[0] = 1``) count as sources of what reads their tensor later.

    Args:
        gm: the graph.
        lifted: parameters that are inputs of the graph.
    """

    def __init__(self, gm: fx.GraphModule, lifted: Lifted | None = None) -> None:
        self.gm = gm
        self.nodes = [node for node in gm.graph.nodes if not switches(node)]
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.sources = self._sources()
        self.readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            for source in self.sources[node]:
                self.readers[source].append(node)
        parameters = set() if lifted is None else set(lifted.tensors)
        self.level: dict[fx.Node, Level] = {}
        for node in self.nodes:
            self.level[node] = self._level(node, parameters)
        self.idle = self._idle()
        self.above = self._reach(self.nodes, self.values)
        self.below = self._reach(self.nodes[::-1], self.onward)
        self.everything_above = self._reach(self.nodes, lambda node: self.sources[node])

    def _sources(self) -> dict[fx.Node, list[fx.Node]]:
        """Return the inputs of every node, and the statements that write into one of them in between."""
        statements: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        sources = {}
        for node in self.nodes:
            inputs = [source for source in node.all_input_nodes if source in self.place]
            between = [
                statement
                for source in (inputs if statements else ())
                for statement in statements.get(memory(self.gm, source), ())
                if self.place[statement] > self.place[source]
            ]
            sources[node] = list(dict.fromkeys([*inputs, *between]))
            for source in written(self.gm, node):
                statements[memory(self.gm, source)].append(node)
        return sources

    def _level(self, node: fx.Node, parameters: set[str]) -> Level:
        if node.op == "placeholder":
            return Level.CONSTANT if node.name in parameters else Level.VALUE
        level = max((self.level[source] for source in self.sources[node]), default=Level.CONSTANT)
        return Level.FORM if level is Level.VALUE and reads_form(node) else level

    def _carries(self, source: fx.Node, reader: fx.Node) -> bool:
        """Return True if the value of ``reader`` is computed from that of ``source``."""
        if self.level[source] is not Level.VALUE or self.level[reader] is not Level.VALUE:
            return False
        return reader.target is not ops.token_merge or source is schema.TokenMergeArgs.bind(reader).x

    def values(self, node: fx.Node) -> list[fx.Node]:
        """Return the sources that a node's value is computed from."""
        return [source for source in self.sources[node] if self._carries(source, node)]

    def onward(self, node: fx.Node) -> list[fx.Node]:
        """Return the readers whose value is computed from that of a node."""
        return [reader for reader in self.readers[node] if self._carries(node, reader)]

    def _idle(self) -> set[fx.Node]:
        """Return the nodes whose values matter to nothing, or to nothing but the choice of merged tokens."""
        idle: set[fx.Node] = set()
        for node in reversed(self.nodes):
            statement = node.op == "output" or (not node.users and bool(written(self.gm, node)))
            if not statement and all(reader in idle for reader in self.onward(node)):
                idle.add(node)
        return idle

    def _reach(self, order: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> list[int]:
        reach = [0] * len(self.nodes)
        for node in order:
            bits = 1 << self.place[node]
            for other in step(node):
                bits |= reach[self.place[other]]
            reach[self.place[node]] = bits
        return reach

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        """Return a set of nodes as bits."""
        result = 0
        for node in nodes:
            result |= 1 << self.place[node]
        return result

    def members(self, bits: int) -> list[fx.Node]:
        """Return the nodes of a set of bits, in graph order."""
        found = []
        while bits:
            low = bits & -bits
            found.append(self.nodes[low.bit_length() - 1])
            bits ^= low
        return found
