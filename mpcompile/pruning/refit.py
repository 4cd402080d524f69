"""Refitting: adjust the kept values of a masked weight, and exchange kept for removed values, to match target outputs.

Pure functions of rows (R, K) and of the second moments A (K, K) of the inputs. Everything minimises, for each row,
(v - t) A (v - t)' over the values v that the mask allows: the mean squared error of the layer's output against that of
target values t.

Sources: prune--restore inside a fixed sparse-execution pattern, arXiv 2606.02608 (exchanges); Hassibi and Stork 1993
(the gains of removing and restoring a value).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpcompile.ir.numerics import exact
from mpcompile.kernels.nm_format import Pattern
from mpcompile.pruning.scores import _BLOCK, _CHUNK

_ROUGH = 0.04  # tolerance of least squares before a sweep: a closer fit would adapt values to a mask about to change


def error(values: Tensor, target: Tensor, a: Tensor) -> Tensor:
    """Return (v - t) A (v - t)' of each row, float64: values and target (R, K), a (K, K) -> (R,)."""
    difference = values - target
    return ((difference @ a).double() * difference.double()).sum(-1)


@exact()
def least_squares(
    values: Tensor, target: Tensor, a: Tensor, kept: Tensor, steps: int = 30, tol: float = 1e-3
) -> Tensor:
    """Return the kept values that minimise the error, by conjugate gradients on all rows at once.

    Args:
        values: (R, K), the start; zero outside the mask.
        target: (R, K).
        a: (K, K), positive definite.
        kept: (R, K), the mask.
        steps: maximum number of conjugate-gradient steps, each one product (R, K) x (K, K). The error falls in every
            step.
        tol: stop when a step lowers the total error of all rows by no more than this share of the remaining error.

    Returns:
        (R, K), zero outside the mask; the error of no row is larger than that of ``values``.
    """
    scale = a.diagonal().clamp(min=1e-30).reciprocal()  # Jacobi preconditioner
    x, away = values.clone(), target - values
    r = away @ a
    before = (r.double() * away.double()).sum(-1)
    left = float(before.sum())
    r.mul_(kept)
    z = r * scale
    p, rz = z.clone(), (r * z).sum(-1, keepdim=True)
    for _ in range(steps):
        ap = (p @ a).mul_(kept)
        alpha = rz / (p * ap).sum(-1, keepdim=True).clamp(min=1e-30)
        x.addcmul_(alpha, p)
        gain = float((alpha * rz).sum())  # exact decrease of the total error in this step
        left -= gain
        if gain <= tol * left:
            break
        r.addcmul_(alpha, ap, value=-1)
        torch.mul(r, scale, out=z)
        new = (r * z).sum(-1, keepdim=True)
        p.mul_(new / rz.clamp(min=1e-30)).add_(z)
        rz = new
    return torch.where((error(x, target, a) > before)[:, None], values, x)


def _masked_inverse(a: Tensor, kept: Tensor) -> Tensor:
    """Return the inverse of A (M, M) restricted to each row's kept values (R, M), zero elsewhere: (R, M, M)."""
    both = kept[:, :, None] & kept[:, None, :]
    eye = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
    return torch.linalg.inv(torch.where(both, a, eye)) * both


def _exchange_group(b: Tensor, a: Tensor, kept: Tensor, v: Tensor, limit: int = 4) -> tuple[Tensor, Tensor]:
    """Minimise v' A v - 2 b' v over a group's values and mask, greedily: best exchange first, a refit after each.

    b (R, M), a (M, M), kept (R, M), v (R, M) -> values and mask, (R, M) each; at most ``limit`` exchanges per row.
    """
    kept, best = kept.clone(), v.clone()
    active = torch.arange(len(b), device=b.device)
    floor = 1e-6 * (b.square() / a.diagonal()).sum(-1)
    for _ in range(limit):
        k, rhs = kept[active], b[active]
        p = _masked_inverse(a, k)
        x = torch.einsum("rij,rj->ri", p, rhs)
        best[active] = x
        pivot = p.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30)
        across = a @ p  # (R, M, M): A P
        e = rhs - x @ a
        schur = a.diagonal() - (across * a).sum(-1)
        gain = (e[:, :, None] + across * (x / pivot)[:, None, :]).square_()  # restored j, removed i
        gain /= (schur[:, :, None] + across.square() / pivot[:, None, :]).clamp(min=1e-12 * float(a.diagonal().max()))
        gain -= (x.square() / pivot)[:, None, :]
        gain.masked_fill_(~(~k[:, :, None] & k[:, None, :]), -torch.inf)
        top, where = gain.flatten(1).max(-1)
        better = top > floor[active]
        active, where = active[better], where[better]
        if not len(active):
            return best, kept
        kept[active, where // b.shape[1]] = True
        kept[active, where % b.shape[1]] = False
    best[active] = torch.einsum("rij,rj->ri", _masked_inverse(a, kept[active]), b[active])
    return best, kept


@exact()
def exchange_sweep(values: Tensor, target: Tensor, a: Tensor, kept: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """One prune-restore sweep: in each group in turn, exchange kept for removed values where that lowers the error.

    The gain of an exchange is exact: the group's values are refitted, all others are fixed.

    Args:
        values, target: (R, K).
        a: (K, K), positive definite.
        kept: (R, K), the mask before the sweep.

    Returns:
        Values and mask, (R, K) each; the error of no row rises.
    """
    m = pattern.m
    if pattern.n == m:
        return values, kept
    values, kept = values.clone(), kept.clone()
    pull = (values - target) @ a
    step = max(1, _CHUNK // (m * m))
    for start in range(0, values.shape[1], _BLOCK // m * m):
        stop = min(start + _BLOCK // m * m, values.shape[1])
        before = values[:, start:stop].clone()
        for j in range(start, stop, m):
            group = slice(j, j + m)
            c, v = a[group, group], values[:, group]
            b = v @ c - pull[:, group]
            parts = [
                _exchange_group(*part)
                for part in zip(b.split(step), [c] * len(b), kept[:, group].split(step), v.split(step), strict=False)
            ]
            new, mask = (torch.cat(piece) for piece in zip(*parts, strict=True))
            change = ((new @ c * new) - 2 * b * new - (v @ c * v) + 2 * b * v).sum(-1)
            better = (change < 0)[:, None]
            new = torch.where(better, new, v)
            kept[:, group] = torch.where(better, mask, kept[:, group])
            delta = new - v
            values[:, group] = new
            pull[:, j:stop] += delta @ a[group, j:stop]
        pull[:, stop:] += (values[:, start:stop] - before) @ a[start:stop, stop:]
    return values, kept


@exact()
def refit(
    values: Tensor, target: Tensor, a: Tensor, kept: Tensor, pattern: Pattern, sweeps: int = 2, steps: int = 30
) -> tuple[Tensor, Tensor]:
    """Least squares, then ``sweeps`` rounds of an exchange sweep and least squares; the error of no row rises.

    Least squares before a sweep is stopped early: see ``_ROUGH``. Arguments and results as in :func:`exchange_sweep`.
    """
    for _ in range(sweeps):
        values = least_squares(values, target, a, kept, steps, _ROUGH)
        values, kept = exchange_sweep(values, target, a, kept, pattern)
    return least_squares(values, target, a, kept, steps), kept
