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
from mpcompile.certificates.pair import check_same
from mpcompile.config import Config
from mpcompile.data.outputs import numbers_of
from mpcompile.errors import MPCompileError
from mpcompile.ir.module import IRModule
from mpcompile.passes.dead_tokens import SkipDeadTokens, skips_tokens
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
    complaint = "the dense model's outputs change if it skips the tokens that nothing reads"
    check_same(after, before, complaint, "make the sparse model with skip_dead_tokens=False")
    return gm


def _skips(model: nn.Module) -> bool:
    plan = plan_of(model) if isinstance(model, IRModule) else None
    return plan is not None and skips_tokens(plan)
