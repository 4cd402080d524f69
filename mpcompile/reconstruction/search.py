"""Search for regions: residual additions on the flow of values, then module paths, then single layers."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from mpcompile.ir.effects import written
from mpcompile.ir.macs import is_add
from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import ELEMENTWISE, ELEMENTWISE_MODULES, target_name
from mpcompile.ir.parts import FOLDED, common_path, split_name, whole_of, within
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels import ops
from mpcompile.reconstruction.flow import VIEW, Flow, Level

MOST = 24  # masked layers of a residual region: the output of a larger one says little about its first layers
MOST_GROUPED = 8  # the same for layers that only a module path holds together
_SUMS = frozenset({torch.addcmul, torch.lerp, torch.ops.aten.addcmul.default, torch.ops.aten.add_.Tensor})
_NORM = re.compile(r"\w*(batch|layer|group|instance|rms)_?norm\w*", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A region in the making.

    Attributes:
        bits: the values inside, as bits (see :class:`Flow`).
        start: the value at which the paths to the addition begin; None if there is no addition.
        output: the value that is matched.
        block: path of the repeated module that it belongs to, such as ``blocks.3``, if any.
        kind: as in :class:`mpcompile.reconstruction.regions.Region`.
    """

    bits: int
    start: fx.Node | None
    output: fx.Node
    block: str | None
    kind: str = "block"


def _parents(path: str) -> Iterator[str]:
    """Yield the paths of the modules that hold a module, the outermost first."""
    atoms = path.split(".")
    for count in range(1, len(atoms)):
        yield ".".join(atoms[:count])


