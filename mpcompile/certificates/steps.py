"""Steps: replace the weights of one layer after another, and bound the effect of each replacement on the logits.

Step j compares two networks that differ in one layer only: all layers before it are sparse, all after it dense. That
layer's value moves on a straight segment; the rest of the network is evaluated on an enclosure of that segment. The
sum over all steps bounds the whole change (telescoping).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpcompile.certificates.bounds import label_kept, margins
from mpcompile.certificates.enclosures.enclosure import EPS, Enclosure, widened
from mpcompile.certificates.enclosures.rules import RULES, NoRule, Unbounded, enclose, operator_name
from mpcompile.certificates.pair import NetworkPair, Step, evaluate

_USELESS = 1e3  # an enclosure this many times as wide as its values ends a certificate
_HOPELESS = 1e3  # bounds this many times the measured change are not refined by cutting the segment

MEASURED, ENCLOSED, JACOBIAN, PAPER = "0 measured", "1 enclosure", "2 Jacobian", "2 paper's form"


@dataclass
class Change:
    """The bounds and verdicts that one tier proves for a batch.

    Attributes:
        eta: bound on the largest change of a logit, (batch,); infinite where there is none.
        decrease: bound on how much z_p - z_j falls, p the dense model's label, (batch, classes) or (batch, 1).
        kept: (batch,), True where the label of the network before this step is proven to stay.
    """

    eta: Tensor
    decrease: Tensor
    kept: Tensor


@dataclass
class StepResult:
    """One step on one batch: the tiers that are defined, and the reason why others are not."""

    step: Step
    tiers: dict[str, Change] = field(default_factory=dict)
    reason: str | None = None


Env = dict[fx.Node, Any]


def run_steps(
    pair: NetworkPair,
    inputs: Sequence[Tensor],
    labels: Tensor,
    allowance: Tensor,
    before: Tensor,
    tiers: Sequence[int],
    splits: int,
    skip: Mapping[int, str],
) -> Iterator[StepResult]:
    """Bound every step on one batch, in order.

    Args:
        labels: the dense model's labels, (batch,).
        allowance: rounding allowance of each logit, (batch,).
        before: logits of the dense model, (batch, classes).
        tiers: which of 1 and 2 to compute; tier 0 is always measured.
        splits: number of parts that a segment is cut into, each enclosed separately, where that may prove more.
        skip: number of a step that is not enclosed -> why.
    """
    env: Env = dict(zip(pair.inputs, inputs, strict=True)) | pair.sparse
    order = [n for n in pair.graph.nodes if n.op not in ("placeholder", "output")]
    place = 0
    for number, step in enumerate(pair.steps):
        end = order.index(step.node) + 1
        first = order.index(step.nodes[0])
        for node in order[place:end]:
            env[node] = evaluate(node, env)
        place = end
        rest = _Rest(pair, step, env, order[first:end], order[end:])
        result = StepResult(step, reason=skip.get(number))
        after = rest.measured()
        result.tiers[MEASURED] = _measured(before, after, labels, allowance)
        if result.reason is None and (1 in tiers or 2 in tiers):
            own = before.argmax(1)
            try:
                proven = rest.enclosed(labels, own, allowance, 1, 2 in tiers)
                if splits > 1 and _refinable(proven[ENCLOSED], result.tiers[MEASURED]):
                    finer = rest.enclosed(labels, own, allowance, splits, 2 in tiers)
                    proven = {name: _tighter(change, finer[name]) for name, change in proven.items()}
                result.tiers |= proven
            except (NoRule, Unbounded) as error:
                result.reason = str(error)
        before = after
        yield result


def _measured(before: Tensor, after: Tensor, labels: Tensor, allowance: Tensor) -> Change:
    change = after - before
    own = before.argmax(1)
    decrease = change - change.gather(1, labels[:, None])
    fall = change - change.gather(1, own[:, None])
    return Change(change.abs().amax(1), decrease, label_kept(margins(before, own), fall, allowance))


def _refinable(proven: Change, measured: Change) -> bool:
    """True if cutting the segment may prove more: bounds are neither close to the measured change nor far beyond it."""
    ratio = (proven.eta / measured.eta.clamp(min=1e-30)).median()
    return 1.01 < float(ratio) < _HOPELESS


def _tighter(a: Change, b: Change) -> Change:
    """The better of two proofs, sample by sample."""
    return Change(torch.minimum(a.eta, b.eta), torch.minimum(a.decrease, b.decrease), a.kept | b.kept)


class _Rest:
    """The network from one step on, with dense weights after it."""

    def __init__(self, pair: NetworkPair, step: Step, env: Env, inside: list[fx.Node], after: list[fx.Node]) -> None:
        self.pair, self.step, self.env, self.inside, self.after = pair, step, env, inside, after
        needed = {pair.output}
        for node in reversed(after):
            if node in needed:
                needed.update(node.all_input_nodes)
        self.after = [n for n in after if n in needed]
        moving = {step.node}
        for node in self.after:
            if not moving.isdisjoint(node.all_input_nodes):
                moving.add(node)
        self.moving = [n for n in self.after if n in moving]
        self.still = [n for n in self.after if n not in moving]
        self.last: dict[fx.Node, fx.Node] = {}
        for node in self.moving:
            for source in node.all_input_nodes:
                self.last[source] = node
        self.sizes: dict[fx.Node, Tensor] = {}

    def measured(self) -> Tensor:
        """The logits after this step."""
        env = self.env | self.pair.dense
        for node in self.after:
            env[node] = evaluate(node, env)
            if isinstance(env[node], Tensor):
                self.sizes[node] = _largest(env[node])
        return env[self.pair.output]

    def _check(self, node: fx.Node, value: Any) -> None:
        """Raise :class:`Unbounded` if an enclosure is too wide to be of use in every sample."""
        if isinstance(value, Enclosure) and node in self.sizes:
            useful = _largest(value.reach) <= _USELESS * self.sizes[node].clamp(min=1e-30)
            if not bool(useful.any()):
                times = f"{_USELESS:g} times the values at {node.name}"
                raise Unbounded(f"enclosures grow on the way to the logits: {times}")

    def _value(self, node: fx.Node, env: Env) -> Any:
        if node.op == "get_attr":
            return _point(evaluate(node, env))
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        if not node.all_input_nodes:
            return _point(evaluate(node, env))
        return enclose(node, args, kwargs)

    def _ends(self) -> tuple[Enclosure, Enclosure]:
        """The moving value with dense and with sparse weights, each enclosed with its rounding."""
        ends = []
        for tensors in (self.pair.dense, self.pair.sparse):
            env = {n: _point(v) for n, v in (self.env | tensors).items() if n in self._around()}
            for node in self.inside:
                if node in self.step.nodes:
                    env[node] = self._value(node, env)
            ends.append(env[self.step.node])
        return ends[0], ends[1]

    def _around(self) -> set[fx.Node]:
        return {source for node in self.step.nodes for source in node.all_input_nodes}

    def enclosed(
        self, labels: Tensor, own: Tensor, allowance: Tensor, splits: int, jacobian: bool
    ) -> dict[str, Change]:
        """Tier 1 and, if ``jacobian``, tier 2.

        Raises:
            NoRule: an operator after the step has no rule.
            Unbounded: nothing bounds the rest of the network on this segment.
        """
        for node in self.after:
            if node.op == "call_function" and node.all_input_nodes and operator_name(node.target) not in RULES:
                enclose(node, (), {})  # raises, with the reason
        if self.step.node is not self.pair.output and self.pair.output not in self.moving:
            return self._untouched(labels, jacobian)
        dense, sparse = self._ends()
        sources = {source for node in self.after for source in node.all_input_nodes}
        base = {n: _point(v) for n, v in (self.env | self.pair.dense).items() if n in sources}
        for node in self.still:
            base[node] = self._value(node, base)
        sums = _Sums(labels, own, splits)
        for part in range(splits):
            start = _segment(dense, sparse, part, splits, len(labels), jacobian)
            env = base | {self.step.node: start}
            for node in self.moving:
                env[node] = self._value(node, env)
                self._check(node, env[node])
                for source in node.all_input_nodes:
                    if self.last[source] is node and source is not self.pair.output and source not in self._head():
                        env.pop(source, None)
            sums.add(env, self.pair.output, self._head())
        return sums.result(allowance, jacobian)

    def _untouched(self, labels: Tensor, jacobian: bool) -> dict[str, Change]:
        """The result if the logits do not depend on the value that this step changes."""
        zero = torch.zeros(len(labels), dtype=torch.float64)
        tiers = (ENCLOSED, JACOBIAN, PAPER) if jacobian else (ENCLOSED,)
        return {tier: Change(zero, zero[:, None], torch.ones_like(zero, dtype=torch.bool)) for tier in tiers}

    def _head(self) -> list[fx.Node]:
        """Input, weight and bias of the last layer, if it is linear with fixed weights and its input moves."""
        node = self.pair.output
        if node is self.step.node or operator_name(node.target) != "linear" or node.args[1] in self.moving:
            return []
        return [n for n in node.args if isinstance(n, fx.Node)]


def _point(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Enclosure(value) if value.is_floating_point() else value
    return tuple(_point(v) for v in value) if isinstance(value, (tuple, list)) else value


def _largest(value: Tensor) -> Tensor:
    """The largest magnitude in each sample."""
    return value.abs().flatten(1).amax(1) if value.dim() > 1 else value.abs()


def _segment(dense: Enclosure, sparse: Enclosure, part: int, splits: int, batch: int, jacobian: bool) -> Enclosure:
    """One part of the segment from the dense to the sparse value."""
    change = sparse.center - dense.center
    center = dense.center + change * ((2 * part + 1) / (2 * splits))
    slope = change / (2 * splits)
    noise = torch.maximum(dense.spread, sparse.spread)
    radius = widened(noise, center, change, dense.center, terms=4)
    if not jacobian:
        return Enclosure(center, slope, radius)
    size = widened(change.abs() + dense.spread + sparse.spread, change)
    axes = list(range(1, size.dim())) if size.dim() and size.shape[0] == batch else list(range(size.dim()))
    largest = size.amax(axes, keepdim=True).expand_as(size) if axes else size
    return Enclosure(center, slope, radius, (size / splits, largest / splits))


class _Sums:
    """The bounds of all parts of a segment together."""

    def __init__(self, labels: Tensor, own: Tensor, splits: int) -> None:
        self.labels, self.own, self.splits = labels, own, splits
        self.start: Enclosure | None = None
        self.eta: Any = 0
        self.paper: Any = 0
        self.jacobian: Any = 0
        self.pairs = [_Pairs(labels)] if bool((labels == own).all()) else [_Pairs(labels), _Pairs(own)]

    def add(self, env: Env, output: fx.Node, head: list[fx.Node]) -> None:
        z: Enclosure = env[output]
        if self.start is None:
            self.start = z
        origin, first = self.start.center, self.start
        if first.slope is not None:
            origin = origin - first.slope
        away = widened((z.center - origin).abs() + z.reach + first.spread, z.center, origin, z.reach, terms=4)
        self.eta = torch.maximum(torch.as_tensor(self.eta), away.amax(1))
        if z.tangents:
            self.jacobian, self.paper = self.jacobian + z.tangents[0], self.paper + z.tangents[1]
        parts = [env[n] for n in head]
        for pairs in self.pairs:
            pairs.add(z, parts)

    def result(self, allowance: Tensor, jacobian: bool) -> dict[str, Change]:
        for_labels, for_own = self.pairs[0], self.pairs[-1]
        kept = ((for_own.lowest > 2 * allowance[:, None]) | for_own.itself).all(1)
        proven = {ENCLOSED: Change(_bound(self.eta), _bound(for_labels.decrease), kept)}
        if jacobian:
            grow = 1 + 16 * self.splits * EPS
            margin = torch.where(for_own.itself, torch.inf, for_own.start[0])
            eta = _bound(self.jacobian * grow).amax(1)
            kept = label_kept(margin, for_own.jacobian * grow, allowance)
            proven[JACOBIAN] = Change(eta, _bound(for_labels.jacobian * grow), kept)
            eta = _bound(self.paper * grow).amax(1)
            proven[PAPER] = Change(eta, 2 * eta[:, None], label_kept(margin, 2 * eta[:, None], allowance))
        return proven


def _bound(value: Tensor) -> Tensor:
    """Replace NaN, which means that there is no bound, by infinity."""
    return torch.where(torch.isnan(value), torch.inf, value)


class _Pairs:
    """Differences z_p - z_j for one label p per sample, over the parts of a segment; all (batch, classes).

    With a linear head they are (w_p - w_j) h + b_p - b_j, of radius \\|w_p - w_j\\| r for a radius r of h. That is
    at most the sum of the radii of z_p and z_j.

    Attributes:
        start: bounds at the beginning of the segment, (lower, upper).
        lowest: lower bound on the whole segment.
        decrease: upper bound on how much the difference falls.
        jacobian: the same bound from tier 2.
        itself: True where j = p.
    """

    start: tuple[Tensor, Tensor]
    lowest: Tensor
    decrease: Tensor
    itself: Tensor

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.parts = 0
        self.jacobian: Any = 0

    def add(self, z: Enclosure, head: list[Enclosure]) -> None:
        def differences(t: Tensor) -> Tensor:
            return t.gather(1, self.labels[:, None]) - t

        def sums(t: Tensor) -> Tensor:
            return t.gather(1, self.labels[:, None]) + t

        center = differences(z.center)
        slope = torch.zeros_like(center) if z.slope is None else differences(z.slope)
        if head:
            x, weight = head[0], head[1].center
            terms = weight.shape[1]
            sizes = F.linear(x.magnitude, weight.abs())
            if len(head) > 2:
                sizes = sizes + head[2].magnitude
            radius = self._through(weight, x.spread) + (terms + 8) * EPS * sums(sizes)
            tangents = self._through(weight, x.tangents[0]) if x.tangents else None
        else:
            radius = sums(z.spread)
            tangents = sums(z.tangents[0]) if z.tangents else None
        radius = widened(radius, sums(z.magnitude), terms=4)
        low = center - slope.abs() - radius
        self.parts += 1
        if self.parts == 1:
            self.start = (center - slope - radius, center - slope + radius)
            self.itself = torch.zeros_like(center, dtype=torch.bool).scatter(1, self.labels[:, None], True)
            self.lowest, self.decrease = low, self.start[1] - low
        else:
            self.lowest = torch.minimum(self.lowest, low)
            self.decrease = torch.maximum(self.decrease, self.start[1] - low)
        if tangents is not None:
            self.jacobian = self.jacobian + tangents

    def _through(self, weight: Tensor, radius: Tensor) -> Tensor:
        """\\|w_p - w_j\\| r, (batch, classes)."""
        grow = 1 + (weight.shape[1] + 8) * EPS
        radii = torch.empty(len(radius), len(weight), dtype=radius.dtype)
        for label in self.labels.unique().tolist():
            here = self.labels == label
            radii[here] = radius[here] @ (weight[label] - weight).abs().T
        return radii * grow
