"""Stream: all calibration batches at one point of the graph, moved forward layer by layer.

The stream holds the activations of every batch at that point, as computed by the graph with its earlier layers
replaced and, on request, also by the dense graph. Thus a layer is fitted to the inputs that it will actually see, and
every node runs only once (or twice) per batch, however many layers there are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from mpcompile.calibration.data import batches
from mpcompile.calibration.moments import FULL, Accumulator, Moments, kind_for
from mpcompile.calibration.norms import BatchNorm, Statistics, Sums, matched, own_statistics
from mpcompile.errors import InputError, first_line
from mpcompile.ir.effects import own_copies, storage, switches, written
from mpcompile.ir.module import Imported
from mpcompile.ir.numerics import modes_kept, training_flags
from mpcompile.ir.view import LayerOp
from mpcompile.kernels import ops, schema

Env = dict[fx.Node, Any]


def _bytes(envs: Iterable[Env]) -> int:
    seen = {id(v): v for env in envs for v in env.values() if isinstance(v, Tensor)}
    return sum(v.numel() * v.element_size() for v in seen.values())


class _Shelf:
    """A list of values, held in memory up to ``budget`` bytes and in a temporary folder beyond that."""

    def __init__(self, budget: float) -> None:
        self.budget, self.used = budget, 0
        self.values: list[Any] = []
        self.sizes: list[int] = []
        self.nodes: dict[str, fx.Node] = {}
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def append(self, value: tuple[Env, Env]) -> None:
        self.values.append(None)
        self.sizes.append(0)
        self[len(self) - 1] = value

    def __setitem__(self, index: int, value: tuple[Env, Env]) -> None:
        self.used -= self.sizes[index]
        size = _bytes(value)
        if self.used + size > self.budget:
            if self.folder is None:
                self.folder = tempfile.TemporaryDirectory(prefix="mpcompile-")
            path = Path(self.folder.name) / str(index)
            names = [{node.name: v for node, v in env.items()} for env in value[: 1 if value[0] is value[1] else 2]]
            torch.save(names, path)
            self.nodes |= {node.name: node for env in value for node in env}
            self.values[index], size = path, 0
        else:
            self.values[index] = value
        self.sizes[index] = size
        self.used += size

    def __getitem__(self, index: int) -> tuple[Env, Env]:
        value = self.values[index]
        if isinstance(value, Path):
            sides = torch.load(value, weights_only=False)  # written by this process, in its own folder
            envs = [{self.nodes[k]: v for k, v in side.items()} for side in sides]
            return envs[0], envs[-1]
        return value


class _Runner(fx.Interpreter):
    """Run single nodes on a given environment."""

    def on(self, node: fx.Node, env: Env) -> Any:
        self.env = env
        return super().run_node(node)


class Stream:
    """The batches at one point of the graph; :meth:`advance` moves them forward.

    Args:
        model: the imported model, whose nodes carry shapes. Its weights are not changed; their
            replacements are passed to :meth:`replace`.
        calibration: an iterable of batches; read once, at construction.
        budget: bytes of activations to hold in memory; the rest goes to a temporary folder.
        towards: position of the fits' targets between the outputs of a layer's own weight on pruned inputs (0) and
            those of the dense model (1). Above 0 the dense activations are held too.

    Raises:
        InputError: there is no batch, or one differs from the example inputs in shape or type.
    """

    def __init__(
        self, model: Imported, calibration: Iterable[Any], budget: float = math.inf, towards: float = 0.0
    ) -> None:
        self.gm = model.gm
        self.runner = _Runner(model.gm)
        self.nodes = list(model.gm.graph.nodes)
        self.last_use = self.runner.user_to_last_uses
        self.place = 0
        self.layers: dict[fx.Node, tuple[LayerOp, Tensor, Any]] = {}
        self.norms: dict[fx.Node, tuple[BatchNorm, Statistics]] = {}
        self.changed: set[fx.Node] = set()
        self.towards, self.two_sided = towards, towards > 0
        self.shelf = _Shelf(budget)
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        for values in batches(model, calibration):
            env = dict(zip(placeholders, own_copies(model.gm, values), strict=True))
            self.shelf.append((env, dict(env) if self.two_sided else env))
        if not len(self.shelf):
            raise InputError("calibration is empty", expected="at least one batch", found="none")

    def replace(self, layer: LayerOp, weight: Tensor, bias: Any) -> None:
        """Make the pruned side compute ``layer`` with this weight and bias (a tensor, a node or None) from here on."""
        self.layers[layer.node] = (layer, weight, bias)

    def renorm(self, norm: BatchNorm, statistics: Statistics) -> None:
        """Make the pruned side compute this BatchNorm with these statistics from here on."""
        self.norms[norm.node] = (norm, statistics)

    @torch.no_grad()
    def advance(self, stop: fx.Node) -> None:
        """Run every node before ``stop``, on all batches."""
        end = self.nodes.index(stop)
        if end <= self.place:
            return
        with training_flags(self.gm, False):
            for index in range(len(self.shelf)):
                dense, pruned = self.shelf[index]
                with modes_kept():
                    modes: Env = {}  # each batch re-enters the modes in force at this point
                    for position, node in enumerate(self.nodes[:end]):
                        if switches(node):
                            self._switch(node, modes)
                        elif position >= self.place and node.op not in ("placeholder", "output"):
                            self._step(node, dense, pruned)
                self.shelf[index] = (dense, pruned)
        self.place = end

    def _switch(self, node: fx.Node, modes: Env) -> None:
        """Enter or leave autocast; gradients are never recorded here."""
        if "autocast" in str(getattr(node.target, "__name__", "")):
            modes[node] = self.runner.on(node, modes)

    def _step(self, node: fx.Node, dense: Env, pruned: Env) -> None:
        if node in self.layers or node in self.norms or not self.changed.isdisjoint(node.all_input_nodes):
            self.changed.add(node)
        changed = node in self.changed
        if changed and self.two_sided:
            for source in written(self.gm, node):
                self._part(source, dense, pruned)
        try:
            if self.two_sided or not changed:
                dense[node] = self.runner.on(node, self._paired(node, dense, pruned))
            pruned[node] = self._pruned(node, pruned) if changed else dense[node]
        except RuntimeError as error:
            raise InputError(f"the model rejects a calibration batch: {first_line(error)}") from error
        for source in self.last_use.get(node, ()):
            dense.pop(source, None)
            pruned.pop(source, None)

    def _paired(self, node: fx.Node, dense: Env, pruned: Env) -> Env:
        """Return the dense side's environment; a token merge gets what chooses its pairs from the pruned side."""
        if node.target is not ops.token_merge:
            return dense
        args = schema.TokenMergeArgs.bind(node)
        return {**dense, **{source: pruned[source] for source in (args.keys, args.saliency) if source is not None}}

    @staticmethod
    def _part(source: fx.Node, dense: Env, pruned: Env) -> None:
        """Give the pruned side its own memory for a tensor that is about to be written, and for its views."""
        if not isinstance(dense[source], Tensor) or storage(dense[source]) != storage(pruned[source]):
            return
        shared = storage(dense[source])
        copied = dense[source].untyped_storage().clone()

        def moved(value: Tensor) -> Tensor:
            if storage(value) != shared:
                return value
            return value.new_empty(0).set_(copied, value.storage_offset(), value.shape, value.stride())

        for node, value in pruned.items():
            pruned[node] = tree_map_only(Tensor, moved, value)

    def _pruned(self, node: fx.Node, env: Env) -> Any:
        if node in self.norms:
            return self._normalised(*self.norms[node], env)
        if node not in self.layers:
            return self.runner.on(node, env)
        layer, weight, bias = self.layers[node]
        bias = env[bias] if isinstance(bias, fx.Node) else bias
        if layer.geometry is None:
            return F.linear(env[layer.input], weight, bias)
        g = layer.geometry
        return F.conv2d(env[layer.input], weight, bias, g.stride, g.padding, g.dilation, g.groups)

    def _normalised(self, norm: BatchNorm, statistics: Statistics, env: Env) -> Any:
        """Run a BatchNorm with other statistics."""
        if norm.reads is not None:
            return self.runner.on(norm.node, {**env, **dict(zip(norm.reads, statistics.values(), strict=True))})
        module = self.gm.get_submodule(str(norm.node.target))
        self.runner.env = env
        args, kwargs = self.runner.fetch_args_kwargs_from_env(norm.node)
        own = {path.rpartition(".")[2]: value for path, value in statistics.items()}
        return torch.func.functional_call(module, own, args, kwargs)

    @torch.no_grad()
    def moments(self, layer: LayerOp, m: int, budget: float) -> Moments:
        """Return the moments of the layer's pruned inputs; with a dense side, also those of the target outputs."""
        self.advance(layer.node)
        kind, _ = kind_for(layer, m, budget)
        accumulator = Accumulator(layer, m, kind)
        weight = layer.weight.tensor.detach()
        for index in range(len(self.shelf)):
            dense, pruned = self.shelf[index]
            x, wanted = pruned[layer.input], None
            if kind == FULL and self.two_sided and layer.input in self.changed:
                wanted = _apply(layer, torch.lerp(x, dense[layer.input], self.towards), weight)
            accumulator.add(x, wanted)
        return accumulator.result()

    def inputs(self) -> Iterable[list[Any]]:
        """Return the graph inputs of every batch; only for a stream that has not moved yet."""
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        return ([self.shelf[i][0][n] for n in placeholders] for i in range(len(self.shelf)))

    @torch.no_grad()
    def channel_statistics(self, norm: BatchNorm, changed_only: bool = True, match: bool = True) -> Statistics | None:
        """Return statistics for a BatchNorm of the pruned side.

        With ``match`` and a dense side, its outputs get means and variances of the dense outputs; else, it gets the
        means and variances of its inputs. None if ``changed_only`` and no layer before it was replaced.
        """
        match = match and self.two_sided
        self.advance(norm.node)
        if changed_only and norm.source not in self.changed:
            return None
        ours, theirs = Sums(), Sums()
        for index in range(len(self.shelf)):
            dense, pruned = self.shelf[index]
            ours.add(pruned[norm.source])
            if match:
                theirs.add(dense[norm.source])
        if not match:
            return ours.statistics(norm)
        mean, variance = own_statistics(self.gm, norm).values()
        return matched(norm, ours, theirs, (mean, variance))


def _apply(layer: LayerOp, x: Tensor, weight: Tensor) -> Tensor:
    """Return the layer's output without its bias."""
    if layer.geometry is None:
        return F.linear(x, weight)
    g = layer.geometry
    return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)
