"""MACs and weight bytes of a build, counted from its graph and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from mpcompile.backend import CompiledGraph
from mpcompile.data.calls import call_form, graph_inputs
from mpcompile.ir.macs import count, flop_counter
from mpcompile.ir.module import IRModule
from mpcompile.ir.shapes import propagate
from mpcompile.measure.builds import InBf16, InRuntime, module_of
from mpcompile.measure.environment import first_tensor
from mpcompile.measure.report import COMPILED, Row


def fill_in_cost(row: Row, build: Any, batch: Any, graphs: Sequence[CompiledGraph], fell_back: bool) -> None:
    """Set the MACs per sample and the weight bytes of a row.

    Args:
        row: the row to fill in.
        build: the build that the row describes.
        batch: one batch of inputs.
        graphs: compiled graphs that ran in the audited build.
        fell_back: the audited build ran the model's eager code instead.
    """
    module = module_of(build)
    if not isinstance(module, nn.Module):
        return
    row.weight_bytes = _parameter_bytes(module)
    if isinstance(module, IRModule):
        row.macs, row.paper_macs = _graph_macs(module, batch)
    else:
        row.macs = row.paper_macs = dense_macs(module, build.cast(batch) if isinstance(build, InBf16) else batch)
    if isinstance(build, InRuntime):
        row.weight_bytes = build.weight_bytes
    if row.name != COMPILED or module is build:
        return
    if fell_back:
        row.macs = row.paper_macs = dense_macs(module, batch)
    elif graphs:
        row.weight_bytes = _lowered_bytes(graphs, module)
        if not isinstance(module, IRModule):
            row.macs = sum(g.plan.macs.executed for g in graphs)
            row.paper_macs = sum(g.plan.macs.paper for g in graphs)


def dense_macs(model: nn.Module, batch: Any) -> int | None:
    """Return the MACs per sample of an unchanged module; None without samples, or if it cannot run on fake tensors."""
    samples = first_tensor(batch).shape[0]
    if not samples:
        return None
    try:
        # With gradients enabled, for the counter's module tracker: see mpcompile.ir.shapes.propagate.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
            args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, call_form(model, batch))
            with flop_counter() as counter:
                model(*args, **kwargs)
    except Exception:
        return None
    return counter.get_total_flops() // 2 // samples


def _graph_macs(gm: IRModule, batch: Any) -> tuple[int, int]:
    """Return the MACs per sample of a masked graph: executed, and by the paper's convention (see ``Macs``)."""
    propagate(gm, graph_inputs(gm, batch))
    macs, _ = count(gm)
    return macs.executed, macs.paper


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _lowered_bytes(graphs: Sequence[CompiledGraph], model: nn.Module) -> int:
    """Return the parameter bytes as stored: packed where lowered (as in the last such graph), else the module's."""
    slots = [slot for g in graphs if g.lowered for slot in g.slots]
    saved = {slot.name: slot.dense_nbytes - slot.nbytes for slot in slots}
    return _parameter_bytes(model) - sum(saved.values())
