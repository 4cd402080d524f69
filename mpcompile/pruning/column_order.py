"""Permutation: order columns so that N:M masks keep more. Pure functions of score matrices.

The search anneals exchanges of columns between groups. In every step the groups are paired at random; for each pair
the exact gain of each of the M x M exchanges is computed at once, over all rows, from the N-th and (N+1)-th largest
score of every row and group; one exchange a pair is drawn by its gain and the temperature. It thereby takes the moves
of stripe-group optimisation (Pool and Yu 2021) a pair at a time, with the annealing in place of their bounded
regressions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpcompile.kernels.nm_format import Pattern

_CHUNK = 1 << 22  # elements of the largest temporary


def retained(scores: Tensor, pattern: Pattern) -> Tensor:
    """Sum of the N largest of every M consecutive scores: (..., R, K) -> (...), float64."""
    groups = scores.unflatten(-1, (-1, pattern.m))
    return groups.topk(pattern.n, dim=-1).values.sum(-1).double().sum((-2, -1))


def efficacy(before: float, after: float, scores: Tensor, pattern: Pattern) -> float:
    """Percent of the way from what the given order retains to what masks without groups would.

    The latter keep the N / M largest scores of every row. Source: Pool and Yu 2021, apex permutation tests.
    """
    count = scores.shape[-1] * pattern.n // pattern.m
    free = float(scores.topk(count, dim=-1).values.double().sum())
    return 100 * (after - before) / (free - before) if free > before else 0.0


class _State:
    """Columns of P independent problems in groups, with what the gain of an exchange needs, by column number."""

    def __init__(self, scores: Tensor, pattern: Pattern) -> None:
        self.m, self.n = pattern.m, pattern.n
        self.scores = scores.transpose(1, 2).contiguous()  # (P, K, R)
        count, k, _ = self.scores.shape
        self.groups = torch.arange(k, device=scores.device).view(1, -1, self.m).repeat(count, 1, 1)  # (P, G, M)
        self.problem = torch.arange(count, device=scores.device)
        self.limit = torch.empty_like(self.scores)  # what replaces the column must exceed this to count
        self.worth = torch.empty_like(self.scores)  # what the group loses with the column
        everything = self.problem[:, None].expand(-1, k // self.m).reshape(-1)
        self.refresh(everything, self.groups.reshape(-1, self.m))

    def refresh(self, problem: Tensor, columns: Tensor) -> None:
        """Recompute groups whose columns (X, M) changed."""
        step = max(1, _CHUNK // (self.m * self.scores.shape[-1]))
        for p, c in zip(problem.split(step), columns.split(step), strict=True):
            where = (p[:, None], c)
            s = self.scores[where]  # (x, M, R)
            top = s.topk(self.n + 1, dim=1).values
            last, spare = top[:, self.n - 1 : self.n], top[:, self.n :]
            inside = s >= last
            self.limit[where] = torch.where(inside, spare, last)
            self.worth[where] = torch.where(inside, s, last)

    def gains(self, problem: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Gain of exchanging each column of a with each of b: (X, M) each -> (X, M, M)."""
        parts = []
        step = max(1, _CHUNK // (self.m * self.m * self.scores.shape[-1]))
        for p, i, j in zip(problem.split(step), a.split(step), b.split(step), strict=True):
            left, right = (p[:, None], i), (p[:, None], j)
            into_a = _summed(torch.maximum(self.limit[left][:, :, None], self.scores[right][:, None]))
            into_b = _summed(torch.maximum(self.limit[right][:, None], self.scores[left][:, :, None]))
            lost_a, lost_b = _summed(self.worth[left]), _summed(self.worth[right])
            parts.append((into_a + into_b - lost_a[:, :, None] - lost_b[:, None, :]).float())
        return torch.cat(parts)


def _summed(x: Tensor) -> Tensor:
    """Sums over the rows, contiguous: each is one thread's, so that the number of threads decides on no exchange."""
    return x.contiguous().sum(-1).double()


def search(scores: Tensor, pattern: Pattern, steps: int = 400, seed: int = 0, start: float = 0.25) -> Tensor:
    """Orders of columns under which the N largest scores of every M neighbours sum to much.

    Args:
        scores: (P, R, K), not negative: P problems of their own, each over all its rows.
        pattern: N:M; K must be a multiple of M.
        steps: of the annealing. In each, every group meets one other. The time grows with it, the result depends on it
            and the seed alone.
        start: the first temperature, as a share of the spread of the gains.

    Returns:
        (P, K), the column that comes to each place. Never worse than the given order.

    Example:
        >>> search(torch.tensor([[[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]]]), Pattern(2, 4)).view(2, 4).lt(4).sum(1)
        tensor([2, 2])
    """
    count, _, k = scores.shape
    identity = torch.arange(k, device=scores.device).expand(count, -1)
    total = k // pattern.m
    if total < 2 or pattern.n >= pattern.m:
        return identity.clone()
    generator = torch.Generator().manual_seed(seed)
    state = _State(scores.float(), pattern)
    half = total // 2
    problem = state.problem[:, None].expand(-1, half).reshape(-1)
    spread = 0.0
    for step in range(steps):
        order = torch.rand(count, total, generator=generator).argsort(1).to(scores.device)
        places = order[:, : 2 * half].reshape(count, 2, half)
        pa, pb = places[:, 0].reshape(-1), places[:, 1].reshape(-1)
        a, b = state.groups[problem, pa], state.groups[problem, pb]
        gain = state.gains(problem, a, b).flatten(1)
        if step == 0:
            spread = float(gain.double().std())
        heat = spread * start * (1 - step / (0.9 * steps)) ** 2 if step < 0.9 * steps else 0.0
        if heat > 0:
            noise = torch.rand(len(gain), gain.shape[1] + 1, generator=generator).to(gain).clamp_(1e-12, 1 - 1e-7)
            noise = -torch.log(-torch.log(noise)) * heat
            stay = noise[:, -1]
            best, where = (gain + noise[:, :-1]).max(1)
        else:
            best, where = gain.max(1)
            stay = torch.full_like(best, 1e-6 * spread)
        moved = (best > stay).nonzero()[:, 0]
        if not len(moved):
            continue
        i, j = where[moved] // pattern.m, where[moved] % pattern.m
        p, a, b = problem[moved], a[moved], b[moved]
        row = torch.arange(len(moved), device=scores.device)
        left = a[row, i].clone()
        a[row, i] = b[row, j]
        b[row, j] = left
        state.groups[p, pa[moved]], state.groups[p, pb[moved]] = a, b
        state.refresh(torch.cat([p, p]), torch.cat([a, b]))
    found = state.groups.sort(-1).values.flatten(1)  # the order within a group is free: keep it close to the given one
    arranged = scores.gather(2, found[:, None].expand_as(scores))
    better = retained(arranged, pattern) > retained(scores, pattern)
    return torch.where(better[:, None], found, identity)
