"""Scores: which values of a group to keep. Pure functions of a weight in its execution layout and of input statistics.

From cheap to expensive:

- magnitude keeps the largest |w|;
- Wanda keeps the largest |w| times the RMS of its input (Sun et al. 2023);
- covariance minimises r' C r over the removed values r, where C are the second moments of the group's inputs
  (arXiv 2606.02608, Online Resource 2, "Stage 1: per-row 2:4 search with free restoration");
- optimal brain surgeon (OBS) removes one value at a time, and each time adjusts the row's remaining values so that they
  compensate best (Hassibi and Stork 1993; Frantar and Alistarh 2023).

All of them take rows (R, K), group M consecutive columns, and process many rows at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpcompile.ir.numerics import exact
from mpcompile.kernels.nm_format import Pattern, from_rows, to_rows

DAMPING = 0.01  # added to the diagonal of the second moments, as a share of its mean
_FEW_MASKS = 8  # up to this many masks per group (2:4 has 6) are enumerated
_CHUNK = 1 << 22  # values per chunk of the vectorised searches: 16 MiB per temporary
_BLOCK = 128  # columns whose effect on later columns is accumulated before it is applied


def top_n(score: Tensor, n: int) -> Tensor:
    """Return a boolean mask of the ``n`` largest values along the last axis; ties go to the lower index."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :n], True)


