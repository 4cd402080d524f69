"""Damage: what a pattern does to a layer, in units in which layers can be compared.

With data: the loss of the model's output, to second order. Without: from the weights, by how much of them is removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile.calibration.moments import DIAGONAL, FULL, Moments
from mpcompile.ir.numerics import exact
from mpcompile.kernels.nm_format import Pattern, from_rows, to_rows
from mpcompile.pruning import refit, scores
from mpcompile.pruning.knapsack import lost_energy
from mpcompile.pruning.project import DAMPING

_STEPS = 8  # of least squares
MARGIN = 0.1  # by which a finite random matrix may pass its edge
SPIKE_SHARE = 3.0  # times the share of a random matrix


def removed_energy(weight: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    """‖R‖_F² of what a magnitude mask removes from a weight, for each pattern.

    >>> removed_energy(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), [Pattern(2, 4), Pattern(1, 4)])
    [5.0, 14.0]
    """
    squares = to_rows(weight.detach()).double().square()
    by_rank = {m: squares.unflatten(-1, (-1, m)).sort(-1).values.sum((0, 1)).cumsum(0) for m in {p.m for p in patterns}}
    return [float(by_rank[p.m][p.m - p.n - 1]) if p.n < p.m else 0.0 for p in patterns]


def gaussian(weight: Tensor, noise: float, patterns: Sequence[Pattern]) -> list[float]:
    """Relative error of the layer's outputs as the Marchenko-Pastur model has it: rho(N:M) σ̂² N tr C / E‖y‖².

    With inputs that are alike in all directions (C a multiple of the identity), which is all that can be said without
    data, E‖y‖² = ‖W‖_F² tr C / M, and that is rho(N:M) times the noise share of the weight.

    Args:
        noise: NMσ̂², the energy of the weight's noise.
    """
    total = float(weight.detach().double().square().sum()) or 1.0
    return [lost_energy(p) * noise / total for p in patterns]


@exact()
def calibrated(
    weight: Tensor, moments: Moments, patterns: Sequence[Pattern], output_energy: Tensor, refitted: bool = True
) -> list[float]:
    """½ Σ_i G_i d_i' C d_i for each pattern: what the model's output loses if this layer alone gets it.

    d_i is how row i of the weight changes, as :func:`projections` has it, C = E[x x'] of the layer's inputs, G from
    :func:`mpcompile.calibration.sensitivity.output_energy`.
    """
    total = dict.fromkeys(patterns, 0.0)
    rows = to_rows(weight.detach()).float()
    parts = rows.chunk(len(moments.x))
    weights = output_energy.to(rows.device).chunk(len(parts))
    for index, (part, g) in enumerate(zip(parts, weights, strict=True)):
        for pattern, new in projections(part, moments, index, patterns, refitted):
            total[pattern] += float((g * _error(part - new, moments, index)).sum()) / 2
    return [total[p] for p in patterns]


@exact()
def projected(weight: Tensor, moments: Moments, pattern: Pattern, refitted: bool = True) -> Tensor:
    """The weight as :func:`calibrated` has it under one pattern."""
    parts = to_rows(weight.detach()).float().chunk(len(moments.x))
    new = [next(projections(part, moments, i, [pattern], refitted))[1] for i, part in enumerate(parts)]
    return from_rows(torch.cat(new), weight.shape).to(weight.dtype)


def projections(
    rows: Tensor, moments: Moments, index: int, patterns: Sequence[Pattern], refitted: bool
) -> Iterator[tuple[Pattern, Tensor]]:
    """Rows (R, K) of one of a layer's groups under each pattern: a cheap stand-in for the masks to come.

    Within every M columns, optimal brain surgeon; one walk down from M kept values serves all N of that M. Then, with
    full moments and if ``refitted``, a few steps of least squares on the whole row.
    """
    for m in dict.fromkeys(p.m for p in patterns):
        wanted = sorted((p for p in patterns if p.m == m), key=lambda p: -p.n)
        found = {p: torch.empty_like(rows) for p in wanted}
        for group, block in enumerate(moments.block(m)[index].to(rows.device)):
            columns = slice(group * m, (group + 1) * m)
            walk = peel(rows[:, columns], block, [m - p.n for p in wanted])
            for p, new in zip(wanted, walk, strict=True):
                found[p][:, columns] = new
        if refitted and moments.kind == FULL:
            a = scores.damped(moments.xx[index].to(rows.device), DAMPING).float()
            for p, new in found.items():
                kept = scores.top_rows(new.abs(), p)
                found[p] = refit.least_squares(new, rows, a, kept, _STEPS)
        yield from found.items()


def _error(d: Tensor, moments: Moments, index: int) -> Tensor:
    """d C d' of each row (R, K), float64, with as much of C as there is."""
    c, d = moments.xx[index].to(d.device), d.double()
    if moments.kind == FULL:
        return ((d @ c) * d).sum(-1)
    if moments.kind == DIAGONAL:
        return (d.square() * c).sum(-1)
    groups = d.unflatten(-1, (len(c), -1))
    return torch.einsum("rgi,gij,rgj->r", groups, c, groups)


def peel(w: Tensor, c: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
    """Optimal brain surgeon within one group: remove values one at a time, each time the one that costs least once the
    others have moved to make up for it.

    Args:
        w: (R, M), the group's values in every row.
        c: (M, M), second moments of its inputs.
        counts: after how many removals to stop, rising.

    Yields:
        The values (R, M) at each stop, zero where removed.
    """
    p = torch.linalg.inv(scores.damped(c.double(), DAMPING)).to(w).expand(len(w), -1, -1).clone()
    w, row = w.clone(), torch.arange(len(w), device=w.device)
    gone = torch.zeros_like(w, dtype=torch.bool)
    done = 0
    for count in counts:
        for _ in range(count - done):
            diagonal = p.diagonal(dim1=1, dim2=2)
            i = (w.square() / diagonal.clamp(min=1e-30)).masked_fill(gone, torch.inf).argmin(1)
            gone[row, i] = True
            column, pivot = p[row, :, i], diagonal[row, i].clone().clamp(min=1e-30)
            w -= column * (w[row, i] / pivot)[:, None]
            p.baddbmm_(column[:, :, None], (column / pivot[:, None])[:, None, :], alpha=-1)
        done = count
        yield w.masked_fill(gone, 0.0)


@exact()
def inadmissible(weight: Tensor, fit: Mapping[str, Any], patterns: Sequence[Pattern]) -> dict[Pattern, str]:
    """Patterns under which what a magnitude mask removes, R, is more than noise; with the reason.

    R of a weight that is noise is noise itself, of variance rho(N:M) σ̂². So ‖R‖₂ has to stay below (1 + δ) √rho σ₊, and
    its share in the spikes' subspace, ‖U_k' R V_k‖_F / ‖R‖_F, near the k / √(NM) of a random matrix. Weights that don't
    follow the law as they are (without scales taken out) are not judged. Source: method section 2 (ii).

    Args:
        fit: ``verdict``, ``separable``, ``edge``, ``spikes`` and, where there are any, ``blocks``, as from
            :meth:`mpcompile.rmt.analysis.LayerAnalysis.notes`.
    """
    if fit["verdict"] != "mp" or fit.get("separable") or not patterns:
        return {}
    w = to_rows(weight.detach()).float()
    blocks = list(fit.get("blocks", {"": fit}).values())
    found: dict[Pattern, str] = {}
    for pattern in patterns:
        removed = torch.where(to_rows(scores.magnitude_mask(weight, pattern)), 0.0, w)
        pairs = zip(w.chunk(len(blocks)), removed.chunk(len(blocks)), blocks, strict=True)
        why = next((reason for part, r, block in pairs if (reason := _structure(part, r, block, pattern))), None)
        if why:
            found[pattern] = why
    return found


def _structure(w: Tensor, removed: Tensor, fit: Mapping[str, Any], pattern: Pattern) -> str | None:
    """Why what was removed from ``w`` is more than noise, or None."""
    limit = (1 + MARGIN) * math.sqrt(lost_energy(pattern)) * fit["edge"]
    largest = float(_top(removed, 1)[1][0])
    if largest > limit:
        return f"what it removes has a singular value of {largest:.3g}, noise at most {limit:.3g}"
    k = int(fit["spikes"])
    if k:
        u, _, v = _top(w, k)
        share = float((u.T @ removed @ v).norm() / removed.norm().clamp(min=1e-30))
        if share > SPIKE_SHARE * k / math.sqrt(w.numel()):
            return f"what it removes has {share:.2g} of its norm in the subspace of {k} spikes"
    return None


def _top(matrix: Tensor, k: int, steps: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values (R, C) -> u (R, k), s (k,), v (C, k), by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(matrix.shape[1], min(k + 8, *matrix.shape), generator=generator).to(matrix)
    for _ in range(steps):
        q = torch.linalg.qr(matrix.T @ (matrix @ q)).Q
    u, s, vh = torch.linalg.svd(matrix @ q, full_matrices=False)
    return u[:, :k], s[:k], q @ vh.T[:, :k]
