"""SER: sparsify, estimate, restore. An unstructured source mask, towards which the N:M masks are drawn.

Weights are first removed by magnitude, layers with a high noise edge more than others. Then, in a few cycles, more are
removed than wanted; those removed are trained for a short while, with all others frozen, and those that move furthest
come back. Source: arXiv 2606.02608, the spectral-edge reallocation loop and the hybrid magnitude-SER source mask.

Two places where the paper leaves a choice. What is removed is trained from zero, towards the logits of the dense model:
from the values it had, the network would start as the dense model, whose distance to itself has no gradient. And
movement is divided by the layer's weight, not multiplied: a layer that gives up more gets less back.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mpcompile.errors import InputError
from mpcompile.ir.effects import own_copies
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import exact, training_flags

SPARSITY = 0.35  # of the source mask of the paper's main row
_MAGNITUDE = 0.20  # up to here weights go by magnitude alone
_CYCLE = 0.05  # sparsity that a cycle adds
_RETURNED = 0.03  # share of all weights that a cycle removes beyond that, and gives back
_LR = 4e-4
_MOST_STEPS = 128  # of training a cycle; one pass over the calibration data where that is shorter


def layer_weights(edges: Mapping[str, float], sparsity: float) -> dict[str, float]:
    """How readily each layer gives up weights at a sparsity: max(0.1, 1 + beta d z).

    z is the layer's noise edge, standardised over the layers; beta and d(s) = max(0, 1 - s / s_d) are the paper's.

    Example:
        >>> layer_weights({"a": 1.0, "b": 3.0}, 0.3)
        {'a': 0.6, 'b': 1.4}
    """
    beta, end = (0.5, 0.3) if sparsity <= 0.2 else (1.0, 0.5) if sparsity <= 0.4 else (1.25, 0.7)
    beta, end = (2.0, 0.85) if sparsity > 0.55 else (beta, end)
    mean, spread = statistics.fmean(edges.values()), statistics.pstdev(edges.values())
    factor = beta * max(0.0, 1 - sparsity / end)
    return {
        name: round(max(0.1, 1 + factor * (edge - mean) / spread), 6) if spread else 1.0 for name, edge in edges.items()
    }


def _smallest(scores: Mapping[str, Tensor], among: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """The ``count`` smallest scores of all layers, where ``among`` allows: boolean masks."""
    flat = torch.cat([score[among[name]].flatten() for name, score in scores.items()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(stable=True)[:count]] = True
    found, start = {}, 0
    for name in scores:
        mask, size = torch.zeros_like(among[name]), int(among[name].sum())
        mask[among[name]] = chosen[start : start + size]
        found[name], start = mask, start + size
    return found


def _movement(
    gm: IRModule,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    steps: int,
) -> dict[str, Tensor]:
    """|change| of every removed weight after training the removed ones, and only those, from zero."""
    reservoir = {name: torch.zeros_like(w).requires_grad_() for name, w in weights.items()}
    optimizer = torch.optim.AdamW(reservoir.values(), lr=_LR, weight_decay=0.0)
    for inputs, target in itertools.islice(itertools.cycle(zip(batches, targets, strict=True)), steps):
        state = {name: torch.where(kept[name], w, reservoir[name]) for name, w in weights.items()}
        logits = torch.func.functional_call(gm, state, tuple(own_copies(gm, inputs))).float()
        soft = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
        loss = soft + F.mse_loss(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: value.detach().abs() for name, value in reservoir.items()}


@exact()
def source_masks(
    gm: IRModule,
    weights: Mapping[str, Tensor],
    edges: Mapping[str, float],
    batches: Iterable[Sequence[Any]],
    sparsity: float = SPARSITY,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    """Which weights the source keeps.

    Args:
        gm: the dense graph (tokens may be merged); not changed. It returns logits (batch, classes).
        weights: full name of each weight to mask, in the graph -> the weight.
        edges: noise edge (sigma_+) of each, by the same names.
        batches: graph inputs of each batch of calibration data; unlabelled.
        sparsity: share of all these weights that the source removes, more than nothing and less than all.
        progress: a bar; None shows one on a terminal.

    Returns:
        Boolean masks of the weights' shapes; together they keep exactly ``1 - sparsity`` (rounded) of all weights.

    Raises:
        InputError: the graph returns no logits, no batch, or a sparsity that can't be.
    """
    if not 0 < sparsity < 1 - _RETURNED:
        raise InputError(
            "the source's sparsity is out of range", expected="more than 0, less than 0.97", found=sparsity
        )
    data = [list(batch) for batch in batches]
    if not data:
        raise InputError("calibration is empty", expected="at least one batch", found="none")
    dense = {name: w.detach() for name, w in weights.items()}
    total = sum(w.numel() for w in dense.values())
    kept = {name: torch.ones_like(w, dtype=torch.bool) for name, w in dense.items()}
    stages = [_MAGNITUDE + _CYCLE * i for i in range(1, 100) if _MAGNITUDE + _CYCLE * i < sparsity - 1e-9]
    goals = [min(_MAGNITUDE, sparsity), *stages, sparsity] if sparsity > _MAGNITUDE else [sparsity]
    with training_flags(gm, False), torch.enable_grad():
        with torch.no_grad():
            targets = [gm(*own_copies(gm, batch)) for batch in data]
        if not all(isinstance(t, Tensor) and t.dim() == 2 for t in targets):
            raise InputError("score='ser' needs a model that returns logits", expected="a tensor (batch, classes)")
        targets = [t.float() for t in targets]
        for index, goal in enumerate(
            tqdm(goals, desc="ser", unit="cycle", disable=None if progress is None else not progress)
        ):
            share = layer_weights(edges, goal)
            gone = total - sum(int(mask.sum()) for mask in kept.values())
            extra = 0 if index == 0 else round(_RETURNED * total)
            scores = {name: w.abs() / share[name] for name, w in dense.items()}
            for name, mask in _smallest(scores, kept, round(goal * total) - gone + extra).items():
                kept[name] &= ~mask
            if not extra:
                continue
            moved = _movement(gm, dense, kept, data, targets, min(_MOST_STEPS, max(4, len(data))))
            scores = {name: -value / share[name] for name, value in moved.items()}
            for name, mask in _smallest(scores, {name: ~mask for name, mask in kept.items()}, extra).items():
                kept[name] |= mask
    return kept
