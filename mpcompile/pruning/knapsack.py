"""Layer budgets: which pattern each layer gets, so that a share of the work is saved at the least predicted damage.

Pure functions of numbers. Every layer has options (dense, 12:16, 8:16, ...), each with a damage and with what it saves;
one option a layer, savings of at least the target, the least total damage: a multiple-choice knapsack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import quad
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import binom, chi

from mpcompile.errors import InputError, NotEligibleError
from mpcompile.kernels.nm_format import Pattern

__all__ = ["even_mix", "knapsack", "lost_energy", "reachable", "seb_regime", "seb_weights"]

Array = NDArray[np.float64]
SLACK = 1e-9  # share of all savings that rounding may cost
TIME_LIMIT = 0.8  # s for the proof that nothing is better: layers that are alike leave many choices that cost the same


@lru_cache
def lost_energy(pattern: Pattern) -> float:
    """rho(N:M), the share of the energy of Gaussian weights that a magnitude mask removes.

    A value |z| = x is among the M - N smallest of its group with the probability that at most M - N - 1 of the others
    are smaller: rho = ∫ x² f(x) P[Bin(M - 1, F(x)) <= M - N - 1] dx, f and F those of |z|. Source: method section 1.

    >>> round(lost_energy(Pattern(2, 4)), 4), round(lost_energy(Pattern(8, 16)), 4)
    (0.1324, 0.0876)
    """
    n, m = pattern
    if n == m:
        return 0.0
    removed = lambda x: x * x * chi.pdf(x, 1) * binom.cdf(m - n - 1, m - 1, chi.cdf(x, 1))  # noqa: E731
    return float(quad(removed, 0, 10, epsabs=1e-10, limit=200)[0])


def reachable(saved: Sequence[ArrayLike]) -> tuple[float, float]:
    """The least and the most that the options of all layers save together."""
    values = [np.asarray(s, dtype=float) for s in saved]
    return float(sum(v.min() for v in values)), float(sum(v.max() for v in values))


def knapsack(costs: Sequence[ArrayLike], saved: Sequence[ArrayLike], target: float) -> tuple[list[int], float]:
    """One option a layer: the least total cost among those that save ``target`` or more together.

    An integer program, solved by HiGHS (scipy) on the options that bounds leave: to optimality, or, where layers are so
    much alike that the proof takes long, to what the bound can hardly better.

    Args:
        costs: for every layer, the predicted damage of each of its options; finite.
        saved: likewise, what each option saves, in any unit.
        target: in that unit.

    Returns:
        The index of every layer's option, and the price: damage for one more unit saved (the dual of the linear
        relaxation), 0 where the target binds nothing.

    Raises:
        InputError: a layer without options, options without a cost, or a cost that is not finite.
        NotEligibleError: no choice saves so much; the message gives the range.

    >>> knapsack([[0.0, 1.0], [0.0, 3.0]], [[0, 10], [0, 10]], 10)[0]
    [1, 0]
    """
    cost, save = [np.asarray(c, dtype=float) for c in costs], [np.asarray(s, dtype=float) for s in saved]
    if len(cost) != len(save) or any(
        c.shape != s.shape or c.ndim != 1 or not c.size for c, s in zip(cost, save, strict=True)
    ):
        raise InputError("every layer needs at least one option, with a cost and a saving each")
    if not all(np.isfinite(c).all() and np.isfinite(s).all() for c, s in zip(cost, save, strict=True)):
        raise InputError("the damage of an option is not finite", expected="finite costs and savings")
    least, most = reachable(save) if save else (0.0, 0.0)
    if target > most * (1 + SLACK):
        raise NotEligibleError("the target can't be reached", expected=f"{least:g} to {most:g}", found=f"{target:g}")
    if not cost:
        return [], 0.0
    wanted = min(target, most)
    kept = [_undominated(c, s) for c, s in zip(cost, save, strict=True)]
    price = _price(cost, save, kept, wanted)
    kept, at_hand = _competitive(cost, save, kept, wanted, price)
    if all(len(k) == 1 for k in kept):
        return at_hand, price
    c = np.concatenate([c[k] for c, k in zip(cost, kept, strict=True)])
    s = np.concatenate([s[k] for s, k in zip(save, kept, strict=True)])
    one_each, starts = _one_each(kept)
    # Tolerances of the solver are absolute: costs in units of what separates options, savings of the largest.
    base = float(sum(cost[i][k].min() for i, k in enumerate(kept)))
    offset = np.concatenate([np.full(len(k), cost[i][k].min()) for i, k in enumerate(kept)])
    c_unit, s_unit = float((c - offset).max()) or abs(base) or 1.0, float(np.abs(s).max()) or 1.0
    limits = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(s[None] / s_unit, wanted / s_unit * (1 - SLACK), np.inf),
    ]
    options = {"mip_rel_gap": 0.0, "presolve": False, "time_limit": TIME_LIMIT}
    found = milp(
        (c - offset) / c_unit, constraints=limits, integrality=np.ones(len(c)), bounds=Bounds(0, 1), options=options
    )
    if found.x is None:
        return at_hand, price
    solved = [int(k[found.x[a:b].argmax()]) for k, a, b in zip(kept, starts, starts[1:], strict=False)]
    enough = sum(s[i] for s, i in zip(save, solved, strict=True)) >= wanted * (1 - 1e-6)
    better = sum(v[i] - v[j] for v, i, j in zip(cost, solved, at_hand, strict=True)) < 0
    return solved if enough and better else at_hand, price


def _one_each(kept: Sequence[NDArray[np.int64]]) -> tuple[Array, NDArray[np.int64]]:
    """The matrix that adds up the options of each layer, and where each layer's options start."""
    starts = np.cumsum([0, *(len(k) for k in kept)])
    matrix = np.zeros((len(kept), starts[-1]))
    for row, (a, b) in enumerate(pairwise(starts)):
        matrix[row, a:b] = 1.0
    return matrix, starts


