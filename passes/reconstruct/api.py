"""``mpcompile.reconstruct``: reconstruct a graph that was transformed earlier, given the dense model."""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.calibration.data import batches, peek
from mpcompile.capture.importers import import_model
from mpcompile.capture.signature import call_graph
from mpcompile.certificates.orders import replay_orders
from mpcompile.config import Config
from mpcompile.data import ranks
from mpcompile.data.outputs import class_scores, numbers_of
from mpcompile.errors import GraphError
from mpcompile.ir.effects import own_copies, storage
from mpcompile.ir.module import Imported, IRModule, masked
from mpcompile.ir.numerics import exact, training_flags, with_ordinary_tensors
from mpcompile.kernels import ops
from mpcompile.passes.base import Dense, Results
from mpcompile.passes.reconstruct.decide import Reconstruct
from mpcompile.passes.reconstruct.sides import sides
from mpcompile.pipeline import Pipeline, plan_of, run_pipeline
from mpcompile.plan import is_lowered
from mpcompile.reconstruction.options import Reconstruction

_SAME = 1e-3  # relative difference of the outputs of the same function, in two graphs
_ALIKE = 0.3  # cosine of kept and dense weights; refitted ones have .8 and more, unrelated ones about 0
_HINT = "pass the dense model that the graph was made from, with its weights as they were"


@with_ordinary_tensors
@exact()
def reconstruct(
    gm: nn.Module,
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    minutes: float | None = None,
    options: Reconstruction | None = None,
    seed: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    memory: int = 2 << 30,
) -> IRModule:
    """Train the kept weights of a masked graph towards the dense model's activations: return a graph that is closer.

    Neither graph nor model is changed. Residual blocks, or their attention and MLP, are trained one after the other,
    each on the outputs of those before it, without labels; masks stay as they are. A region whose error on held-out
    images does not fall keeps its values; ``gm.plan`` has the errors before and after.

    With several ranks (torchrun), every rank calls this with the same arguments; they share the images, and all get the
    same result.

    Args:
        gm: a graph from :func:`mpcompile.transform`, as it is, distilled, or loaded.
        model: the dense model that it was made from.
        calibration: an iterable of batches of images, as for :func:`mpcompile.transform`; a few hundred images.
        minutes: time budget, from which the numbers of views and epochs follow; None: that of ``options``.
        options: learning rates and lengths.
        seed: seeds every random choice; None: that of ``options``.
        folder: a folder that keeps finished regions, from which an interrupted run on the same weights, images and
            options resumes.
        memory: bytes of activations to hold in memory; the rest goes to a temporary folder.

    Raises:
        MPCompileError: the graph is not masked or is lowered, the model is not the one that it was made from, there are
            no images, or the time budget is too short.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> images = [torch.randn(8, 16) for _ in range(4)]
        >>> gm = mpcompile.transform(model, config=mpcompile.Config(exclude=()), calibration=images)
        >>> closer = mpcompile.reconstruct(gm, model, images, options=mpcompile.Reconstruction(views=1, epochs=2))
        >>> [region["name"] for region in closer.plan.passes[-1].decision["regions"]]
        ['0', '2']
    """
    chosen = options or Reconstruction()
    chosen = replace(chosen, minutes=minutes) if minutes is not None else chosen
    chosen = replace(chosen, seed=seed) if seed is not None else chosen
    plan = plan_of(gm) if isinstance(gm, fx.GraphModule) else None
    if not isinstance(gm, IRModule) or plan is None or is_lowered(gm, plan) or next(masked(gm), None) is None:
        raise GraphError(
            "only a masked graph can be reconstructed",
            expected="the result of mpcompile.transform, with masks, before it is lowered",
            found=type(gm).__name__ if plan is None else "a graph that is lowered, or has no masks",
        )
    first, calibration = peek(calibration)
    imported = import_model(gm, first if isinstance(first, (Tensor, dict)) else (first[0],))
    inputs = next(iter(batches(imported, [first])))
    results = Results()
    results.put(Dense(dense_tensors(imported, model, inputs)))
    step = Reconstruct(chosen, shared=ranks.active())
    return run_pipeline(
        imported,
        Config(),
        Pipeline([step]),
        calibration=calibration,
        statistics=None if folder is None else Path(folder),
        memory=memory,
        seed=chosen.seed,
        results=results,
    )


@torch.no_grad()
def dense_tensors(imported: Imported, model: nn.Module, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """Return the dense model's tensors by their names in a graph made from it, channels in the graph's order.

    Raises:
        GraphError: the graph was not made from this model.
    """
    gm, whole = imported.gm, import_model(model, tuple(inputs)).gm
    wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs]
    # The order is checked in float64, and values come back from there bit for bit.
    dense, _ = replay_orders(copy.deepcopy(whole).double(), gm, wide)
    theirs, own = _tensors(dense), _tensors(gm)
    names = {storage(tensor): name for name, tensor in own.items()}
    weights = [names[storage(weight)] for weight, _, _ in masked(gm) if storage(weight) in names]
    for name in weights:
        if name not in theirs:
            raise GraphError("the dense model lacks a masked weight", layer=name, hint=_HINT)
    _check_alike({name: (own[name], theirs[name]) for name in weights})
    floats = {n: t for n, t in theirs.items() if t.is_floating_point() and n in own and own[n].is_floating_point()}
    found = {name: tensor.detach().to(own[name].dtype, copy=True) for name, tensor in floats.items()}
    _, twin = sides(gm, found)
    if not any(node.target is ops.token_merge for node in gm.graph.nodes):  # merged tokens change the outputs
        _check_same(twin, whole, inputs)
    return found


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **module.state_dict(keep_vars=True)}


def _check_alike(weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Refuse a model of the same form whose weights have nothing to do with those kept in the graph.

    Refits and distillation change what is kept, but not beyond recognition; weights of another training are unrelated.
    """
    cosines = {}
    for name, (own, dense) in weights.items():
        if own.shape == dense.shape:
            kept = own != 0
            cosines[name] = float(torch.cosine_similarity(own[kept].double(), dense[kept].double(), dim=0))
    if cosines and statistics.median(cosines.values()) < _ALIKE:
        name = min(cosines, key=cosines.__getitem__)
        raise GraphError(
            "the weights kept in the graph are not those of this model",
            layer=name,
            expected=f"a cosine of {_ALIKE:g} or more between kept and dense weights in most layers",
            found=f"{cosines[name]:.2g}",
            hint=_HINT,
        )


def _check_same(twin: fx.GraphModule, model: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Refuse a model whose outputs are not those of the graph with its weights."""
    with training_flags(model, False):
        outputs = [call_graph(side, own_copies(side, inputs)) for side in (twin, model)]
    scores = [class_scores(output) for output in outputs]
    ours, theirs = (numbers_of(o) if s is None else s for o, s in zip(outputs, scores, strict=True))
    if ours.shape != theirs.shape:
        return  # outputs that nothing needs were left out of the graph
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
    if not difference <= _SAME:
        raise GraphError(
            "the graph with the dense model's weights does not compute what the model computes",
            expected=f"a relative difference of at most {_SAME:g}",
            found=f"{difference:.2g}",
            hint=_HINT,
        )
