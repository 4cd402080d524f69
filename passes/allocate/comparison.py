"""The loss of the whole model on held-out calibration samples under a choice of patterns."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from mpcompile.calibration.norms import batch_norms, write
from mpcompile.calibration.sensitivity import divergence
from mpcompile.ir.module import Imported, IRModule, Lifted
from mpcompile.ir.view import layers
from mpcompile.passes.allocate.menu import Candidate
from mpcompile.passes.allocate.prediction import Samples
from mpcompile.passes.base import Context
from mpcompile.pruning import damage
from mpcompile.pruning.project import reestimate


def held_out_loss(
    gm: IRModule, ctx: Context, candidates: Sequence[Candidate], data: Samples, chosen: Sequence[int]
) -> float:
    """Return the divergence between the outputs of the dense and of the pruned model on held-out samples.

    All layers are projected as the prediction of damage assumes, from moments of the dense model, and BatchNorms are
    re-estimated. That is cheaper than computing the final masks, and treats all choices alike.

    Args:
        gm: the dense model; not changed, since a copy is pruned.
        chosen: index into each candidate's options.
    """
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    own = [n.name not in ctx.lifted.tensors for n in places]
    trial, lifted = _pruned(gm, ctx, candidates, data, chosen)
    if batch_norms(trial):
        assert ctx.calibration is not None  # the samples come from it
        as_given = [{str(n.target): v for n, v, o in zip(places, b, own, strict=True) if o} for b in data.fit]
        model = Imported(trial, ctx.inputs, lifted, [])
        write(trial, reestimate(model, as_given, ctx.calibration.memory))
    values = [[lifted.tensors.get(n.name, v) for n, v in zip(places, b, strict=True)] for b in data.held_out]
    return divergence(gm, trial, data.held_out, values)


def _pruned(
    gm: IRModule, ctx: Context, candidates: Sequence[Candidate], data: Samples, chosen: Sequence[int]
) -> tuple[IRModule, Lifted]:
    """Return a copy of the graph with projected weights, and its lifted parameters."""
    trial = copy.deepcopy(gm)
    lifted = replace(ctx.lifted, tensors=dict(ctx.lifted.tensors))
    weights = {layer.name: layer.weight for layer in layers(trial, lifted)}
    for candidate, i in zip(candidates, chosen, strict=True):
        pattern, weight = candidate.options[i], weights[candidate.name]
        if pattern is None:
            continue
        new = damage.projected(weight.tensor, data.moments[candidate.name], pattern, ctx.refit)
        if weight.node is not None and weight.node.op == "placeholder":
            lifted.tensors[weight.node.name] = new
        else:
            weight.tensor.data.copy_(new)
    return trial, lifted