def top_rows(score: Tensor, pattern: Pattern) -> Tensor:
    """Return a boolean mask (R, K) of the ``pattern.n`` largest values of each group of a score (R, K)."""
    groups = score.unflatten(-1, (-1, pattern.m)).reshape(-1, pattern.m)
    mask = torch.cat([top_n(part, pattern.n) for part in groups.split(max(1, _CHUNK // pattern.m))])
    return mask.reshape(score.shape)


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return a boolean mask, of the weight's shape, that keeps the largest |w| of every group.

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).

    Example:
        >>> magnitude_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), Pattern(2, 4)).tolist()
        [[False, True, True, False]]
    """
    return from_rows(top_rows(to_rows(weight.detach()).abs(), pattern), weight.shape)


def wanda_rows(rows: Tensor, power: Tensor, pattern: Pattern) -> Tensor:
    """Return a mask (R, K) that keeps the largest w_j^2 E[x_j^2] of every group; ``power`` is E[x_j^2], (K,)."""
    return top_rows(rows.square() * power, pattern)


def exchange(u: Tensor, c: Tensor, kept: Tensor, price: Tensor | None = None) -> Tensor:
    """Exchange kept for removed values, the best exchange first, until none lowers r' C r + p' (removed).

    Args:
        u: (G, M), values of the groups; r are those that the mask removes, zero elsewhere.
        c: (G, M, M), or one (M, M) for all groups.
        kept: (G, M), the initial mask, with N values of each group set.
        price: p, (G, M), an additional cost of removing each value; None means zero.

    Returns:
        The mask (G, M).
    """
    kept = kept.clone()
    c = c.expand(len(u), -1, -1)
    active = torch.arange(len(u), device=u.device)
    floor = 1e-7 * (u.square() * c.diagonal(dim1=-2, dim2=-1)).sum(-1)  # a smaller gain is rounding error
    for _ in range(u.shape[1]):
        v, k, ca = u[active], kept[active], c[active]
        g = torch.einsum("gij,gj->gi", ca, v * ~k)  # C r
        own = v.square() * ca.diagonal(dim1=-2, dim2=-1)
        toll = 2 * v * g if price is None else 2 * v * g + price[active]
        remove, restore = own + toll, own - toll
        delta = remove[:, :, None] + restore[:, None, :] - 2 * v[:, :, None] * v[:, None, :] * ca
        delta.masked_fill_(~(k[:, :, None] & ~k[:, None, :]), torch.inf)
        best, where = delta.flatten(1).min(-1)
        better = best < -floor[active]
        active, where = active[better], where[better]
        if not len(active):
            break
        kept[active, where // u.shape[1]] = False
        kept[active, where % u.shape[1]] = True
    return kept


def all_masks(pattern: Pattern, device: torch.device) -> Tensor:
    """Return all masks of one group, (C(M, N), M)."""
    kept = torch.zeros(math.comb(pattern.m, pattern.n), pattern.m, dtype=torch.bool, device=device)
    for row, places in zip(kept, itertools.combinations(range(pattern.m), pattern.n), strict=True):
        row[list(places)] = True
    return kept


def _best(u: Tensor, c: Tensor, pattern: Pattern, kept: Tensor | None = None, price: Tensor | None = None) -> Tensor:
    """Return a mask of each group with a low r' C r + p' (removed): the best of all if there are few masks, otherwise
    the result of :func:`exchange`.

    u (G, M), c (G, M, M) or (M, M), initial mask kept (G, M), price p (G, M) -> (G, M).
    """
    if math.comb(pattern.m, pattern.n) > _FEW_MASKS:
        if kept is None:
            kept = top_n(u.square() * c.diagonal(dim1=-2, dim2=-1), pattern.n)
        return exchange(u, c, kept, price)
    masks = all_masks(pattern, u.device)
    removed = (~masks).to(u.dtype)
    pairs = (removed[:, :, None] * removed[:, None, :]).flatten(1)
    cost = (u[:, :, None] * u[:, None, :] * c).flatten(1) @ pairs.T
    if price is not None:
        cost += price @ removed.T
    return masks[cost.argmin(-1)]


def prior_price(rows: Tensor, blocks: Tensor, source: Tensor, alpha: float, m: int) -> Tensor:
    """Return the cost of removing each value under the Hamming prior towards a source mask, up to a constant per group.

    The prior adds, for every place in which the mask differs from the source, alpha times the mean of w_j^2 C_jj over
    all rows and the group. rows and source (R, K), blocks (K / m, m, m) -> (R, K).

    Source: arXiv 2606.02608, Online Resource 2, "Stage 1: per-row 2:4 search with free restoration", the SER prior.
    """
    power = blocks.diagonal(dim1=-2, dim2=-1).flatten()
    mean = (rows.square() * power).unflatten(-1, (-1, m)).mean(dim=(0, 2))
    return alpha * mean.repeat_interleave(m) * torch.where(source, 1.0, -1.0)


@exact()
def covariance_rows(rows: Tensor, blocks: Tensor, pattern: Pattern, price: Tensor | None = None) -> Tensor:
    """Return a mask (R, K) of the rows that minimises r' C r in every group, as :func:`covariance_mask`.

    Args:
        rows: (R, K).
        blocks: (K / m, m, m), the C of each group.
        price: (R, K), an additional cost of removing each value, as from :func:`prior_price`.
    """
    groups = rows.unflatten(-1, (-1, pattern.m))
    step, parts = max(1, _CHUNK // (groups.shape[1] * pattern.m * pattern.m)), []
    prices = [None] * len(groups) if price is None else price.unflatten(-1, (-1, pattern.m)).split(step)
    for part, cost in zip(groups.split(step), prices, strict=False):
        each = blocks.expand(len(part), -1, -1, -1).reshape(-1, pattern.m, pattern.m)
        flat = None if cost is None else cost.reshape(-1, pattern.m)
        parts.append(_best(part.reshape(-1, pattern.m), each, pattern, price=flat).reshape(part.shape))
    return torch.cat(parts).flatten(1)


@exact()
def covariance_mask(weight: Tensor, moments: Tensor, pattern: Pattern) -> Tensor:
    """Return a boolean mask, of the weight's shape, that keeps ``pattern.n`` of every group such that r' C r is least.

    If a group has at most 8 masks, all are tried; otherwise the result is a local minimum, which no single exchange of
    a kept for a removed value improves.

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).
        moments: (groups, K / m, m, m), second moments of the inputs of each group of columns in the execution layout,
            for each of the convolution's groups (1 for linear layers).

    Source: arXiv 2606.02608, Online Resource 2, "Stage 1: per-row 2:4 search with free restoration", the covariance
    cost.
    """
    rows = to_rows(weight.detach()).float()
    moments = moments.to(rows.device, torch.float32)
    parts = [covariance_rows(part, c, pattern) for part, c in zip(rows.chunk(len(moments)), moments, strict=True)]
    return from_rows(torch.cat(parts), weight.shape)


@exact()
def sweep_rows(rows: Tensor, a: Tensor, kept: Tensor, pattern: Pattern) -> Tensor:
    """One Gauss-Seidel sweep: choose each group's mask again, from the full second moments, with all others fixed.

    Args:
        rows: (R, K).
        a: (K, K), second moments of the inputs.
        kept: (R, K), the masks before the sweep.

    Returns:
        Masks (R, K) for which r' A r of the whole row is no larger than before.
    """
    kept, m = kept.clone(), pattern.m
    removed = rows * ~kept
    pull = removed @ a
    for start in range(0, rows.shape[1], _BLOCK // m * m):
        stop = min(start + _BLOCK // m * m, rows.shape[1])
        before = removed[:, start:stop].clone()
        for j in range(start, stop, m):
            group = slice(j, j + m)
            u, c = rows[:, group], a[group, group]
            r = removed[:, group]
            linear = pull[:, group] - r @ c
            chosen = _best(u, c, pattern, kept[:, group], 2 * u * linear)
            new = u * ~chosen
            change = (new @ c * new).sum(-1) + 2 * (linear * new).sum(-1)
            change -= (r @ c * r).sum(-1) + 2 * (linear * r).sum(-1)
            better = (change < 0)[:, None]
            kept[:, group] = torch.where(better, chosen, kept[:, group])
            delta = torch.where(better, new, r) - r
            removed[:, group] += delta
            pull[:, j:stop] += delta @ a[group, j:stop]
        pull[:, stop:] += (removed[:, start:stop] - before) @ a[start:stop, stop:]
    return kept


def damped(a: Tensor, damping: float) -> Tensor:
    """Return ``a`` (K, K) with ``damping`` times the mean of its diagonal added to the diagonal.

    A singular matrix becomes positive definite, and an all-zero matrix the identity.
    """
    diagonal = a.diagonal()
    mean = float(diagonal.mean())
    result = a.clone()
    result.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return result


def peel(w: Tensor, inverse: Tensor, counts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Optimal brain surgeon within one group: remove values one at a time, always the one whose removal costs least
    once the remaining values have been adjusted to compensate.

    Args:
        w: (R, M), the group's values in every row.
        inverse: (M, M), the inverse of the damped second moments of the group's inputs, of w's dtype.
        counts: numbers of removals after which to yield, in ascending order.

    Yields:
        The values and the mask of those kept, (R, M) each, after each count; removed values are zero.
    """
    p, w = inverse.expand(len(w), -1, -1).clone(), w.clone()
    row = torch.arange(len(w), device=w.device)
    kept = torch.ones_like(w, dtype=torch.bool)
    done = 0
    for count in counts:
        for _ in range(count - done):
            diagonal = p.diagonal(dim1=-2, dim2=-1)
            cost = w.square() / diagonal.clamp(min=1e-30)
            i = cost.masked_fill(~kept, torch.inf).argmin(-1)
            kept[row, i] = False
            column, pivot = p[row, :, i], diagonal[row, i].clone().clamp(min=1e-30)
            w -= column * (w[row, i] / pivot)[:, None]
            p.baddbmm_(column[:, :, None], (column / pivot[:, None])[:, None, :], alpha=-1)
        done = count
        yield w.masked_fill(~kept, 0.0), kept.clone()