def _price(cost: Sequence[Array], save: Sequence[Array], kept: Sequence[NDArray[np.int64]], wanted: float) -> float:
    """Damage for one more unit saved, where options may be mixed: slopes of the layers' convex hulls, in order."""
    steps = []
    for c, s, k in zip(cost, save, kept, strict=True):
        hull = [k[0]]
        for i in k[1:]:
            while len(hull) > 1 and (c[i] - c[hull[-1]]) * (s[hull[-1]] - s[hull[-2]]) <= (
                c[hull[-1]] - c[hull[-2]]
            ) * (s[i] - s[hull[-1]]):
                hull.pop()
            hull.append(i)
        steps += [((c[b] - c[a]) / (s[b] - s[a]), s[b] - s[a]) for a, b in pairwise(hull)]
    missing = wanted - sum(s[k[0]] for s, k in zip(save, kept, strict=True))
    price = 0.0
    for slope, gain in sorted(steps):
        if missing <= 0:
            break
        price, missing = slope, missing - gain
    return float(price)


def _competitive(
    cost: Sequence[Array], save: Sequence[Array], kept: Sequence[NDArray[np.int64]], wanted: float, price: float
) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Options that an optimum may hold, whose Lagrangian bound is not above the cost of a choice at hand; and that."""
    reduced = [c[k] - price * s[k] for c, s, k in zip(cost, save, kept, strict=True)]
    chosen = [int(r.argmin()) for r in reduced]
    bound = sum(float(r.min()) for r in reduced) + price * wanted
    total = sum(float(s[k[j]]) for s, k, j in zip(save, kept, chosen, strict=True))
    while total < wanted * (1 - SLACK):
        moves = []
        for i, (c, s, k) in enumerate(zip(cost, save, kept, strict=True)):
            for j in range(chosen[i] + 1, len(k)):
                gain, loss = s[k[j]] - s[k[chosen[i]]], c[k[j]] - c[k[chosen[i]]]
                closes = total + gain >= wanted * (1 - SLACK)
                moves.append((not closes, loss if closes else loss / gain, i, j, gain))
        _, _, i, j, gain = min(moves)
        chosen[i], total = j, total + float(gain)
    chosen = _exchanged(cost, save, kept, chosen, total - wanted * (1 - SLACK))
    best = sum(float(c[k[j]]) for c, k, j in zip(cost, kept, chosen, strict=True))
    room = (best - bound) * (1 + 1e-9) + 1e-12 * abs(best)
    at_hand = [int(k[j]) for k, j in zip(kept, chosen, strict=True)]
    return [k[r <= r.min() + room] for k, r in zip(kept, reduced, strict=True)], at_hand


def _exchanged(
    cost: Sequence[Array], save: Sequence[Array], kept: Sequence[NDArray[np.int64]], chosen: list[int], spare: float
) -> list[int]:
    """Move two layers at a time, to what costs least among the pairs that leave ``spare`` at 0 or more."""
    chosen = list(chosen)
    layer = np.concatenate([np.full(len(k), i) for i, k in enumerate(kept)])
    option = np.concatenate([np.arange(len(k)) for k in kept])
    for _ in range(len(kept)):
        now = [k[j] for k, j in zip(kept, chosen, strict=True)]
        loss = np.concatenate([c[k] - c[i] for c, k, i in zip(cost, kept, now, strict=True)])
        gain = np.concatenate([s[k] - s[i] for s, k, i in zip(save, kept, now, strict=True)])
        pair = loss[:, None] + loss
        pair[(layer[:, None] == layer) | (gain[:, None] + gain + spare < 0)] = np.inf
        a, b = np.unravel_index(int(pair.argmin()), pair.shape)
        if not pair[a, b] < -1e-12 * np.abs(loss).max():
            break
        spare += gain[a] + gain[b]
        for move in (a, b):
            chosen[layer[move]] = int(option[move])
    return chosen


def _undominated(cost: Array, saved: Array) -> NDArray[np.int64]:
    """Options that no other betters: cheaper ones save less."""
    order = np.lexsort((cost, -saved))
    best, kept = math.inf, []
    for index in order:
        if cost[index] < best:
            best = cost[index]
            kept.append(index)
    return np.array(kept[::-1])


def even_mix(densities: Sequence[ArrayLike], saved: Sequence[ArrayLike], target: float) -> list[int]:
    """One density for all layers, or, where none meets the target, the two around it, spread evenly over the depth.

    Args:
        densities: for every layer, of each of its options (1 is dense).
        saved: likewise, what it saves.
        target: to be saved, in that unit.

    Returns:
        The index of every layer's option. The savings come to the target, or to as little above it as whole layers
        allow.

    >>> even_mix([[1.0, 0.5]] * 4, [[0, 1]] * 4, 2)
    [0, 1, 0, 1]
    """
    density, save = [np.asarray(d, dtype=float) for d in densities], [np.asarray(s, dtype=float) for s in saved]
    levels = sorted({float(d) for row in density for d in row}, reverse=True)
    rows = [[int(np.abs(d - level).argmin()) for d in density] for level in levels]
    totals = [sum(s[i] for s, i in zip(save, row, strict=True)) for row in rows]
    enough = next((i for i, total in enumerate(totals) if total >= target * (1 - SLACK)), len(levels) - 1)
    below, above = rows[max(0, enough - 1)], rows[enough]
    gains = [s[a] - s[b] for s, a, b in zip(save, above, below, strict=True)]
    missing = target - totals[max(0, enough - 1)]
    share, owed, chosen = (missing / sum(gains) if sum(gains) > 0 else 1.0), 0.0, list(below)
    for layer, gain in enumerate(gains):
        owed += share * gain
        if gain > 0 and owed > gain / 2:
            owed -= gain
            chosen[layer] = above[layer]
    return _settle(chosen, below, above, save, target)


def _settle(chosen: list[int], below: list[int], above: list[int], save: Sequence[Array], target: float) -> list[int]:
    """Move single layers between two levels until the target is met and no layer could go back."""
    gains = [s[a] - s[b] for s, a, b in zip(save, above, below, strict=True)]
    total = sum(s[i] for s, i in zip(save, chosen, strict=True))
    while total < target * (1 - SLACK):
        left = [i for i, g in enumerate(gains) if g > 0 and chosen[i] == below[i]]
        if not left:
            break
        lacking = target - total
        place = min(left, key=lambda i: (gains[i] < lacking * (1 - SLACK), abs(gains[i] - lacking)))
        chosen[place] = above[place]
        total += gains[place]
    for place in sorted(range(len(gains)), key=lambda i: -gains[i]):
        if gains[place] > 0 and chosen[place] == above[place] and total - gains[place] >= target * (1 - SLACK):
            chosen[place] = below[place]
            total -= gains[place]
    return chosen


def seb_regime(sparsity: float) -> tuple[float, float, float]:
    """Presets of Spectral Edge Budgeting: beta of attention and of other layers, and s_d, by the share removed.

    Up to 0.2 the paper finds plain magnitude as good: beta is 0. Source: arXiv 2606.02608, ViT-B/16.
    """
    for limit, preset in ((0.2, (0.0, 0.0, 0.3)), (0.4, (1.0, 1.0, 0.5)), (0.55, (1.25, 1.25, 0.7))):
        if sparsity <= limit:
            return preset
    return 1.0, 2.0, 0.85


def seb_weights(edges: ArrayLike, sparsity: float, beta: ArrayLike, s_d: float) -> Array:
    """w = max(0.1, 1 + beta d(s) z): z the edges σ₊ standardised over the layers, d(s) = max(0, 1 - s/s_d).

    Scores are |W| / w: a larger edge is pruned more. Source: arXiv 2606.02608, Spectral Edge Budgeting.

    >>> seb_weights([1.0, 2.0, 3.0], sparsity=0.35, beta=1.0, s_d=0.7).round(3)
    array([0.388, 1.   , 1.612])
    """
    edge = np.asarray(edges, dtype=float)
    spread = float(edge.std())
    z = (edge - edge.mean()) / spread if spread > 0 else np.zeros_like(edge)
    return np.maximum(0.1, 1 + np.asarray(beta) * max(0.0, 1 - sparsity / s_d) * z)
