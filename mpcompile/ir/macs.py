"""MAC counts, computed from the tensors and shapes of a graph and never from a config."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import batch_size, shape_of
from mpcompile.ir.spec import operator_of
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels import ops, schema
from mpcompile.kernels.nm_format import check_nm
from mpcompile.plan import Macs

ADD = frozenset({operator.add, operator.iadd, torch.add, torch.ops.aten.add.Tensor})


def is_add(node: fx.Node) -> bool:
    """Return True if a node adds two tensors, as a function or as a method."""
    return node.target in ADD or (node.op == "call_method" and node.target in ("add", "add_"))


def executed_density(layer: LayerOp) -> float:
    """Return n/m if the stored weight is legal N:M in its execution layout, else 1."""
    if layer.pattern is None:
        return 1.0
    weight = layer.weight.tensor.detach()
    if not layer.weight.owned and layer.mask is not None:
        weight = weight * layer.mask.tensor  # a lifted weight is the user's dense one; the graph masks it when it runs
    return layer.pattern.density if check_nm(weight, *layer.pattern) == 0 else 1.0


def node_macs(gm: fx.GraphModule, lifted: Lifted | None = None) -> dict[str, int]:
    """Return layer name -> dense MACs per sample, from the shapes on the graph."""
    batch = batch_size(gm, lifted or Lifted())
    total: dict[str, int] = defaultdict(int)
    for layer in layers(gm, lifted):
        total[layer.name] += layer.node.meta.get("macs", 0) // batch
    return dict(total)


def _merge_charges(gm: fx.GraphModule) -> dict[fx.Node, float]:
    """Return tokens before / tokens after for the nodes between a token merge and the next residual addition.

    Nodes that compute fewer tokens than are left, since nothing reads the others, are charged as they run.
    """
    charges: dict[fx.Node, float] = {}
    order = list(gm.graph.nodes)
    for start, merge in enumerate(order):
        if merge.target is not ops.token_merge:
            continue
        x = next(u for u in merge.users if u.target is operator.getitem and u.args[1] == 0)
        before, after = shape_of(schema.TokenMergeArgs.bind(merge).x), shape_of(x)
        if before is None or after is None:
            continue
        reached = {x}
        stream = {x} | {user for user in x.users if user.target is operator.getitem}  # its tokens, or some of them
        for node in order[start + 1 :]:
            inputs = node.all_input_nodes
            if not reached.intersection(inputs):
                continue
            if is_add(node) and not stream.isdisjoint(inputs):
                break
            reached.add(node)
            if any(after[1] in (shape_of(source) or ())[1:-1] for source in inputs):
                charges[node] = before[1] / after[1]
    return charges


def count(gm: fx.GraphModule, dense: int | None = None, lifted: Lifted | None = None) -> tuple[Macs, dict[str, int]]:
    """Count the MACs of a graph whose nodes carry ``macs`` (see :func:`mpcompile.ir.shapes.propagate`).

    Args:
        gm: the graph.
        dense: MACs per sample of the model before any pass; None when all its tokens and layers are still in ``gm``.

    Returns:
        The totals per sample, and the executed MACs of each layer.
    """
    batch = batch_size(gm, lifted or Lifted())
    density = {layer.node: executed_density(layer) for layer in layers(gm, lifted)}
    names = {layer.node: layer.name for layer in layers(gm, lifted)}
    charges = _merge_charges(gm)
    everything = matching = 0
    executed = paper = 0.0
    per_layer: dict[str, int] = defaultdict(int)
    for node in gm.graph.nodes:
        macs = node.meta.get("macs", 0)
        row = operator_of(node)
        if row is not None and row.matching:
            matching += macs
            continue
        everything += macs
        run = macs * density.get(node, 1.0)
        executed += run
        paper += run * charges.get(node, 1.0)
        if node in names:
            per_layer[names[node]] += round(run / batch)
    totals = (round(executed / batch), round(paper / batch))
    return Macs(round(everything / batch) if dense is None else dense, *totals, matching // batch), dict(per_layer)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter, extended by attention on CPUs: ours, and torch's, which it counts from 2.15 on."""
    fused = (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.mpcompile.nm_attention)
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(fused, _attention_flops))
