"""LowerDense: run dense linear layers on the CPU engine's own products, where these are the fastest.

Inductor's freezing hands a dense layer to oneDNN or MKL, and gives its activation and its residual addition a pass
over memory of their own. The engine's dense product (native/dense.h) has both in its epilogue. The packed weight is a
copy of the current values: the pass is for graphs whose weights are final.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from mpcompile.ir.effects import erase_orphans, storage, written_tensors
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument
from mpcompile.ir.parts import keep
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels.dispatch import CpuDenseEngine, choose_dense
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.base import Context, Decision, Pass
from mpcompile.passes.lower.masked import PACKED, EngineChoice, describe, spec_of
from mpcompile.passes.rewriting import supersede

WHOLE = Pattern(1, 1)


@dataclass(frozen=True, eq=False)
class DenseLowering(Decision):
    """Layer name -> the engine that it was moved to; and dense linear layers left to Inductor -> why."""

    engines: Mapping[str, EngineChoice]
    left: Mapping[str, str]


class LowerDense(Pass):
    """Dense linear layers -> products on packed panels. Runs between Lower and Fuse, on final weights.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower, LowerDense
        >>> Pipeline([Lower(), LowerDense()])
        Pipeline([lower, lower_dense])
    """

    name = "lower_dense"
    decision_type = DenseLowering

    def plan(self, gm: IRModule, ctx: Context) -> DenseLowering:
        engines: dict[str, EngineChoice] = {}
        left: dict[str, str] = {}
        changing = written_tensors(gm, ctx.lifted)
        for layer in _candidates(gm, ctx):
            if layer.name in engines or layer.name in left:
                continue
            if storage(layer.weight.tensor) in changing:
                left[layer.name] = "the graph itself writes into its weight"
                continue
            spec = spec_of(layer, WHOLE)
            choice = choose_dense(spec, ctx.config.engine)
            if choice.engine.name == CpuDenseEngine.name:
                engines[layer.name] = describe(spec, choice)
            else:
                left[layer.name] = choice.why
        return DenseLowering(engines, left)

    def summary(self, decision: DenseLowering) -> str:
        return f"{len(decision.engines)} dense layers on {CpuDenseEngine.name}, {len(decision.left)} left"

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: DenseLowering, ctx: Context) -> bool:
        packed: dict[str, list[str]] = {}
        for layer in _candidates(gm, ctx):
            if layer.name not in decision.engines:
                continue
            if layer.name not in packed:
                buffers = CpuDenseEngine.packed(layer.weight.tensor.detach())
                keep(gm, f"{PACKED}.{layer.name}", buffers)
                packed[layer.name] = list(buffers)
            _replace(gm, layer, packed[layer.name])
        gm.delete_all_unused_submodules()
        return bool(packed)


def _candidates(gm: IRModule, ctx: Context) -> list[LayerOp]:
    """Return the uses of dense linear layers that can be rewritten."""
    found = [layer for layer in layers(gm, ctx.lifted) if layer.kind == "linear" and layer.mask is None]
    return [layer for layer in found if layer.obstacle is None and layer.weight.tensor.numel()]


def _replace(gm: IRModule, layer: LayerOp, keys: list[str]) -> None:
    """Replace one use of a layer by the engine's operator."""
    graph, node = gm.graph, layer.node
    with graph.inserting_before(node):
        packed = {key: graph.get_attr(f"{PACKED}.{layer.name}.{key}") for key in keys}
        bias = layer.bias
        if bias is not None and not isinstance(bias, fx.Node):
            bias = graph.get_attr(f"{layer.name}.bias")
        source = argument(node, 0, "input")  # not layer.input: that layer may have been replaced since
        target, args = CpuDenseEngine().call(spec_of(layer, WHOLE), source, packed, bias)
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    supersede(graph, [node], new)
    erase_orphans(graph, [layer.weight.node] if layer.weight.node is not None else [])
