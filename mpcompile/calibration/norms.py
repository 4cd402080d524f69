"""BatchNorms over images in a graph, as modules or as calls of functions, and new running statistics for them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.ir.nodes import argument, shape_of
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import attribute
from mpcompile.layers import by_mode, number

Statistics = dict[str, Tensor]  # paths of running means and variances -> their new values

STATISTICS = ("running_mean", "running_var")
TENSORS = (*STATISTICS, "weight", "bias")
_TORCH_ORDER = frozenset({torch.batch_norm, torch.ops.aten.batch_norm.default})
_CONSTANT = 1e-6  # of the running variance: a variance below that is none
_POSITIONS, _TORCH_POSITIONS = (1, 2, 3, 4), (3, 4, 1, 2)  # in F.batch_norm and torch.batch_norm


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm over images that normalises by running statistics, which nothing else reads.

    Attributes:
        node: the node that computes it.
        source: its input, (B, C, H, W).
        mean, variance: paths of its running statistics.
        eps: what is added to the variance.
        reads: the nodes that read them; None if ``node`` calls a module, which holds them.
    """

    node: fx.Node
    source: fx.Node
    mean: str
    variance: str
    eps: float
    reads: tuple[fx.Node, fx.Node] | None = None


@dataclass(frozen=True)
class Call:
    """The arguments of a function that computes a BatchNorm: nodes, tensors or None, and numbers."""

    tensors: Mapping[str, Any]
    training: Any
    eps: Any


def call_of(gm: fx.GraphModule, node: fx.Node) -> Call | None:
    """Return the arguments of a call of ``F.batch_norm`` or ``torch.batch_norm``; None for any other node."""
    if node.op != "call_function" or not (node.target is F.batch_norm or node.target in _TORCH_ORDER):
        return None
    positions = _TORCH_POSITIONS if node.target in _TORCH_ORDER else _POSITIONS
    tensors = {key: argument(node, place, key) for place, key in zip(positions, TENSORS, strict=True)}
    return Call(tensors, number(gm, argument(node, 5, "training", False)), argument(node, 7, "eps", 1e-5))


def batch_norms(gm: fx.GraphModule) -> list[BatchNorm]:
    """Return the BatchNorms over images that have running statistics of their own, in graph order.

    Example:
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        >>> [norm.mean for norm in batch_norms(gm)]
        ['1.running_mean']
    """
    found = [norm for node in gm.graph.nodes if (norm := _as_module(gm, node) or _as_call(gm, node)) is not None]
    uses = Counter(norm.mean for norm in found)
    return [norm for norm in found if uses[norm.mean] == 1]


def _as_module(gm: fx.GraphModule, node: fx.Node) -> BatchNorm | None:
    if node.op != "call_module":
        return None
    module = gm.get_submodule(str(node.target))
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None:
        return None
    mean, variance = (f"{node.target}.{key}" for key in STATISTICS)
    return BatchNorm(node, node.all_input_nodes[0], mean, variance, module.eps)


