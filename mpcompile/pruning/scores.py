"""Scores: which values a group keeps. Pure functions of a weight in its execution layout and of input statistics.

From cheap to dear: magnitude keeps the largest |w|; Wanda the largest |w| times the size of its input; covariance
minimises r' C r of the removed values r; OBS removes one value after another, each time moving the remaining ones of
the row to where they make up best for it. All of them see rows (R, K), group M consecutive columns, and treat all rows
and groups at once. Sources: Sun et al. 2023 (Wanda); arXiv 2606.02608 (covariance); Hassibi and Stork 1993, Frantar
and Alistarh 2023 (OBS).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from mpcompile.ir.numerics import exact
from mpcompile.kernels.nm_format import Pattern, from_rows, to_rows

_FEW_MASKS = 8  # up to so many masks a group (2:4 has 6), all are tried
_CHUNK = 1 << 22  # values per chunk of the vectorised searches: 16 MiB per temporary
_BLOCK = 128  # columns whose effect on later ones is collected before it is applied to them


def top_n(score: Tensor, n: int) -> Tensor:
    """The ``n`` largest of the last axis as a boolean mask; ties go to the lower index."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :n], True)


def top_rows(score: Tensor, pattern: Pattern) -> Tensor:
    """The largest of each group of a score (R, K), as a mask of its shape."""
    groups = score.unflatten(-1, (-1, pattern.m)).reshape(-1, pattern.m)
    kept = torch.cat([top_n(part, pattern.n) for part in groups.split(max(1, _CHUNK // pattern.m))])
    return kept.reshape(score.shape)


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Boolean mask of the weight's shape that keeps the largest |w| of every group.

    Example:
        >>> magnitude_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), Pattern(2, 4)).tolist()
        [[False, True, True, False]]
    """
    return from_rows(top_rows(to_rows(weight.detach()).abs(), pattern), weight.shape)


def wanda_rows(rows: Tensor, power: Tensor, pattern: Pattern) -> Tensor:
    """Mask of rows (R, K) that keeps the largest w_j^2 E[x_j^2] of every group; ``power`` is E[x_j^2], (K,)."""
    return top_rows(rows.square() * power, pattern)


def exchange(u: Tensor, c: Tensor, kept: Tensor, price: Tensor | None = None) -> Tensor:
    """Best-improvement exchanges of a kept for a removed value until none lowers r' C r + p' (removed).

    Args:
        u: (G, M) values of which r are the removed ones.
        c: (G, M, M), or (M, M) for all alike.
        kept: (G, M), N of them set.
        price: p, (G, M), what removing a value costs besides; nothing if left out.
    """
    kept = kept.clone()
    c = c.expand(len(u), -1, -1)
    active = torch.arange(len(u), device=u.device)
    floor = 1e-7 * (u.square() * c.diagonal(dim1=-2, dim2=-1)).sum(-1)  # below this, an exchange is rounding
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
    """Every mask of one group, (C(M, N), M)."""
    kept = torch.zeros(math.comb(pattern.m, pattern.n), pattern.m, dtype=torch.bool, device=device)
    for row, places in zip(kept, itertools.combinations(range(pattern.m), pattern.n), strict=True):
        row[list(places)] = True
    return kept


def _best(u: Tensor, c: Tensor, pattern: Pattern, kept: Tensor | None = None, price: Tensor | None = None) -> Tensor:
    """The mask of each group that minimises r' C r + p' (removed): the least of all where there are few, else a search.

    u (G, M), c (G, M, M) or (M, M), kept (G, M) where the search starts, price p (G, M) -> (G, M).
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
    """What removing each value costs by the Hamming prior towards a source mask, up to a constant a group.

    alpha times the mean of w_j^2 C_jj over the rows and the group, for every place in which the mask differs from the
    source; rows and source (R, K), blocks (K / m, m, m) -> (R, K). Source: arXiv 2606.02608, the projection cost.
    """
    power = blocks.diagonal(dim1=-2, dim2=-1).flatten()
    mean = (rows.square() * power).unflatten(-1, (-1, m)).mean(dim=(0, 2))
    return alpha * mean.repeat_interleave(m) * torch.where(source, 1.0, -1.0)


@exact()
def covariance_rows(rows: Tensor, blocks: Tensor, pattern: Pattern, price: Tensor | None = None) -> Tensor:
    """Mask of rows (R, K) for which r' C r is least in every group.

    Args:
        blocks: (K / m, m, m), the C of each group.
        price: (R, K), what removing a value costs besides, as from :func:`prior_price`.
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
    """Boolean mask that keeps ``pattern.n`` of every group so that r' C r is least (up to single exchanges).

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).
        moments: (groups, K / m, m, m), second moments of the inputs of each group of columns in the execution layout,
            for each of the convolution's groups (1 for linear layers).

    Source: arXiv 2606.02608, the projection cost; search as in method section 4 (a).
    """
    rows = to_rows(weight.detach()).float()
    moments = moments.to(rows.device, torch.float32)
    parts = [covariance_rows(part, c, pattern) for part, c in zip(rows.chunk(len(moments)), moments, strict=True)]
    return from_rows(torch.cat(parts), weight.shape)


@exact()
def sweep_rows(rows: Tensor, a: Tensor, kept: Tensor, pattern: Pattern) -> Tensor:
    """One Gauss-Seidel sweep: each group's mask is chosen anew with the full second moments, the others standing.

    Args:
        rows: (R, K).
        a: (K, K), second moments of the inputs.
        kept: (R, K), the masks before.

    Returns:
        Masks for which r' A r of the whole row is at most what it was.
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
    """``a`` (K, K) plus ``damping`` times the mean of its diagonal; inputs that are always zero get that mean too.

    A singular matrix becomes positive definite; an all-zero one, the identity.
    """
    diagonal = a.diagonal()
    mean = float(diagonal.mean())
    result = a.clone()
    result.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return result


def _peel(w: Tensor, p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Remove ``count`` values of each group, each time the one whose loss costs least once the others have moved.

    w (R, M), p (M, M) the inverse of their second moments given what may still move -> new values, kept.
    """
    p = p.expand(len(w), -1, -1).clone()
    w = w.clone()
    row = torch.arange(len(w), device=w.device)
    kept = torch.ones_like(w, dtype=torch.bool)
    for _ in range(count):
        diagonal = p.diagonal(dim1=-2, dim2=-1)
        cost = (w.square() / diagonal.clamp(min=1e-30)).masked_fill(~kept, torch.inf)
        i = cost.argmin(-1)
        kept[row, i] = False
        column, pivot = p[row, :, i], diagonal[row, i].clone().clamp(min=1e-30)
        w -= column * (w[row, i] / pivot)[:, None]
        p -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
    return w * kept, kept


@exact()
def obs_rows(rows: Tensor, a: Tensor, pattern: Pattern, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, group by group from left to right: masks, and values that make up for what is removed.

    Args:
        rows: (R, K).
        a: (K, K), second moments of the inputs.
        damping: share of the mean of the diagonal that is added to it.

    Returns:
        Values (R, K), zero where removed, and the mask (R, K).

    Within a group the values are removed one at a time at the exact cost w_j^2 / P_jj, P the inverse of the moments
    restricted to the columns that may still move; columns to the left are final. Source: method section 6.
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
            parts = [_peel(part, p, m - pattern.n) for part in w[:, group].split(step)]
            new = torch.cat([part[0] for part in parts])
            kept[:, group] = torch.cat([part[1] for part in parts])
            error = torch.linalg.solve_triangular(u, (new - w[:, group]).double(), upper=True, left=False)
            errors[:, j - start : j - start + m] = error = error.to(rows.dtype)
            w[:, group] = new
            w[:, j + m : stop] += error @ small[group, j + m : stop]
        w[:, stop:] += errors @ small[start:stop, stop:]
    return w, kept
