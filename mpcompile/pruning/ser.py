"""Spectral Edge Reallocation (SER): sparsify, estimate, restore. The result is an unstructured source mask, towards
which N:M masks are drawn.

Weights are first removed by magnitude alone. Then, in each of a few cycles, more weights are removed than wanted, more
of them from layers with a high noise edge; the removed weights are trained for a short while, with all others frozen,
and those that move furthest are restored.

Source: arXiv 2606.02608, Online Resource 2, "Spectral Edge Reallocation" and "Hybrid Magnitude--SER". Choices that the
paper leaves open:

- Removed weights are trained from zero, towards the logits of the dense model. If they started from their own values,
  the network would be the dense model, whose distance to itself has no gradient.
- Movement is divided by the layer's weight w, not multiplied: a layer that gives up more gets less back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mpcompile.capture.signature import call_graph, call_of
from mpcompile.data.outputs import class_scores, logits_of
from mpcompile.errors import InputError
from mpcompile.ir.effects import own_copies
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import exact, training_flags
from mpcompile.pruning.edge_budget import layer_weights

SPARSITY = 0.35  # sparsity of the source mask in the paper's main result, ViT-B/16 2:4 + ToMe
_MAGNITUDE = 0.20  # up to this sparsity, weights are removed by magnitude alone
_CYCLE = 0.05  # sparsity that a cycle adds
_RESTORED = 0.03  # share of all weights that a cycle removes beyond its goal, and restores
_LR = 4e-4
_MOST_STEPS = 128  # training steps per cycle; one pass over the calibration data, but at least 4, if that is shorter


def _smallest(scores: Mapping[str, Tensor], among: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return boolean masks of the ``count`` smallest scores of all layers together, chosen where ``among`` is True."""
    flat = torch.cat([score[among[name]].flatten() for name, score in scores.items()])
    chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    chosen[flat.argsort(stable=True)[:count]] = True
    masks, start = {}, 0
    for name in scores:
        mask, size = torch.zeros_like(among[name]), int(among[name].sum())
        mask[among[name]] = chosen[start : start + size]
        masks[name], start = mask, start + size
    return masks


def _movement(
    gm: IRModule,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    batches: Sequence[Any],
    targets: Sequence[Tensor],
    steps: int,
) -> dict[str, Tensor]:
    """Return how far every removed weight moves, |change|, when the removed weights alone are trained from zero."""
    reservoir = {name: torch.zeros_like(w).requires_grad_() for name, w in weights.items()}
    optimizer = torch.optim.AdamW(reservoir.values(), lr=_LR, weight_decay=0.0)
    for inputs, target in itertools.islice(itertools.cycle(zip(batches, targets, strict=True)), steps):
        state = {name: torch.where(kept[name], w, reservoir[name]) for name, w in weights.items()}
        output = torch.func.functional_call(gm, state, *call_of(gm, own_copies(gm, inputs)))
        logits = logits_of(output).float()
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
    """Return the source masks, True for the weights that they keep.

    Args:
        gm: the dense graph (tokens may be merged); not changed. It returns logits (batch, classes).
        weights: full name in the graph -> weight, for each weight to mask.
        edges: noise edge σ₊ of each weight, by the same names.
        batches: the graph inputs of each batch of calibration data, unlabelled.
        sparsity: share of all these weights that the source removes; above 0 and below 0.97.
        progress: show a progress bar; None shows one on a terminal.

    Returns:
        Boolean masks of the weights' shapes; together they keep exactly ``1 - sparsity`` (rounded) of all weights.

    Raises:
        InputError: the graph returns no logits, there is no batch, or the sparsity is out of range.
    """
    if not 0 < sparsity < 1 - _RESTORED:
        raise InputError(
            "the source's sparsity is out of range", expected="more than 0, less than 0.97", found=sparsity
        )
    data = [list(batch) for batch in batches]
    if not data:
        raise InputError("calibration is empty", expected="at least one batch", found="none")
    dense = {name: w.detach() for name, w in weights.items()}
    total = sum(w.numel() for w in dense.values())
    kept = {name: torch.ones_like(w, dtype=torch.bool) for name, w in dense.items()}
    with training_flags(gm, False), torch.enable_grad():
        targets = _dense_logits(gm, data)
        for index, goal in enumerate(
            tqdm(_goals(sparsity), desc="ser", unit="cycle", disable=None if progress is None else not progress)
        ):
            share = layer_weights(edges, goal)
            removed = total - sum(int(mask.sum()) for mask in kept.values())
            extra = 0 if index == 0 else round(_RESTORED * total)
            scores = {name: w.abs() / share[name] for name, w in dense.items()}
            for name, mask in _smallest(scores, kept, round(goal * total) - removed + extra).items():
                kept[name] &= ~mask
            if not extra:
                continue
            movement = _movement(gm, dense, kept, data, targets, min(_MOST_STEPS, max(4, len(data))))
            scores = {name: -moved / share[name] for name, moved in movement.items()}
            for name, mask in _smallest(scores, {name: ~mask for name, mask in kept.items()}, extra).items():
                kept[name] |= mask
    return kept


def _goals(sparsity: float) -> list[float]:
    """Return the sparsity after each cycle; the first is reached by magnitude alone."""
    if sparsity <= _MAGNITUDE:
        return [sparsity]
    stages = [_MAGNITUDE + _CYCLE * i for i in range(1, 100) if _MAGNITUDE + _CYCLE * i < sparsity - 1e-9]
    return [_MAGNITUDE, *stages, sparsity]


@torch.no_grad()
def _dense_logits(gm: IRModule, data: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Return the graph's logits on every batch, float32."""
    logits = [class_scores(call_graph(gm, own_copies(gm, batch))) for batch in data]
    if any(table is None for table in logits):
        raise InputError("score='ser' needs a model that returns logits", expected="a tensor (batch, classes)")
    return [table.float() for table in logits if table is not None]
