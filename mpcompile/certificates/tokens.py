"""Skipped tokens: leave out of the dense model what the sparse one does not compute.

The sparse model may compute in its last block only the tokens that its head reads (the pass ``skip_dead_tokens``). The
two graphs match only once the dense model does the same, which does not change its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpcompile.capture.importers import import_model
from mpcompile.capture.signature import call_graph
from mpcompile.certificates.pair import SAME
from mpcompile.config import Config
from mpcompile.data.outputs import numbers_of
from mpcompile.errors import GraphError, MPCompileError
from mpcompile.ir.module import IRModule
from mpcompile.passes.dead_tokens import SkipDeadTokens
from mpcompile.pipeline import Pipeline, plan_of, run_pipeline


def skip_tokens(dense: nn.Module, sparse: nn.Module, inputs: Sequence[Tensor]) -> nn.Module:
    """The dense model as a graph that skips the tokens that nothing reads, if the sparse model does and it does not.

    A model that cannot be captured is returned as it is.

    Raises:
        GraphError: the graph's outputs differ from the model's.
    """
    if not _skips(sparse) or _skips(dense):
        return dense
    try:
        imported = import_model(dense, tuple(inputs))
        gm = run_pipeline(imported, Config(pattern="dense"), Pipeline([SkipDeadTokens()]))
    except MPCompileError:
        return dense
    with torch.no_grad():
        before, after = numbers_of(dense(*inputs)), numbers_of(call_graph(gm, inputs))
    difference = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
    if not difference <= SAME:
        raise GraphError(
            "the dense model's outputs change if it skips the tokens that nothing reads",
            expected=f"a relative difference of at most {SAME:.0e}",
            found=f"{difference:.1e}",
            hint="make the sparse model with skip_dead_tokens=False",
        )
    return gm


def _skips(model: nn.Module) -> bool:
    plan = plan_of(model) if isinstance(model, IRModule) else None
    records = [] if plan is None else [record for record in plan.passes if record.name == SkipDeadTokens.name]
    return any(record.decision.get("reason") is None for record in records)
