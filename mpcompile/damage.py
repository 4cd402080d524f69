"""Damage: what a pattern does to a layer, in units in which layers can be compared.

With data: the loss of the model's output, to second order. Without: from the weights, by how much of them is removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile import refit, scores
from mpcompile.allocation import lost_energy
from mpcompile.calibration import DIAGONAL, FULL, Moments
from mpcompile.kernels.nm_format import Pattern, to_rows
from mpcompile.passes.project import choose

MARGIN = 0.1  # by which a finite random matrix may pass its edge
SPIKE_SHARE = 3.0  # times the share of a random matrix


def removed_energy(weight: Tensor, patterns: Sequence[Pattern]) -> list[float]:
    """‖R‖_F² of what a magnitude mask removes from a weight, for each pattern.

    >>> removed_energy(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), [Pattern(2, 4), Pattern(1, 4)])
    [5.0, 14.0]
    """
    squares = to_rows(weight.detach()).double().square()
    by_rank = {
        m: squares.unflatten(-1, (-1, m)).sort(-1).values.sum((0, 1)).cumsum(0) for m in {p.m for p in patterns}
    }
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


def measured(
    weight: Tensor, moments: Moments, pattern: Pattern, score: str, output_energy: Tensor
) -> float:
    """½ Σ_i G_i d_i' C d_i: loss of the model's output when the layer gets ``pattern`` and all others stay dense.

    d_i = row i of the weight minus what ``score`` makes of it, C = E[x x'] of the layer's inputs, G from
    :func:`mpcompile.sensitivity.output_energy`.
    """
    mask, values, _ = choose(weight, moments, pattern, score)
    rows = to_rows(weight.detach()).float()
    kept = to_rows(weight.detach() * mask if values is None else values).float()
    weights = output_energy.to(rows.device).chunk(len(moments.xx))
    total = 0.0
    for index, (row, new, g) in enumerate(zip(rows.chunk(len(moments.xx)), kept.chunk(len(moments.xx)), weights, strict=True)):
        if moments.kind == FULL:
            error = refit.error(new, row, moments.xx[index].to(row))
        else:
            d = (new - row).double()
            if moments.kind == DIAGONAL:
                error = (d.square() * moments.xx[index].to(d)).sum(-1)
            else:
                c = moments.xx[index].to(d)
                parts = d.unflatten(-1, (c.shape[0], -1))
                error = torch.einsum("rgi,gij,rgj->r", parts, c, parts)
        total += float((g * error).sum())
    return total / 2


def inadmissible(weight: Tensor, fit: Mapping[str, Any], patterns: Sequence[Pattern]) -> dict[Pattern, str]:
    """Patterns under which what a magnitude mask removes, R, is more than noise; with the reason.

    R of a weight that is noise is noise itself, of variance rho(N:M) σ̂². So ‖R‖₂ has to stay below (1 + δ) √rho σ₊, and
    its share in the spikes' subspace, ‖U_k' R V_k‖_F / ‖R‖_F, near the k / √(NM) of a random matrix. Weights that don't
    follow the law are not judged. Source: method section 2 (ii).

    Args:
        fit: ``verdict``, ``edge`` and ``spikes`` of the weight, as from :func:`mpcompile.analysis.study`.
    """
    if fit["verdict"] != "mp" or not patterns:
        return {}
    w = to_rows(weight.detach()).float()
    k = int(fit["spikes"])
    spaces = _top(w, k) if k else None
    found: dict[Pattern, str] = {}
    for pattern in patterns:
        removed = torch.where(to_rows(scores.magnitude_mask(weight, pattern)), 0.0, w)
        limit = (1 + MARGIN) * math.sqrt(lost_energy(pattern)) * fit["edge"]
        largest = float(_top(removed, 1)[1][0])
        if largest > limit:
            found[pattern] = f"what it removes has a singular value of {largest:.3g}, noise at most {limit:.3g}"
            continue
        if spaces is not None:
            u, _, v = spaces
            share = float((u.T @ removed @ v).norm() / removed.norm().clamp(min=1e-30))
            if share > SPIKE_SHARE * k / math.sqrt(w.numel()):
                found[pattern] = f"what it removes holds {share:.2g} of its energy's root in the subspace of {k} spikes"
    return found


def _top(matrix: Tensor, k: int, steps: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular values (R, C) -> u (R, k), s (k,), v (C, k), by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(matrix.shape[1], min(k + 8, *matrix.shape), generator=generator).to(matrix)
    for _ in range(steps):
        q = torch.linalg.qr(matrix.T @ (matrix @ q)).Q
    u, s, vh = torch.linalg.svd(matrix @ q, full_matrices=False)
    return u[:, :k], s[:k], q @ vh.T[:, :k]