def _as_call(gm: fx.GraphModule, node: fx.Node) -> BatchNorm | None:
    call = call_of(gm, node)
    source = argument(node, 0, "input")
    if call is None or not isinstance(source, fx.Node) or len(shape_of(source) or (None,) * 4) != 4:
        return None
    training = argument(node, 5, "training", False)
    flag = by_mode(gm, training)
    if (training if flag is None else flag.when_evaluating) not in (False, 0):
        return None  # it normalises by batch, or the flag is computed
    mean, variance = (call.tensors[key] for key in STATISTICS)
    for read in (mean, variance):
        if not isinstance(read, fx.Node) or read.op != "get_attr" or list(read.users) != [node]:
            return None
    if not isinstance(call.eps, (int, float)):
        return None
    return BatchNorm(node, source, str(mean.target), str(variance.target), call.eps, (mean, variance))


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let BatchNorms normalise by their running statistics, and keep these, whatever the mode of the rest.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout()).train()
        >>> with frozen(model):
        ...     [module.training for module in model]
        [False, True]
    """
    flagged: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if isinstance(model, fx.GraphModule):
        calls = [node for node in model.graph.nodes if call_of(model, node) is not None]
        flags = [by_mode(model, argument(node, 5, "training", False)) for node in calls]
        flagged += [flag for flag in flags if flag is not None]
    with contextlib.ExitStack() as stack:
        for module in flagged:
            stack.enter_context(training_flags(module, False))
        yield


@contextlib.contextmanager
def gathering(gm: fx.GraphModule, norms: Sequence[BatchNorm]) -> Iterator[Callable[[int], None]]:
    """Let BatchNorms that are calls of functions normalise by batch, and gather running statistics meanwhile.

    Yields:
        A function to call before each batch with its number: statistics become the plain average over batches.
    """
    calls = [norm.node for norm in norms]
    given = [(node.args, node.kwargs) for node in calls]

    def start(batch: int) -> None:
        for node in calls:
            for place, key, value in ((5, "training", True), (6, "momentum", 1 / (batch + 1))):
                if len(node.args) > place:
                    node.update_arg(place, value)
                else:
                    node.update_kwarg(key, value)
        if calls:
            gm.recompile()

    try:
        yield start
    finally:
        for node, (args, kwargs) in zip(calls, given, strict=True):
            node.args, node.kwargs = args, kwargs
        if calls:
            gm.recompile()


def own_statistics(gm: nn.Module, norm: BatchNorm) -> Statistics:
    """Return the running statistics of a BatchNorm."""
    return {path: attribute(gm, path) for path in (norm.mean, norm.variance)}


@torch.no_grad()
def write(gm: nn.Module, statistics: Statistics) -> None:
    """Write running statistics into the tensors of a graph, in place."""
    for path, value in statistics.items():
        attribute(gm, path).copy_(value)


class Sums:
    """Mean and unbiased variance of the channels of (B, C, ...) tensors, over all that were added, in float64.

    Example:
        >>> gm = fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(1)))
        >>> (norm,), sums = batch_norms(gm), Sums()
        >>> sums.add(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
        >>> sums.statistics(norm)
        {'0.running_mean': tensor([2.]), '0.running_var': tensor([2.])}
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """Add a batch."""
        x = value.transpose(0, 1).flatten(1).double()
        part = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
        self.sums = part if self.sums is None else self.sums + part

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel."""
        assert self.sums is not None
        count, total, square = self.sums
        mean = total / count
        return mean, (square / count - mean.square()).clamp(min=0) * (count / (count - 1).clamp(min=1))

    def statistics(self, norm: BatchNorm) -> Statistics:
        """Return them as the running statistics of a BatchNorm."""
        mean, variance = self.moments()
        return {norm.mean: mean.float(), norm.variance: variance.float()}


def matched(norm: BatchNorm, pruned: Sums, dense: Sums, running: tuple[Tensor, Tensor]) -> Statistics:
    """Return statistics with which a BatchNorm's outputs have the means and variances of the dense model's outputs.

    A dense model's running statistics come from other images than the calibration's, and more of them: plain averages
    over the calibration images would move its outputs even if nothing were pruned, and these would not.

    Args:
        norm: the BatchNorm.
        pruned, dense: sums over its inputs in both models, on the same images.
        running: running mean and variance of the dense model's BatchNorm.
    """
    (mean, variance), (dense_mean, dense_variance) = pruned.moments(), dense.moments()
    running_mean, running_variance = (value.double() for value in running)
    # A channel that is constant in the dense model says nothing about the scale.
    constant = dense_variance <= _CONSTANT * (running_variance + norm.eps)
    scale = torch.where(constant, 1.0, variance / dense_variance.clamp(min=1e-300))
    wanted = ((running_variance + norm.eps) * scale - norm.eps).clamp(min=0)
    shift = (dense_mean - running_mean) * ((wanted + norm.eps) / (running_variance + norm.eps)).sqrt()
    return {norm.mean: (mean - shift).float(), norm.variance: wanted.float()}
