"""LowerMerges: run token merging as one call of the CPU engine.

Inductor compiles a merge into a dozen small kernels, each with a parallel region of its own; a merge of a few hundred
tokens takes less time than these regions need to start. Exported programs keep the plain operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import fake_value
from mpcompile.kernels import ops, schema
from mpcompile.kernels.cpu import build
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.passes.base import Context, Decision, Pass


@dataclass(frozen=True, eq=False)
class MergeLowering(Decision):
    """Names of the merges that run on the kernel; and merges left to Inductor -> why."""

    merges: tuple[str, ...]
    left: Mapping[str, str]


class LowerMerges(Pass):
    """``token_merge`` -> ``nm_token_merge``. Afterwards the graph is for inference only.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower, LowerMerges
        >>> Pipeline([Lower(), LowerMerges()])
        Pipeline([lower, lower_merges])
    """

    name = "lower_merges"
    decision_type = MergeLowering

    def plan(self, gm: IRModule, ctx: Context) -> MergeLowering:
        merges: list[str] = []
        left: dict[str, str] = {}
        for node in gm.graph.nodes:
            if node.target is not ops.token_merge:
                continue
            why = _obstacle(node, ctx.config.engine)
            if why is None:
                merges.append(node.name)
            else:
                left[node.name] = why
        return MergeLowering(tuple(merges), left)

    def summary(self, decision: MergeLowering) -> str:
        reasons = list(decision.left.values())
        text = [f"{len(decision.merges)} merges on nm_token_merge"] if decision.merges else []
        text += [f"{reasons.count(why)} left to torch: {why}" for why in dict.fromkeys(reasons)]
        return "; ".join(text) or "no merges"

    def apply(self, gm: IRModule, decision: MergeLowering, ctx: Context) -> bool:
        for node in gm.graph.nodes:
            if node.name in decision.merges:
                node.target = ops.nm_token_merge
        if decision.merges:
            native.kernels()  # builds the operators before the first call
        return bool(decision.merges)


def _obstacle(node: fx.Node, engine: str) -> str | None:
    """Return why a merge cannot run on the kernel, or None if it can."""
    if engine != "auto" and not engine.startswith("cpu"):
        return f"engine {engine} was asked for"
    args = schema.TokenMergeArgs.bind(node)
    for part in (args.x, args.keys, args.size, args.saliency):
        if part is None:
            continue
        fake = fake_value(part)
        if not isinstance(fake, Tensor) or fake.device.type != "cpu" or fake.dtype is not torch.float32:
            return "it is not fp32 on the CPU"
        if not all(isinstance(size, int) for size in fake.shape):
            return "its sizes are not fixed"
    return build.unavailable()