class Search:
    """The search in one graph.

    Args:
        gm: the graph.
        lifted: parameters that are inputs of the graph.
    """

    def __init__(self, gm: fx.GraphModule, lifted: Lifted | None = None) -> None:
        self.gm, self.lifted = gm, lifted or Lifted()
        self.flow = Flow(gm, lifted)
        self.uses: dict[fx.Node, LayerOp] = {use.node: use for use in layers(gm, lifted)}
        self.masked = self.flow.bits(node for node, use in self.uses.items() if use.pattern is not None)
        self.merges = self.flow.bits(node for node in self.flow.nodes if node.target is ops.token_merge)
        self.owners = {node: owner for node in self.flow.nodes if (owner := self._owner(node)) is not None}

    def run(self, halves: bool) -> list[Part]:
        """Return disjoint parts in graph order, which hold every masked layer that works on values."""
        chosen = self._choose(self._residuals())
        chosen = chosen if halves else self._joined(chosen)
        parts = self._halved([part for part in chosen if part.bits & self.masked])
        parts = self._absorbed(parts)
        for anywhere in (False, True):  # stems and heads form groups only beside blocks
            if not anywhere or parts:
                parts += self._groups(parts, anywhere)
        parts += self._singles(parts)
        return sorted(parts, key=lambda part: self.flow.place[part.output])

    # Module paths

    def _owner(self, node: fx.Node) -> str | None:
        """Return the path of the module that holds the weight of a layer or norm; None for any other node."""
        use = self.uses.get(node)
        if use is None and not _NORM.fullmatch(target_name(self.gm, node)):
            return None
        if use is not None:
            name = use.weight.name
            rows = split_name(name)
            return self._module(name if rows is None else rows[0])
        if node.op == "call_module":
            return str(node.target)
        for source in node.all_input_nodes:
            whole = whole_of(source) if self.flow.level[source] is Level.CONSTANT else None
            if whole is not None:
                return self._module(str(whole.target) if whole.op == "get_attr" else self.lifted.names[whole.name])
        return None

    @staticmethod
    def _module(parameter: str) -> str:
        return parameter.removeprefix(f"{FOLDED}.").rpartition(".")[0]

    def _block(self, bits: int) -> str | None:
        """Return the path up to its last number that the layers and norms of a set of nodes share."""
        paths = {self.owners[node] for node in self.flow.members(bits) if node in self.owners}
        atoms = common_path(paths).split(".")
        if len(paths) == 1:
            atoms.pop()
        while atoms and not re.search(r"\d", atoms[-1]):
            atoms.pop()
        return ".".join(atoms) or None

    # Residual additions

    def _is_sum(self, node: fx.Node) -> bool:
        return is_add(node) or node.target in _SUMS

    def _residuals(self) -> list[Part]:
        """Return a part for every sum of values that have a source in common, if nothing else reads its inside."""
        flow = self.flow
        starts: dict[fx.Node, fx.Node] = {}
        for node in flow.nodes:
            operands = flow.values(node)
            if self._is_sum(node) and len(operands) > 1:
                shared = functools.reduce(operator.and_, (flow.above[flow.place[o]] for o in operands))
                if shared:
                    starts[node] = flow.nodes[shared.bit_length() - 1]
        parts = []
        for node, start in starts.items():
            readers = flow.onward(node)
            if len(readers) == 1 and starts.get(readers[0]) is start:
                continue  # a sum of several terms
            bits = flow.below[flow.place[start]] & flow.above[flow.place[node]] & ~flow.bits([start])
            part = self._with_tail(Part(bits, start, node, self._block(bits)))
            if (bits & self.masked).bit_count() <= MOST and self._stands_alone(part):
                parts.append(part)
        return parts

    def _with_tail(self, part: Part) -> Part:
        """Return a part with the activations, and norms of the same block, that alone read its output."""
        node, bits = part.output, part.bits
        while (step := self._only_reader(node)) is not None and self._is_tail(step[0], part.block):
            node, bits = step[0], bits | step[1]
        return replace(part, bits=bits, output=node)

    def _only_reader(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        """Return the one node that depends on ``node`` and on no other value, and what leads to it as bits; or None.

        Statements on a tensor lead to the node that reads it after them.
        """
        flow = self.flow
        readers = [reader for reader in flow.onward(node) if reader not in flow.idle]
        if not readers or readers[-1].op == "output":
            return None
        last = max(readers, key=flow.place.__getitem__)
        bits = flow.below[flow.place[node]] & flow.above[flow.place[last]] & ~flow.bits([node])
        members = flow.members(bits)
        if not all(self._holds(bits, reader) for reader in readers):
            return None
        for member in members:
            statement = member is last or bool(VIEW.fullmatch(target_name(self.gm, member)) or written(self.gm, member))
            if not statement or any(s is not node and not self._holds(bits, s) for s in flow.values(member)):
                return None
        return last, bits

    def _is_tail(self, node: fx.Node, block: str | None) -> bool:
        name = target_name(self.gm, node)
        if _NORM.fullmatch(name):
            return block is None or within(self.owners.get(node, block), block)
        if node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), ELEMENTWISE_MODULES):
            return True
        return name in ELEMENTWISE or name.removesuffix("_") in ELEMENTWISE

    def _stands_alone(self, part: Part) -> bool:
        """Return True if nothing but the output is read outside, no tokens merge inside, and the inputs come before."""
        flow, bits = self.flow, part.bits
        if bits & self.merges:
            return False
        for node in flow.members(bits):
            if node is not part.output and self._leaves(bits, node):
                return False
            if any(not self._holds(bits, s) for s in flow.values(node) if s not in node.all_input_nodes):
                return False  # a statement outside writes into a tensor that the node reads
        _, inputs = self.enclosed(bits)
        return not any(flow.everything_above[flow.place[source]] & bits for source in inputs)

    def _holds(self, bits: int, node: fx.Node) -> bool:
        return bool(bits >> self.flow.place[node] & 1)

    def enclosed(self, bits: int) -> tuple[list[fx.Node], list[fx.Node]]:
        """Return the nodes of a set with the constants and sizes that they need, and the inputs, both in graph order.

        Sizes are computed inside where they are those of tensors that are read anyway, so that a region runs on any
        batch size; other sizes are inputs.
        """
        flow = self.flow
        nodes = set(flow.members(bits))
        read = {s for node in nodes for s in flow.sources[node]} - nodes
        inputs = {s for s in read if flow.level[s] is Level.VALUE and s in self._direct(nodes)}
        stack = [s for s in read if s not in inputs]
        while stack:
            node = stack.pop()
            if node in nodes or node in inputs:
                continue
            if node.op == "placeholder" or not self._derived(node, nodes, inputs):
                inputs.add(node)
                continue
            nodes.add(node)
            stack += [s for s in flow.sources[node] if s not in nodes and s not in inputs]
        order = flow.place.__getitem__
        return sorted(nodes, key=order), sorted(inputs, key=order)

    @staticmethod
    def _direct(nodes: set[fx.Node]) -> set[fx.Node]:
        return {source for node in nodes for source in node.all_input_nodes}

    def _derived(self, node: fx.Node, nodes: set[fx.Node], inputs: set[fx.Node]) -> bool:
        """Return True if a node depends on nothing but constants and the forms of tensors that are at hand."""
        flow = self.flow
        if flow.level[node] is Level.CONSTANT:
            return True
        if flow.level[node] is Level.VALUE or node.op == "placeholder":
            return False
        return all(
            source in nodes or source in inputs
            if flow.level[source] is Level.VALUE
            else self._derived(source, nodes, inputs)
            for source in flow.sources[node]
        )

    def _choose(self, candidates: list[Part]) -> list[Part]:
        """Return disjoint parts: the innermost, but all of a block in place of something within it."""
        chosen: list[Part] = []
        order = sorted(candidates, key=lambda p: (not p.bits & self.masked, p.bits.bit_count()))
        for part in order:
            inner = [other for other in chosen if other.bits & part.bits]
            if not inner:
                chosen.append(part)
            elif part.block is not None and all(
                other.block == part.block and not other.bits & ~part.bits for other in inner
            ):
                chosen = [other for other in chosen if other not in inner] + [part]
        return sorted(chosen, key=lambda part: self.flow.place[part.output])

    def _joined(self, parts: list[Part]) -> list[Part]:
        """Return the parts with those in a row of one block joined."""
        result: list[Part] = []
        for part in parts:
            joined = self._join(result[-1], part) if result else None
            result[-1 if joined else len(result) :] = [joined or part]
        return result

    def _join(self, first: Part, second: Part) -> Part | None:
        """Return two parts as one if they follow each other in one block and share no layer; else None."""
        if not self._same_block(first, second):
            return None
        bits, node = first.bits | second.bits, first.output
        while node is not second.start:
            step = self._only_reader(node)
            if step is None or step[1] & second.bits:
                return None
            node, bits = step[0], bits | step[1]
        joined = Part(bits, first.start, second.output, first.block)
        return joined if self._stands_alone(joined) else None

    def _same_block(self, first: Part, second: Part) -> bool:
        """Return True if two parts belong to one run of one block: a block that runs again has the same layers."""
        names = [{self.uses[n].name for n in self.flow.members(p.bits) if n in self.uses} for p in (first, second)]
        return first.block is not None and first.block == second.block and names[0].isdisjoint(names[1])

    def _halved(self, parts: list[Part]) -> list[Part]:
        """Return the parts with a note on those that share their block with another one."""
        return [
            replace(part, kind="half") if any(p is not part and self._same_block(p, part) for p in parts) else part
            for part in parts
        ]

    # Layers outside residual additions

    def _left(self, parts: Iterable[Part]) -> int:
        """Return the masked layers that are in no part, those that are computed from constants alone excepted."""
        values = self.flow.bits(node for node, level in self.flow.level.items() if level is Level.VALUE)
        return self.masked & values & ~self._taken(parts)

    @staticmethod
    def _taken(parts: Iterable[Part]) -> int:
        return functools.reduce(operator.or_, (part.bits for part in parts), 0)

    def _absorbed(self, parts: list[Part]) -> list[Part]:
        """Return the parts with layers of their block that only they read, such as the keys of a cross-attention."""
        for node in reversed(self.flow.members(self._left(parts))):
            taken = self._taken(parts)
            bits, stack, reached = 0, [node], 0
            while stack:
                current = stack.pop()
                if self._holds(taken, current):
                    reached |= self.flow.bits([current])
                elif not self._holds(bits, current):
                    bits |= self.flow.bits([current])
                    stack += [reader for reader in self.flow.onward(current) if reader not in self.flow.idle]
            for index, part in enumerate(parts):
                if not reached & ~part.bits and reached and within(self.owners.get(node), part.block):
                    larger = replace(part, bits=part.bits | bits)
                    if self._stands_alone(larger):
                        parts[index] = larger
        return parts

    def _groups(self, parts: list[Part], anywhere: bool) -> list[Part]:
        """Return parts of several layers that a repeated module holds, or any module."""
        found: list[Part] = []
        for node in self.flow.members(self._left(parts)):
            if self._holds(self._taken(found), node):
                continue
            for path in _parents(self.owners[node]):
                part = self._group(path, [*parts, *found]) if anywhere or self._repeated(path) else None
                if part is not None:
                    found.append(part)
                    break
        return found

    def _repeated(self, path: str) -> bool:
        """Return True if a module, or one that holds it, has a number and a sibling that differs in the number."""
        for parent in [*_parents(path), path]:
            head, _, leaf = parent.rpartition(".")
            stem = re.match(r"\D*", leaf)
            if stem is None or stem.group() == leaf:
                continue
            depth = parent.count(".")
            siblings = {
                ".".join(owner.split(".")[: depth + 1]) for owner in self.owners.values() if owner.count(".") > depth
            }
            wanted = f"{head}.{stem.group()}".lstrip(".")
            if any(s != parent and re.match(re.escape(wanted) + r"\d", s) for s in siblings):
                return True
        return False

    def _group(self, path: str, parts: list[Part]) -> Part | None:
        """Return the layers and norms of a module with all that is between them, or None if that is no region."""
        flow, taken = self.flow, self._taken(parts)
        inside = flow.bits(
            n for n, owner in self.owners.items() if within(owner, path) and flow.level[n] is Level.VALUE
        )
        held = inside & self.masked
        if held & taken or held.bit_count() > MOST_GROUPED or inside.bit_count() < 2:
            return None
        inside &= ~taken
        above = below = 0
        for node in flow.members(inside):
            above, below = above | flow.above[flow.place[node]], below | flow.below[flow.place[node]]
        bits = above & below
        for _ in range(16):  # branches that a concatenation or a product joins
            ends = [n for n in flow.members(bits) if self._leaves(bits, n)]
            if len(ends) < 2:
                break
            readers = {r for n in ends for r in flow.onward(n) if not self._holds(bits, r) and r not in flow.idle}
            following = min(readers, key=flow.place.__getitem__)
            if self.owners.get(following) is not None or following.op == "output":
                return None
            bits |= flow.bits([following])
        ends = [n for n in flow.members(bits) if self._leaves(bits, n)]
        if len(ends) != 1 or bits & taken:
            return None
        kind = "block" if held.bit_count() > 1 else "layer"
        part = self._with_tail(Part(bits, None, ends[0], path, kind))
        return part if not part.bits & taken and self._stands_alone(part) else None

    def _leaves(self, bits: int, node: fx.Node) -> bool:
        return any(not self._holds(bits, r) and r not in self.flow.idle for r in self.flow.onward(node))

    def _singles(self, parts: list[Part]) -> list[Part]:
        """Return a part for every masked layer that is in none: with the norm and activation behind it."""
        found: list[Part] = []
        for node in self.flow.members(self._left(parts)):
            bare = Part(self.flow.bits([node]), None, node, None, "layer")
            part = self._with_tail(bare)
            if part.bits & self._taken([*parts, *found]) or not self._stands_alone(part):
                part = bare
            found.append(part)
        return found
