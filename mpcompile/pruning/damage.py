"""Damage: the harm that a pattern does to a layer, in units that are comparable across layers.

With calibration data, damage is the loss at the model's output, to second order; without, it is the share of the
weights' energy that is removed, measured or as random matrix theory predicts it. Pure functions of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from scipy.integrate import quad
from scipy.stats import binom, chi
from torch import Tensor

from mpcompile.calibration.moments import DIAGONAL, FULL, Moments
from mpcompile.ir.numerics import exact
from mpcompile.kernels.nm_format import Pattern, from_rows, to_rows
from mpcompile.pruning import refit, scores
from mpcompile.pruning.scores import DAMPING

_STEPS = 8  # conjugate-gradient steps of least squares
MARGIN = 0.1  # δ: how far a finite random matrix may exceed its edge
SPIKE_SHARE = 3.0  # largest admissible share, in multiples of a random matrix's share


@lru_cache
def lost_energy(pattern: Pattern) -> float:
    """Return rho(N:M), the share of the energy of Gaussian weights that a magnitude mask removes.

    A value |z| = x is among the M - N smallest of its group with the probability that at most M - N - 1 of the others
    are smaller: rho = ∫ x² f(x) P[Bin(M - 1, F(x)) <= M - N - 1] dx, f and F the density and distribution of |z|.

    >>> round(lost_energy(Pattern(2, 4)), 4), round(lost_energy(Pattern(8, 16)), 4)
    (0.1324, 0.0876)
    """
    n, m = pattern
    if n == m:
        return 0.0
    removed = lambda x: x * x * chi.pdf(x, 1) * binom.cdf(m - n - 1, m - 1, chi.cdf(x, 1))  # noqa: E731
    return float(quad(removed, 0, 10, epsabs=1e-10, limit=200)[0])


def removed_energy(weight: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    """Return ‖R‖_F² for each pattern, where R are the values that a magnitude mask removes from the weight.

    >>> removed_energy(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), [Pattern(2, 4), Pattern(1, 4)])
    [5.0, 14.0]
    """
    squares = to_rows(weight.detach()).double().square()
    by_rank = {m: squares.unflatten(-1, (-1, m)).sort(-1).values.sum((0, 1)).cumsum(0) for m in {p.m for p in patterns}}
    return [float(by_rank[p.m][p.m - p.n - 1]) if p.n < p.m else 0.0 for p in patterns]


def gaussian(weight: Tensor, noise: float, patterns: Sequence[Pattern]) -> list[float]:
    """Relative error of a layer's outputs in the Marchenko-Pastur model: rho(N:M) σ̂² N tr C / E‖y‖², per pattern.

    Without data, inputs are assumed isotropic (C a multiple of the identity). Then E‖y‖² = ‖W‖_F² tr C / M, and the
    error is rho(N:M) times the weight's noise share.

    Args:
        weight: any shape, N x M values in all.
        noise: NMσ̂², the energy of the weight's noise.
    """
    total = float(weight.detach().double().square().sum()) or 1.0
    return [lost_energy(p) * noise / total for p in patterns]


@exact()
def calibrated(
    weight: Tensor, moments: Moments, patterns: Sequence[Pattern], output_energy: Tensor, refitted: bool = True
) -> list[float]:
    """½ Σ_i G_i d_i' C d_i for each pattern: the loss at the model's output if only this layer is pruned to it.

    d_i is the change of row i of the weight by :func:`projections`, C = E[x x'] of the layer's inputs, and G comes from
    :func:`mpcompile.calibration.sensitivity.output_energy`.

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).
        moments: second moments of the layer's inputs.
        output_energy: G, (out,).
        refitted: refit the kept values by least squares, if the moments are full.
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
    """Return the weight under one pattern, as :func:`calibrated` assumes it."""
    parts = to_rows(weight.detach()).float().chunk(len(moments.x))
    new = [next(projections(part, moments, i, [pattern], refitted))[1] for i, part in enumerate(parts)]
    return from_rows(torch.cat(new), weight.shape).to(weight.dtype)


