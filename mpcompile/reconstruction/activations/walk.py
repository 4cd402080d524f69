"""Walk: the activations of all samples in the student and in its dense twin, moved from region to region.

The twin is the student's graph with the dense model's weights. Between two regions, only the values are held that a
later one reads; what lies between regions is computed when a region needs it. Tokens merge in both by the pairs that
the student chooses, so that a token is the same on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.ir.effects import own_copies, written
from mpcompile.ir.module import IRModule
from mpcompile.ir.parts import device_of
from mpcompile.kernels import ops, schema
from mpcompile.reconstruction.activations.rows import Rows, Shelf, count_of
from mpcompile.reconstruction.regions import Region, subgraph


def extract(gm: fx.GraphModule, nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Any:
    """Return a graph of some nodes of another, which shares its parameters: one input per node, a tuple of outputs.

    Example:
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        >>> x, linear, relu, _ = gm.graph.nodes
        >>> extract(gm, [relu], [linear], [relu])(torch.tensor([-1.0, 2.0]))
        (tensor([0., 2.]),)
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return IRModule(gm, graph)


def reached(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that depend on the graph's inputs; all others are constants."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def between(
    gm: fx.GraphModule, targets: Iterable[fx.Node], known: Iterable[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the nodes that compute ``targets`` from known values, and the known values that they read, in order."""
    order = {node: place for place, node in enumerate(gm.graph.nodes)}
    stops, inside, sources = set(known), set(), set()
    statements = [(node, written(gm, node)) for node in order if node.op.startswith("call")]
    statements = [(node, into) for node, into in statements if into and not node.users]
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node in inside or node in sources:
            continue
        if node in stops:
            sources.add(node)
            continue
        inside.add(node)
        stack += node.all_input_nodes
        stack += [statement for statement, into in statements if node in into]
    return sorted(inside, key=order.__getitem__), sorted(sources, key=order.__getitem__)


@dataclass
class Step:
    """What happens at one region.

    Attributes:
        region: the region.
        nodes: nodes that compute the values that the region reads and that are not held yet.
        sources: the held values from which they do.
        targets: the values that they yield.
        pairs: keys and saliency of the token merges among them.
        spent: held values that nothing reads after this region.
    """

    region: Region
    nodes: list[fx.Node] = field(default_factory=list)
    sources: list[fx.Node] = field(default_factory=list)
    targets: list[fx.Node] = field(default_factory=list)
    pairs: list[fx.Node] = field(default_factory=list)
    spent: list[fx.Node] = field(default_factory=list)


def steps(gm: fx.GraphModule, regions: Sequence[Region]) -> list[Step]:
    """Return the steps that lead through all regions."""
    data = reached(gm)
    held = [node for node in gm.graph.nodes if node.op == "placeholder"]
    result: list[Step] = []
    for region in regions:
        wanted = [node for node in region.inputs if node not in held]
        nodes, sources = between(gm, wanted, held)
        merges = [node for node in nodes if node.target is ops.token_merge]
        parts = [user for node in merges for user in node.users if user.users and user not in wanted]
        if parts:
            nodes, sources = between(gm, [*wanted, *parts], held)
        pairs = [node for merge in merges for node in pairing(merge) if node in data]
        result.append(Step(region, nodes, sources, [*wanted, *parts], list(dict.fromkeys(pairs))))
        held += [*wanted, *parts, region.output]
    last: dict[fx.Node, Step] = {}
    for step in result:
        last |= dict.fromkeys([*step.sources, *step.targets, *step.region.inputs, step.region.output], step)
    for node, step in last.items():
        step.spent.append(node)
    return result


def pairing(merge: fx.Node) -> list[fx.Node]:
    """Return the nodes by which a token merge chooses its pairs: keys, and saliency if there is one."""
    args = schema.TokenMergeArgs.bind(merge)
    return [node for node in (args.keys, args.saliency) if isinstance(node, fx.Node)]


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples that run together, with the graph's inputs if these are not held."""

    start: int
    size: int
    inputs: Mapping[fx.Node, Any] = field(default_factory=dict)

    def first(self, size: int) -> Chunk:
        """Return its first samples."""
        inputs = {n: v[:size] if isinstance(v, Tensor) and v.dim() else v for n, v in self.inputs.items()}
        return Chunk(self.start, size, inputs)


class Walk:
    """The values of all samples at one region; :meth:`enter` and :meth:`leave` move them through it.

    Args:
        student: the graph whose regions are trained.
        twin: a copy of it with the dense weights.
        regions: regions of the student, in order.
        samples: the graph inputs of all samples, in batches; read once or, if the regions read the inputs several
            times, held.
        count: number of samples.
        chunk: samples that run at a time.
        fixed: the one batch size that the graph takes, or None.
        shelf: holds the values.
    """

    def __init__(
        self,
        student: fx.GraphModule,
        twin: fx.GraphModule,
        regions: Sequence[Region],
        samples: Iterable[Sequence[Any]],
        count: int,
        chunk: int,
        fixed: int | None,
        shelf: Shelf,
    ) -> None:
        self.student, self.twin, self.shelf = student, twin, shelf
        self.samples, self.count, self.chunk, self.fixed = samples, count, fixed or chunk, fixed
        self.twin_of = dict(zip(student.graph.nodes, twin.graph.nodes, strict=True))
        self.steps = steps(student, regions)
        self.values: dict[fx.Node, Rows] = {}  # of the student
        self.targets: dict[fx.Node, Rows] = {}  # of the twin, by the student's nodes
        self.device = device_of(student)
        self.inputs = [node for node in student.graph.nodes if node.op == "placeholder"]
        first = self.steps[0]
        readers = [s for s in self.steps if not {*s.sources, *s.region.inputs}.isdisjoint(self.inputs)]
        self.streamed = readers == [first] and first.region.inputs and not {*first.region.inputs} & {*self.inputs}

    @torch.no_grad()
    def enter(self, step: Step) -> None:
        """Compute the inputs of a region on both sides, and the twin's output."""
        if step is self.steps[0] and not self.streamed:
            for chunk in self._streamed():
                self._store(self.values, self.inputs, chunk, lambda c: [c.inputs[node] for node in self.inputs])
            self.targets |= {node: self.values[node] for node in self.inputs}
        if step.targets:
            self._advance(step)
        self._run(self.twin, step.region, self.targets)

    @torch.no_grad()
    def leave(self, step: Step) -> None:
        """Compute the student's output of a region, and forget what nothing reads any more."""
        self._run(self.student, step.region, self.values)
        for node in step.spent:
            held = {id(rows): rows for side in (self.values, self.targets) if (rows := side.pop(node, None))}
            for rows in held.values():
                rows.release()

    def part(self, side: fx.GraphModule, region: Region) -> Any:
        """Return the region as a graph of its own, which shares the parameters of ``side`` (student or twin)."""
        if side is self.twin:
            nodes, inputs = (tuple(self.twin_of[n] for n in group) for group in (region.nodes, region.inputs))
            region = replace(region, nodes=nodes, inputs=inputs, output=self.twin_of[region.output])
        return subgraph(side, region)

    def _advance(self, step: Step) -> None:
        """Compute what a region reads, on both sides."""
        own = extract(self.student, step.nodes, step.sources, [*step.targets, *step.pairs])
        nodes, sources = between(self.student, step.targets, [*step.sources, *step.pairs])
        theirs = ([self.twin_of[n] for n in group] for group in (nodes, sources, step.targets))
        other = extract(self.twin, *theirs)
        same = _same_tensors(own, other) and all(self.values.get(n) is self.targets.get(n) for n in step.sources)
        for chunk in self._streamed() if self.streamed and step is self.steps[0] else self._chunks():
            values = self._store(
                self.values, step.targets, chunk, lambda c: run_part(own, self._take(self.values, step.sources, c))
            )
            if same:
                continue
            lent = dict(zip(step.pairs, values[len(step.targets) :], strict=True))
            rest = [node for node in sources if node not in lent]
            lent |= zip(rest, self._take(self.targets, rest, chunk), strict=True)
            for node, value in zip(step.targets, run_part(other, [lent[n] for n in sources]), strict=True):
                if node not in self.targets:
                    self.targets[node] = self.values[node].like()
                self.targets[node].write(chunk.start, value)
        if same:
            self.targets |= {node: self.values[node] for node in step.targets}

    def _run(self, gm: fx.GraphModule, region: Region, side: dict[fx.Node, Rows]) -> None:
        """Compute the output of a region for all samples."""
        part = self.part(gm, region)
        for chunk in self._chunks():
            self._store(side, [region.output], chunk, lambda c: [part(*self._take(side, region.inputs, c))])

    def _chunks(self) -> Iterator[Chunk]:
        for start in range(0, self.count, self.chunk):
            yield Chunk(start, min(self.chunk, self.count - start))

    def _streamed(self) -> Iterator[Chunk]:
        start = 0
        for batch in self.samples:
            size = count_of(batch)
            yield Chunk(start, size, dict(zip(self.inputs, batch, strict=True)))
            start += size

    def _take(self, side: Mapping[fx.Node, Rows], nodes: Iterable[fx.Node], chunk: Chunk) -> list[Any]:
        """Return the values of some nodes for the samples of a chunk."""
        place = slice(chunk.start, chunk.start + chunk.size)
        return [chunk.inputs[n] if n in chunk.inputs else side[n].take(place, self.device) for n in nodes]

    def _store(
        self,
        side: dict[fx.Node, Rows],
        nodes: Sequence[fx.Node],
        chunk: Chunk,
        compute: Callable[[Chunk], Sequence[Any]],
    ) -> Sequence[Any]:
        """Store what is computed for a chunk; at the first one, compute fewer samples too, to see where samples are."""
        values = compute(chunk)
        if nodes[0] not in side:
            fewer = chunk if self.fixed is not None or chunk.size == 1 else chunk.first(chunk.size - 1)
            others = values if fewer is chunk else compute(fewer)
            for node, value, other in zip(nodes, values, others, strict=False):
                side[node] = Rows(self.shelf, self.count, value, other, chunk.size, fewer.size)
        for node, value in zip(nodes, values, strict=False):
            side[node].write(chunk.start, value)
        return values


def run_part(part: fx.GraphModule, values: Sequence[Any]) -> Any:
    """Run a part of a graph; it may write into its inputs, but not into the rows that are held."""
    return part(*own_copies(part, values))


def _same_tensors(part: nn.Module, other: nn.Module) -> bool:
    """Return True if two parts hold equal parameters and buffers."""
    mine, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (part, other))
    return all(name in theirs and torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
