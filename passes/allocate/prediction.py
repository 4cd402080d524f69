"""The predicted damage of every layer under every pattern of its menu (the measures are in pruning/damage.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from mpcompile.calibration.moments import Moments, collect
from mpcompile.calibration.sensitivity import Batch, batch_length, output_energy, samples
from mpcompile.errors import ConfigError, InputError
from mpcompile.ir.module import IRModule
from mpcompile.passes.allocate.menu import Candidate
from mpcompile.passes.base import Context
from mpcompile.pruning import damage
from mpcompile.pruning.edge_budget import layer_weights
from mpcompile.rmt.analysis import study

CALIBRATED, MP, MAGNITUDE, SEB, UNIFORM = "calibrated", "mp", "magnitude", "seb", "uniform"
DAMAGES = (CALIBRATED, MP, MAGNITUDE, SEB, UNIFORM)
HELD_OUT = 0.25  # share of the calibration batches that is held out for comparing choices
GRADIENT_SAMPLES = 128  # approximate number of samples for the gradients of the outputs
_PART = 8  # samples whose activations a backward pass holds


@dataclass
class Samples:
    """Calibration data in two parts.

    Attributes:
        fit: batches to predict damage with.
        held_out: batches to compare choices on.
        moments: layer name -> moments of its dense inputs, from ``fit``.
    """

    fit: list[Batch]
    held_out: list[Batch]
    moments: dict[str, Moments]


def split_samples(
    gm: IRModule, ctx: Context, candidates: Sequence[Candidate], kind: str, compare: bool
) -> Samples | None:
    """Split the calibration samples into two parts, with the moments of the first; None if nothing needs them.

    Args:
        kind: one of :data:`DAMAGES`.
        compare: True to hold samples out for comparing choices.

    Raises:
        ConfigError: ``kind`` needs calibration data, and there is none.
        InputError: the calibration data has no batch.
    """
    if ctx.calibration is None:
        if kind == CALIBRATED:
            raise ConfigError("damage='calibrated' needs calibration data", expected="calibration=...", found="None")
        return None
    if kind == UNIFORM or (kind != CALIBRATED and not compare):
        return None
    model = ctx.imported(gm)
    everything = list(ctx.calibration.batches(model))
    if not everything:
        raise InputError("calibration is empty", expected="at least one batch", found="none")
    if len(everything) == 1:  # a batch that cannot be split stays one part, and nothing is compared
        everything = list(samples(everything[0], model, max(1, batch_length(everything[0], model) // 4)))
    held = math.ceil(HELD_OUT * len(everything)) if compare and len(everything) > 1 else 0
    fit = everything[: len(everything) - held]
    sizes = {candidate.name: max((p.m for p in candidate.masks), default=1) for candidate in candidates}
    moments = collect(model, fit, sizes, ctx.calibration.memory)
    return Samples(fit, everything[len(fit) :], moments)


def predict(
    gm: IRModule, ctx: Context, candidates: list[Candidate], kind: str, data: Samples | None, target: float
) -> dict[str, str]:
    """Fill in the damage of every option.

    Args:
        kind: one of :data:`DAMAGES`; see :class:`mpcompile.passes.allocate.Allocate`.
        target: MACs or bytes to save.

    Returns:
        ``"LAYER PATTERN"`` -> why that option was removed from the menu.
    """
    if kind == UNIFORM:
        for candidate in candidates:
            candidate.costs = [0.0] * len(candidate.options)
        return {}
    if kind == CALIBRATED:
        assert data is not None  # split_samples() raises without calibration data
        _predict_calibrated(gm, ctx, candidates, data)
        return {}
    fits = [_fit(candidate, ctx) for candidate in candidates]
    if kind == SEB:
        for candidate, w in zip(candidates, _seb(candidates, fits, target), strict=True):
            energy = damage.removed_energy(candidate.uses[0].weight.tensor, candidate.masks)
            candidate.set_costs([e / w**2 for e in energy])
    else:
        for candidate, fit in zip(candidates, fits, strict=True):
            candidate.set_costs(_removed(candidate, fit, kind))
    return _admit(candidates, fits, target) if kind in (MP, SEB) else {}


def _predict_calibrated(gm: IRModule, ctx: Context, candidates: Sequence[Candidate], data: Samples) -> None:
    """Predict damage from the inputs of the layers and the gradients of their outputs."""
    model = ctx.imported(gm)
    length = batch_length(data.fit[0], model)
    some = data.fit[:: max(1, len(data.fit) * length // GRADIENT_SAMPLES)]
    energy = output_energy(model, {c.name: c.uses for c in candidates}, some, ctx.seed, _PART)
    for candidate in tqdm(candidates, desc="allocate", unit="layer", disable=None):
        weight, name = candidate.uses[0].weight.tensor, candidate.name
        costs = damage.calibrated(weight, data.moments[name], candidate.masks, energy[name], ctx.refit)
        candidate.set_costs(costs)


def _removed(candidate: Candidate, fit: Mapping[str, Any], kind: str) -> list[float]:
    """Return damage predicted from the weight alone: the energy of the removed values, or of the noise among them."""
    weight = candidate.uses[0].weight.tensor
    if kind == MAGNITUDE or fit["verdict"] != "mp":
        square = float(weight.detach().double().square().mean()) or 1.0
        share = weight.numel() if kind == MP else 1.0
        return [e / square / share for e in damage.removed_energy(weight, candidate.masks)]
    noise = fit["noise_share"] * float(weight.detach().double().square().sum())
    return damage.gaussian(weight, noise, candidate.masks)


def _fit(candidate: Candidate, ctx: Context) -> dict[str, Any]:
    """Return the Marchenko-Pastur fit of a weight: the one that Analyze recorded in the Plan, else a new one."""
    entry = ctx.plan.layers.get(candidate.name)
    known = {} if entry is None else entry.notes.get("analyze", {})
    return known or study(candidate.name, candidate.uses[0].weight.tensor.detach()).notes()


def _seb(candidates: Sequence[Candidate], fits: Sequence[Mapping[str, Any]], target: float) -> list[float]:
    """Return the weights w of Spectral Edge Budgeting at the sparsity that the target requires."""
    most = sum(candidate.saved[-1] / max(1e-9, 1 - candidate.density[-1]) for candidate in candidates)
    sparsity = min(1.0, target / most)
    edges = {candidate.name: fit["edge"] for candidate, fit in zip(candidates, fits, strict=True)}
    return list(layer_weights(edges, sparsity).values())


def _admit(candidates: Sequence[Candidate], fits: Sequence[Mapping[str, Any]], target: float) -> dict[str, str]:
    """Remove from the menus patterns that would cost a layer more than noise, if the target can be met without them.

    Returns:
        ``"LAYER PATTERN"`` -> reason, or a single reason under ``""`` if nothing was removed for the target's sake.
    """
    refused: dict[str, str] = {}
    admitted: list[list[int]] = []
    for candidate, fit in zip(candidates, fits, strict=True):
        bad = damage.inadmissible(candidate.uses[0].weight.tensor, fit, candidate.masks)
        places = [i for i, p in enumerate(candidate.options) if p is None or p not in bad]
        admitted.append(places or [0])
        refused |= {f"{candidate.name} {pattern}": why for pattern, why in bad.items()}
    most = sum(max(candidate.saved[i] for i in places) for candidate, places in zip(candidates, admitted, strict=True))
    if most < target:
        return {"": "patterns that remove structure were left in the menu: the target cannot be met without them"}
    for candidate, places in zip(candidates, admitted, strict=True):
        candidate.options = [candidate.options[i] for i in places]
        candidate.saved = [candidate.saved[i] for i in places]
        candidate.costs = [candidate.costs[i] for i in places]
    return refused