def projections(
    rows: Tensor, moments: Moments, index: int, patterns: Sequence[Pattern], refitted: bool
) -> Iterator[tuple[Pattern, Tensor]]:
    """Yield the rows (R, K) of group ``index`` of a layer under each pattern, cheaply approximating the final masks.

    Optimal brain surgeon runs within every M columns: one pass that removes values one by one serves all N of the same
    M. With full moments, and if ``refitted``, a few steps of least squares on whole rows follow.
    """
    for m in dict.fromkeys(p.m for p in patterns):
        densest_first = sorted((p for p in patterns if p.m == m), key=lambda p: -p.n)
        pruned = {p: torch.empty_like(rows) for p in densest_first}
        for group, block in enumerate(moments.block(m)[index].to(rows.device)):
            columns = slice(group * m, (group + 1) * m)
            inverse = torch.linalg.inv(scores.damped(block.double(), DAMPING)).to(rows)
            walk = scores.peel(rows[:, columns], inverse, [m - p.n for p in densest_first])
            for p, (new, _) in zip(densest_first, walk, strict=True):
                pruned[p][:, columns] = new
        if refitted and moments.kind == FULL:
            a = scores.damped(moments.xx[index].to(rows.device), DAMPING).float()
            for p, new in pruned.items():
                mask = scores.top_rows(new.abs(), p)
                pruned[p] = refit.least_squares(new, rows, a, mask, _STEPS)
        yield from pruned.items()


def _error(d: Tensor, moments: Moments, index: int) -> Tensor:
    """Return d C d' of each row (R, K), float64, with the part of C that the moments hold (full, blocks, diagonal)."""
    c, d = moments.xx[index].to(d.device), d.double()
    if moments.kind == FULL:
        return ((d @ c) * d).sum(-1)
    if moments.kind == DIAGONAL:
        return (d.square() * c).sum(-1)
    groups = d.unflatten(-1, (len(c), -1))
    return torch.einsum("rgi,gij,rgj->r", groups, c, groups)


@exact()
def inadmissible(weight: Tensor, fit: Mapping[str, Any], patterns: Sequence[Pattern]) -> dict[Pattern, str]:
    """Return the patterns whose magnitude mask removes more than noise, each with the reason.

    If the weight is noise, the removed values R are noise of variance rho(N:M) σ̂². So ‖R‖₂ must stay below
    (1 + δ) √rho σ₊, δ = 0.1, and the share of R in the subspace of the k spikes, ‖U_k' R V_k‖_F / ‖R‖_F, must be at
    most 3 times the k / √(NM) of a random matrix. Weights that follow the law only once row and column scales are
    divided out, or not at all, are not judged.

    Args:
        weight: (out, in) or (out, in, kh, kw).
        fit: ``verdict``, ``separable``, ``edge``, ``spikes`` and, if the layer was fitted in blocks, ``blocks``, from
            :meth:`mpcompile.rmt.analysis.LayerAnalysis.notes`.
    """
    if fit["verdict"] != "mp" or fit.get("separable") or not patterns:
        return {}
    w = to_rows(weight.detach()).float()
    blocks = list(fit.get("blocks", {"": fit}).values())
    reasons: dict[Pattern, str] = {}
    for pattern in patterns:
        removed = torch.where(to_rows(scores.magnitude_mask(weight, pattern)), 0.0, w)
        pairs = zip(w.chunk(len(blocks)), removed.chunk(len(blocks)), blocks, strict=True)
        why = next((reason for part, r, block in pairs if (reason := _structure(part, r, block, pattern))), None)
        if why:
            reasons[pattern] = why
    return reasons


def _structure(w: Tensor, removed: Tensor, fit: Mapping[str, Any], pattern: Pattern) -> str | None:
    """Return why ``removed``, the part of ``w`` that is removed, is more than noise; None if it is not."""
    limit = (1 + MARGIN) * math.sqrt(lost_energy(pattern)) * fit["edge"]
    largest = float(_top(removed, 1)[1][0])
    if largest > limit:
        return f"the removed values have a singular value of {largest:.3g}, noise at most {limit:.3g}"
    k = int(fit["spikes"])
    if k:
        u, _, v = _top(w, k)
        share = float((u.T @ removed @ v).norm() / removed.norm().clamp(min=1e-30))
        if share > SPIKE_SHARE * k / math.sqrt(w.numel()):
            return f"the removed values have {share:.2g} of their norm in the subspace of {k} spikes"
    return None


def _top(matrix: Tensor, k: int, steps: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest singular triplets of (R, C), by subspace iteration: u (R, k), s (k,), v (C, k)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(matrix.shape[1], min(k + 8, *matrix.shape), generator=generator).to(matrix)
    for _ in range(steps):
        q = torch.linalg.qr(matrix.T @ (matrix @ q)).Q
    u, s, vh = torch.linalg.svd(matrix @ q, full_matrices=False)
    return u[:, :k], s[:k], q @ vh.T[:, :k]
