"""Search for regions: residual additions on the flow of values, then module paths, then single layers."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from mpcompile.ir.macs import is_add
from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import ELEMENTWISE, ELEMENTWISE_MODULES, target_name
from mpcompile.ir.parts import FOLDED, split_name, whole_of
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels import ops
from mpcompile.reconstruction.flow import Flow, Level

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


def common_path(paths: Iterable[str]) -> str:
    """Return the longest module path that all of the given paths begin with.

    Example:
        >>> common_path(["blocks.3.attn.qkv", "blocks.3.attn.proj"])
        'blocks.3.attn'
    """
    split = [path.split(".") for path in paths]
    same = []
    for atoms in zip(*split, strict=False):
        if len(set(atoms)) > 1:
            break
        same.append(atoms[0])
    return ".".join(same)


def within(path: str | None, parent: str | None) -> bool:
    """Return True if ``path`` is that of a module, or of a part of it."""
    return path is not None and parent is not None and f"{path}.".startswith(f"{parent}.")


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
        chosen = self._joined(self._choose(self._residuals()), halves)
        parts = [part for part in chosen if part.bits & self.masked]
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
        flow, starts = self.flow, {}
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
        while (reader := self._only_reader(node)) is not None and self._is_tail(reader, part.block):
            node, bits = reader, bits | self.flow.bits([reader])
        return replace(part, bits=bits, output=node)

    def _only_reader(self, node: fx.Node) -> fx.Node | None:
        """Return the one node whose value depends on ``node``, if it depends on no other value; else None."""
        readers = [reader for reader in self.flow.onward(node) if reader not in self.flow.idle]
        if len(readers) != 1 or readers[0].op == "output" or self.flow.values(readers[0]) != [node]:
            return None
        return readers[0]

    def _is_tail(self, node: fx.Node, block: str | None) -> bool:
        name = target_name(self.gm, node)
        if _NORM.fullmatch(name):
            return block is None or within(self.owners.get(node, block), block)
        if node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), ELEMENTWISE_MODULES):
            return True
        return name in ELEMENTWISE

    def _stands_alone(self, part: Part) -> bool:
        """Return True if nothing but the output is read outside, no tokens merge inside, and the inputs come before."""
        flow, bits = self.flow, part.bits
        if bits & self.merges:
            return False
        for node in flow.members(bits):
            if node is not part.output and self._leaves(bits, node):
                return False
            statements = [s for s in flow.sources[node] if s not in node.all_input_nodes and not self._holds(bits, s)]
            for statement in statements:  # in between, something outside writes into a tensor that the node reads
                if any(flow.place[s] < flow.place[statement] for s in node.all_input_nodes if s in flow.place):
                    return False
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

    def _joined(self, parts: list[Part], halves: bool) -> list[Part]:
        """Return the parts with those in a row of one block joined, or marked as halves."""
        result: list[Part] = []
        for part in parts:
            before = result[-1] if result else None
            joined = None if before is None else self._join(before, part, halves)
            if joined is None:
                result.append(part)
            elif halves:
                result[-1:] = [replace(before or part, kind="half"), replace(part, kind="half")]
            else:
                result[-1] = joined
        return result

    def _join(self, first: Part, second: Part, halves: bool) -> Part | None:
        """Return two parts as one if they follow each other in one block and share no layer; else None."""
        if first.block is None or first.block != second.block:
            return None
        bits, node = first.bits | second.bits, first.output
        while node is not second.start:
            reader = self._only_reader(node)
            if reader is None or self._holds(second.bits, reader):
                return None
            node, bits = reader, bits | self.flow.bits([reader])
        names = [{self.uses[n].name for n in self.flow.members(p.bits) if n in self.uses} for p in (first, second)]
        joined = Part(bits, first.start, second.output, first.block)
        return joined if names[0].isdisjoint(names[1]) and self._stands_alone(joined) else None

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
        """Return the layers and norms of a module with all that is between them, or None if they are no region."""
        flow, taken = self.flow, self._taken(parts)
        inside = (
            flow.bits(n for n, owner in self.owners.items() if within(owner, path) and flow.level[n] is Level.VALUE)
            & ~taken
        )
        layers_left = (inside & self.masked).bit_count()
        if not 1 < layers_left <= MOST_GROUPED:
            return None
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
        part = self._with_tail(Part(bits, None, ends[0], path))
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
