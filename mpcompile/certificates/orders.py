"""Channel orders: repeat on the dense model the channel reordering with which the sparse model was made.

The sparse model's weights are those of the dense model with channels reordered (the ``permute`` pass); the two graphs
match only once the dense model has the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.capture.importers import import_model
from mpcompile.capture.signature import call_graph
from mpcompile.certificates.pair import check_same
from mpcompile.data.outputs import numbers_of
from mpcompile.errors import GraphError
from mpcompile.ir.module import IRModule
from mpcompile.ir.view import LayerOp, layers
from mpcompile.passes.channels.axes import ChannelAnalysis, analyse
from mpcompile.passes.permute import Orders, classes, fold


def replay_orders(dense: nn.Module, sparse: nn.Module, inputs: Sequence[Tensor]) -> tuple[nn.Module, int]:
    """The dense model with its channels in the sparse model's order, and the number of channel classes reordered.

    Raises:
        GraphError: the plan does not hold the orders, or they do not fit this model.
    """
    plan = sparse.meta.get("mpcompile.plan") if isinstance(sparse, IRModule) else None
    records = [r.decision.get("classes", []) for r in plan.passes if r.name == "permute"] if plan is not None else []
    entries = [entry for record in records for entry in record]
    if not entries:
        return dense, 0
    if any("order" not in entry for entry in entries):
        raise GraphError(
            "the plan says that channels were reordered, but not how",
            hint="make the sparse model again with this version's mpcompile.transform",
        )
    gm = import_model(dense, tuple(inputs)).gm
    analysis = analyse(gm, list(inputs))
    orders = _orders(entries, analysis, {layer.name: layer for layer in layers(gm)})
    with torch.no_grad():
        before = call_graph(gm, inputs)
        fold(gm, analysis, orders)
        after = call_graph(gm, inputs)
    complaint = "the plan's order of channels changes the dense model"
    check_same(numbers_of(after), numbers_of(before), complaint, "pass the model that the sparse one was made from")
    return gm, len(entries)


def _orders(entries: Sequence[Mapping[str, Any]], analysis: ChannelAnalysis, uses: Mapping[str, LayerOp]) -> Orders:
    """The orders that the plan's entries describe, for the channels of this graph."""
    names = [name for entry in entries for name in entry["layers"]]
    candidates = classes(analysis, {name: uses[name] for name in names if name in uses})
    orders: Orders = {}
    for entry in entries:
        channels = next((c for c in candidates if entry["layers"][0] in c.readers), None)
        order = torch.tensor(entry["order"])
        owners = 0 if channels is None else 1 if channels.owner is None else analysis.atoms.size[channels.owner]
        if channels is None or order.shape != (owners, analysis.atoms.size[channels.atom]):
            raise GraphError(
                "the plan's order of channels does not fit the dense model",
                layer=entry["layers"][0],
                expected="the model that the sparse one was made from",
            )
        orders[channels.atom] = (channels.owner, order)
    return orders
