"""Merge tokens in a model, and read the decision."""

from __future__ import annotations

from typing import Any

from torch import nn

from mpcompile import Config, Pipeline, transform
from mpcompile.ir.module import IRModule
from mpcompile.passes.merge_tokens import MergeTokens


def merged(model: nn.Module, x: Any, r: Any, tome_method: str = "tome", **options: Any) -> IRModule:
    """Return a model with ``r`` tokens merged per block, as ToMe does unless told otherwise, and nothing masked."""
    config = Config(pattern="dense", tome_r=r, tome_method=tome_method, **options)
    return transform(model, x, config, pipeline=Pipeline([MergeTokens()]))


def decision(gm: IRModule) -> dict[str, Any]:
    """Return the recorded decision of the last pass."""
    return gm.plan.passes[-1].decision
