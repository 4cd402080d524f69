"""Importance: how much the dense model's outputs depend on each token and channel of a region's output.

A squared error treats all alike, but behind the last block a class-token head reads one token of hundreds. The error of
a region is weighted by the squared gradients of random combinations of the dense model's outputs: in expectation, for
class scores, the diagonal of the Fisher information (of a softmax with temperature 2, so that classes besides the most
probable count).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.capture.signature import outputs
from mpcompile.data.outputs import class_scores
from mpcompile.ir.nodes import shape_of
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from mpcompile.reconstruction.activations.rows import Index, Rows, count_of
from mpcompile.reconstruction.activations.walk import Walk, between, extract, pairing
from mpcompile.reconstruction.regions import Region

_TEMPERATURE = 2.0


@dataclass
class Importance:
    """Weights of the squared error at one region's output; they broadcast against the output.

    Attributes:
        share: share of the weights of positions; the rest is 1 for all.
        positions: for every sample, the weight of each position (token or pixel), mean 1 over the sample.
        channels: weight of each channel, mean 1.
    """

    share: float = 0.0
    positions: Rows | None = None
    channels: Tensor | None = None

    def of(self, index: Index, device: torch.device) -> Tensor | float:
        """Return the weights for the samples at an index."""
        if self.positions is None or self.channels is None:
            return 1.0
        return (self.share * self.positions.take(index, device) + (1 - self.share)) * self.channels.to(device)


class Whole:
    """The whole twin as a function that also yields the outputs of regions; token merges use the student's pairs.

    Args:
        walk: student and twin.
        nodes: the student's nodes whose values are returned, besides the graph's outputs.
    """

    def __init__(self, walk: Walk, nodes: Sequence[fx.Node]) -> None:
        student, twin_of = walk.student, walk.twin_of
        named = {name: node for name, node in outputs(student).items() if isinstance(node, fx.Node)}
        self.names, self.extra = list(named), len(nodes)
        wanted = [*named.values(), *nodes]
        merges = [node for node in student.graph.nodes if node.target is ops.token_merge]
        pairs = list(dict.fromkeys(node for merge in merges for node in pairing(merge)))
        self.own = extract(student, between(student, [*wanted, *pairs], walk.inputs)[0], walk.inputs, [*wanted, *pairs])
        inside, _ = between(student, wanted, [*walk.inputs, *pairs])
        sides = ([twin_of[n] for n in group] for group in (inside, [*walk.inputs, *pairs], wanted))
        self.twin = extract(walk.twin, *sides)
        self.pairs = len(pairs)

    def student(self, inputs: Sequence[Any]) -> tuple[dict[str, Any], list[Tensor], tuple[Any, ...]]:
        """Return the student's outputs by name, the values of the nodes, and what its merges chose pairs by."""
        values = self.own(*inputs)
        named, rest = values[: len(self.names)], values[len(self.names) :]
        return dict(zip(self.names, named, strict=True)), list(rest[: self.extra]), tuple(rest[self.extra :])

    def dense(self, inputs: Sequence[Any], pairs: Sequence[Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """Return the twin's outputs by name and the values of its nodes."""
        values = self.twin(*inputs, *(p.detach() if isinstance(p, Tensor) else p for p in pairs))
        return dict(zip(self.names, values[: len(self.names)], strict=True)), list(values[len(self.names) :])


class Weigher:
    """Computes the importance at the outputs of all regions, batch by batch, from the dense model."""

    def __init__(self, walk: Walk, regions: Sequence[Region], share: float, seed: int) -> None:
        self.walk, self.regions, self.share = walk, regions, share
        self.whole = Whole(walk, [region.output for region in regions])
        self.generator = torch.Generator().manual_seed(seed)
        self.axes = [_channel_axis(walk.student, region) for region in regions]
        self.rows: list[Rows | None] = [None] * len(regions)
        self.channels: list[Any] = [None] * len(regions)

    def add(self, start: int, inputs: Sequence[Any]) -> None:
        """Add the samples of one batch, which starts at sample ``start``."""
        for place, gradient in self._gradients(inputs):
            square = gradient.detach().float().square()
            others = [a for a in range(square.dim()) if a != self.axes[place] % square.dim()]
            total = square.sum(others, keepdim=True).double()
            self.channels[place] = total if self.channels[place] is None else self.channels[place] + total
            weights = square.mean(self.axes[place], keepdim=True)
            rows = self.rows[place]
            if rows is None:
                rows = self.rows[place] = self._room(place, weights, inputs)
            rows.write(start, weights)
            rows.normalise(slice(start, start + len(rows.samples(weights))))

    def result(self) -> list[Importance]:
        """Return the importance at each region's output."""
        found = []
        for rows, total in zip(self.rows, self.channels, strict=True):
            known = rows is not None and total is not None and bool(total.mean() > 0) and bool(total.isfinite().all())
            found.append(Importance(self.share, rows, (total / total.mean()).float()) if known else Importance())
        return found

    def _gradients(self, inputs: Sequence[Any]) -> Iterator[tuple[int, Tensor]]:
        """Yield the gradients of a random combination of the dense outputs at the outputs of regions."""
        pairs: tuple[Any, ...] = ()
        if self.whole.pairs:
            with torch.no_grad():
                pairs = self.whole.student(inputs)[2]
        with torch.enable_grad():
            leaves = [v.detach().requires_grad_() if _floats(v) else v for v in inputs]
            # Copies, since a graph that writes in place may not write into a leaf.
            named, values = self.whole.dense([v.clone() if _floats(v) else v for v in leaves], pairs)
            total = combination(named, self.generator)
            places = [i for i, value in enumerate(values) if value.requires_grad]
            if not places or total is None or not total.requires_grad:
                return
            gradients = torch.autograd.grad(total, [values[i] for i in places], allow_unused=True)
        for place, gradient in zip(places, gradients, strict=True):
            if gradient is not None:
                yield place, gradient

    def _room(self, place: int, weights: Tensor, inputs: Sequence[Any]) -> Rows:
        """Return room for the weights of one region, from the sizes that its output has for fewer samples."""
        samples = count_of(inputs)
        fewer = samples if self.walk.fixed is not None or samples == 1 else samples - 1
        other = weights
        if fewer != samples:
            with torch.no_grad():
                less = [v[:fewer] if isinstance(v, Tensor) and v.dim() else v for v in inputs]
                other = self.whole.student(less)[1][place].mean(self.axes[place], keepdim=True)
        return Rows(self.walk.shelf, self.walk.count, weights, other, samples, fewer)


def combination(named: Mapping[str, Any], generator: torch.Generator) -> Tensor | None:
    """Return a random combination of a model's outputs, whose squared gradients say how much they depend on a value.

    Of class scores z it is sum_c e_c sqrt(softmax(z / T)_c) log_softmax(z)_c with normal e; of other outputs the sum of
    all values, each times a normal number, in units of their standard deviation.
    """
    scores = class_scores(dict(named))
    if scores is not None:
        logs = scores.float().log_softmax(-1)
        scale = (scores.detach().float() / _TEMPERATURE).softmax(-1).sqrt()
        return (_normal(logs, generator) * scale * logs).sum()
    floats = [value.float() for value in named.values() if _floats(value)]
    parts = [(_normal(v, generator) * v).sum() / v.detach().std(correction=0).clamp(min=1e-12) for v in floats]
    return torch.stack(parts).sum() if parts else None


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _channel_axis(gm: fx.GraphModule, region: Region) -> int:
    """Return the axis of a region's output that holds channels: axis 1 behind convolutions, the last elsewhere."""
    inside = set(region.nodes)
    last = next((layer for layer in reversed(layers(gm)) if layer.node in inside), None)
    shape = shape_of(region.output) or ()
    if last is None or len(shape) < 3:
        return -1
    axes = (1, -1) if last.geometry is not None else (-1, 1)
    return next((axis for axis in axes if shape[axis] == last.weight.tensor.shape[0]), axes[0])
