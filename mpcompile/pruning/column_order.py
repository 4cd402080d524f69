"""Column order: arrange columns into groups such that N:M masks keep more. Pure functions of score matrices.

The search exchanges columns between groups by simulated annealing. In every step the groups are paired at random. For
each pair, the exact gains of all M x M exchanges are computed at once over all rows, from the N-th and (N+1)-th largest
score of every row and group; then at most one exchange is drawn, by its gain and the temperature. These are the moves
of stripe-group optimisation (Pool and Yu 2021), restricted to pairs of groups, with annealing in place of their bounded
regressions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpcompile.kernels.nm_format import Pattern

_CHUNK = 1 << 22  # elements of the largest temporary


def retained(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return the sum of the N largest of every M consecutive scores: (..., R, K) -> (...), float64."""
    groups = scores.unflatten(-1, (-1, pattern.m))
    return groups.topk(pattern.n, dim=-1).values.sum(-1).double().sum((-2, -1))


def efficacy(before: float, after: float, scores: Tensor, pattern: Pattern) -> float:
    """Return how far a new order closes the gap between the original order and masks without groups, in percent.

    Masks without groups keep the largest scores of every row, a share of N / M. Source: Pool and Yu 2021, apex
    permutation tests.

    Args:
        before, after: the sum of scores retained under the original and the new order, from :func:`retained`.
        scores: (R, K).
    """
    count = scores.shape[-1] * pattern.n // pattern.m
    free = float(scores.topk(count, dim=-1).values.double().sum())
    return 100 * (after - before) / (free - before) if free > before else 0.0


class _State:
    """Columns of P independent problems in G groups of M, and two values per column and row, which determine the gains.

    Attributes:
        groups: (P, G, M), column numbers.
        limit: (P, K, R), the score that a column in its place must exceed to be kept; the group retains at least this.
        worth: (P, K, R), what the group loses with the column: its score if it is kept, else the N-th largest of the
            group, which ``limit`` then restores.
    """

    def __init__(self, scores: Tensor, pattern: Pattern) -> None:
        self.m, self.n = pattern.m, pattern.n
        self.scores = scores.transpose(1, 2).contiguous()  # (P, K, R)
        count, k, _ = self.scores.shape
        self.groups = torch.arange(k, device=scores.device).view(1, -1, self.m).repeat(count, 1, 1)  # (P, G, M)
        self.problem = torch.arange(count, device=scores.device)
        self.limit = torch.empty_like(self.scores)
        self.worth = torch.empty_like(self.scores)
        problem = self.problem[:, None].expand(-1, k // self.m).reshape(-1)
        self.refresh(problem, self.groups.reshape(-1, self.m))

    def refresh(self, problem: Tensor, columns: Tensor) -> None:
        """Recompute X groups whose columns (X, M) changed."""
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
        """Return the gain of exchanging each column of group a with each of group b: (X, M) each -> (X, M, M)."""
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
    """Return sums over rows, (..., R) -> (...), float64.

    Contiguous rows are each summed by one thread, so that results do not depend on the number of threads.
    """
    return x.contiguous().sum(-1).double()


def _drawn(gain: Tensor, temperature: float, least: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw an exchange, or none, for each pair of groups.

    Gumbel noise on all gains, and on 0 for no exchange, draws in proportion to exp(gain / temperature). At temperature
    0 the best exchange is taken if it gains more than ``least``.

    Args:
        gain: (X, M M), the gain of every exchange in each pair.

    Returns:
        The indices of the pairs that exchange, and, for each of the X pairs, its best exchange.
    """
    if temperature > 0:
        noise = torch.rand(len(gain), gain.shape[1] + 1, generator=generator).to(gain).clamp_(1e-12, 1 - 1e-7)
        noise = -torch.log(-torch.log(noise)) * temperature
        stay = noise[:, -1]
        best, where = (gain + noise[:, :-1]).max(1)
    else:
        best, where = gain.max(1)
        stay = torch.full_like(best, least)
    return (best > stay).nonzero()[:, 0], where


def search(scores: Tensor, pattern: Pattern, steps: int = 400, seed: int = 0, start: float = 0.25) -> Tensor:
    """Return orders of columns that raise the sum of the N largest scores of every M neighbours.

    Args:
        scores: (P, R, K), not negative: P independent problems; each finds one order for all its rows.
        pattern: N:M; K must be a multiple of M.
        steps: number of annealing steps; each pairs every group with another. The time is proportional to it.
        seed: the result depends on the scores, the steps, the start and this seed only.
        start: the first temperature, as a share of the standard deviation of the gains.

    Returns:
        (P, K), the column for each place. No order is worse than the original one.

    Example:
        >>> search(torch.tensor([[[9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]]]), Pattern(2, 4)).view(2, 4).lt(4).sum(1)
        tensor([2, 2])
    """
    count, _, k = scores.shape
    identity = torch.arange(k, device=scores.device).expand(count, -1)
    group_count = k // pattern.m
    if group_count < 2 or pattern.n >= pattern.m:
        return identity.clone()
    generator = torch.Generator().manual_seed(seed)
    state = _State(scores.float(), pattern)
    half = group_count // 2
    problem = state.problem[:, None].expand(-1, half).reshape(-1)
    spread = 0.0
    for step in range(steps):
        order = torch.rand(count, group_count, generator=generator).argsort(1).to(scores.device)
        places = order[:, : 2 * half].reshape(count, 2, half)
        pa, pb = places[:, 0].reshape(-1), places[:, 1].reshape(-1)
        a, b = state.groups[problem, pa], state.groups[problem, pb]
        gain = state.gains(problem, a, b).flatten(1)
        if step == 0:
            spread = float(gain.double().std())
        temperature = spread * start * (1 - step / (0.9 * steps)) ** 2 if step < 0.9 * steps else 0.0
        moved, where = _drawn(gain, temperature, 1e-6 * spread, generator)
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
    order = state.groups.sort(-1).values.flatten(1)  # the order within a group is free: stay close to the original
    arranged = scores.gather(2, order[:, None].expand_as(scores))
    better = retained(arranged, pattern) > retained(scores, pattern)
    return torch.where(better[:, None], order, identity)