@exact()
def obs_rows(rows: Tensor, a: Tensor, pattern: Pattern, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, group by group from left to right: masks, and values that compensate for those removed.

    Within a group, values are removed one at a time at the exact cost w_j^2 / P_jj, where P is the inverse of the
    moments restricted to the columns that can still change. Columns to the left are final.

    Args:
        rows: (R, K).
        a: (K, K), second moments of the inputs.
        damping: see :func:`damped`.

    Returns:
        Values (R, K), zero where removed, and the mask (R, K).

    Source: Hassibi and Stork 1993 (the cost); Frantar and Alistarh 2023, SparseGPT (left to right, by the Cholesky
    factor of the inverse).
    """
    m = pattern.m
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(a.double(), damping)))
    upper = torch.linalg.cholesky(inverse, upper=True)
    small = upper.to(rows.dtype)
    w, kept = rows.clone(), torch.empty_like(rows, dtype=torch.bool)
    step = max(1, _CHUNK // (m * m))
    for start in range(0, rows.shape[1], _BLOCK // m * m):
        stop = min(start + _BLOCK // m * m, rows.shape[1])
        errors = torch.empty_like(rows[:, start:stop])
        for j in range(start, stop, m):
            group = slice(j, j + m)
            u = upper[group, group]
            p = (u.T @ u).to(rows.dtype)
            parts = [next(peel(part, p, [m - pattern.n])) for part in w[:, group].split(step)]
            new = torch.cat([part[0] for part in parts])
            kept[:, group] = torch.cat([part[1] for part in parts])
            error = torch.linalg.solve_triangular(u, (new - w[:, group]).double(), upper=True, left=False)
            errors[:, j - start : j - start + m] = error = error.to(rows.dtype)
            w[:, group] = new
            w[:, j + m : stop] += error @ small[group, j + m : stop]
        w[:, stop:] += errors @ small[start:stop, stop:]
    return w, kept
