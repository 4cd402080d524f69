"""Layer budgets: one option per layer, so that enough is saved at the least total cost. Pure functions of numbers.

Every layer has options (dense, 12:16, 8:16, ...), each with a cost (its predicted damage) and a saving. Choosing one
option per layer such that the savings reach a target at the least total cost is a multiple-choice knapsack problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from mpcompile._moved import renamed
from mpcompile.errors import InputError, NotEligibleError

__all__ = ["even_mix", "reachable", "solve"]

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
SLACK = 1e-9  # share of the savings that rounding may lose
TIME_LIMIT = 0.8  # s for the proof of optimality: similar layers allow many choices of nearly the same cost

__getattr__ = renamed(
    __name__,
    {
        "knapsack": "pruning.knapsack.solve",
        "lost_energy": "pruning.damage.lost_energy",
        "seb_regime": "pruning.edge_budget.seb_preset",
        "seb_weights": "pruning.edge_budget.seb_weights",
    },
)


def reachable(saved: Sequence[ArrayLike]) -> tuple[float, float]:
    """Return the least and the most that the options of all layers can save together."""
    values = [np.asarray(s, dtype=float) for s in saved]
    return float(sum(v.min() for v in values)), float(sum(v.max() for v in values))


def solve(costs: Sequence[ArrayLike], saved: Sequence[ArrayLike], target: float) -> tuple[list[int], float]:
    """Choose one option per layer, such that they save ``target`` or more together at the least total cost.

    The integer program is solved by HiGHS (scipy), on the options that Lagrangian bounds do not rule out. The result is
    optimal; if many layers are so similar that the proof would take longer than 0.8 s, it is the best choice found by
    then.

    Args:
        costs: for every layer, the cost of each of its options; finite.
        saved: for every layer, the saving of each of its options, in any unit.
        target: the total saving required, in the same unit.

    Returns:
        The index of every layer's option, and the shadow price: the cost of one more unit saved (the dual of the linear
        relaxation), 0 where the target is not binding.

    Raises:
        InputError: a layer without options, options without a cost, or a cost that is not finite.
        NotEligibleError: no choice saves enough; the message gives the range.

    >>> solve([[0.0, 1.0], [0.0, 3.0]], [[0, 10], [0, 10]], 10)[0]
    [1, 0]
    """
    cost, save = _checked(costs, saved, target)
    if not cost:
        return [], 0.0
    wanted = min(target, reachable(save)[1])
    candidates = [_undominated(c, s) for c, s in zip(cost, save, strict=True)]
    price = _shadow_price(cost, save, candidates, wanted)
    candidates, incumbent = _competitive(cost, save, candidates, wanted, price)
    if all(len(k) == 1 for k in candidates):
        return incumbent, price
    solved = _integer_program(cost, save, candidates, wanted)
    if solved is None:
        return incumbent, price
    enough = sum(s[i] for s, i in zip(save, solved, strict=True)) >= wanted * (1 - 1e-6)
    better = sum(v[i] - v[j] for v, i, j in zip(cost, solved, incumbent, strict=True)) < 0
    return solved if enough and better else incumbent, price


def _checked(costs: Sequence[ArrayLike], saved: Sequence[ArrayLike], target: float) -> tuple[list[Array], list[Array]]:
    """Return costs and savings as arrays, after the checks of :func:`solve`."""
    cost, save = [np.asarray(c, dtype=float) for c in costs], [np.asarray(s, dtype=float) for s in saved]
    if len(cost) != len(save) or any(
        c.shape != s.shape or c.ndim != 1 or not c.size for c, s in zip(cost, save, strict=True)
    ):
        raise InputError("every layer needs at least one option, with a cost and a saving each")
    if not all(np.isfinite(c).all() and np.isfinite(s).all() for c, s in zip(cost, save, strict=True)):
        raise InputError("the damage of an option is not finite", expected="finite costs and savings")
    least, most = reachable(save) if save else (0.0, 0.0)
    if target > most * (1 + SLACK):
        raise NotEligibleError("the target cannot be reached", expected=f"{least:g} to {most:g}", found=f"{target:g}")
    return cost, save


def _integer_program(
    cost: Sequence[Array], save: Sequence[Array], candidates: Sequence[Indices], wanted: float
) -> list[int] | None:
    """Return the best choice among the candidates that HiGHS finds within the time limit, or None."""
    c = np.concatenate([c[k] for c, k in zip(cost, candidates, strict=True)])
    s = np.concatenate([s[k] for s, k in zip(save, candidates, strict=True)])
    one_each, starts = _one_each(candidates)
    # The solver's tolerances are absolute: costs are scaled by the largest difference within a layer, savings by the
    # largest saving.
    base = float(sum(cost[i][k].min() for i, k in enumerate(candidates)))
    offset = np.concatenate([np.full(len(k), cost[i][k].min()) for i, k in enumerate(candidates)])
    c_unit, s_unit = float((c - offset).max()) or abs(base) or 1.0, float(np.abs(s).max()) or 1.0
    limits = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(s[None] / s_unit, wanted / s_unit * (1 - SLACK), np.inf),
    ]
    options = {"mip_rel_gap": 0.0, "presolve": False, "time_limit": TIME_LIMIT}
    solution = milp(
        (c - offset) / c_unit, constraints=limits, integrality=np.ones(len(c)), bounds=Bounds(0, 1), options=options
    )
    if solution.x is None:
        return None
    return [int(k[solution.x[a:b].argmax()]) for k, a, b in zip(candidates, starts, starts[1:], strict=False)]


def _one_each(candidates: Sequence[Indices]) -> tuple[Array, Indices]:
    """Return the matrix that sums the options of each layer, and where each layer's options start."""
    starts = np.cumsum([0, *(len(k) for k in candidates)])
    matrix = np.zeros((len(candidates), starts[-1]))
    for row, (a, b) in enumerate(pairwise(starts)):
        matrix[row, a:b] = 1.0
    return matrix, starts


def _shadow_price(cost: Sequence[Array], save: Sequence[Array], candidates: Sequence[Indices], wanted: float) -> float:
    """Return the cost of one more unit saved if options could be mixed.

    The slopes of the layers' convex hulls are taken in rising order until the target is met; the last one is the price.
    """
    steps = []
    for c, s, k in zip(cost, save, candidates, strict=True):
        hull = [k[0]]
        for i in k[1:]:
            while len(hull) > 1 and (c[i] - c[hull[-1]]) * (s[hull[-1]] - s[hull[-2]]) <= (
                c[hull[-1]] - c[hull[-2]]
            ) * (s[i] - s[hull[-1]]):
                hull.pop()
            hull.append(i)
        steps += [((c[b] - c[a]) / (s[b] - s[a]), s[b] - s[a]) for a, b in pairwise(hull)]
    missing = wanted - sum(s[k[0]] for s, k in zip(save, candidates, strict=True))
    price = 0.0
    for slope, gain in sorted(steps):
        if missing <= 0:
            break
        price, missing = slope, missing - gain
    return float(price)


def _competitive(
    cost: Sequence[Array], save: Sequence[Array], candidates: Sequence[Indices], wanted: float, price: float
) -> tuple[list[Indices], list[int]]:
    """Return the options that an optimum may contain, and the incumbent.

    The incumbent is a feasible choice, found greedily. An option is ruled out if its Lagrangian bound exceeds the
    incumbent's cost.
    """
    reduced = [c[k] - price * s[k] for c, s, k in zip(cost, save, candidates, strict=True)]
    chosen = [int(r.argmin()) for r in reduced]
    bound = sum(float(r.min()) for r in reduced) + price * wanted
    total = sum(float(s[k[j]]) for s, k, j in zip(save, candidates, chosen, strict=True))
    while total < wanted * (1 - SLACK):
        moves = []
        for i, (c, s, k) in enumerate(zip(cost, save, candidates, strict=True)):
            for j in range(chosen[i] + 1, len(k)):
                gain, loss = s[k[j]] - s[k[chosen[i]]], c[k[j]] - c[k[chosen[i]]]
                closes = total + gain >= wanted * (1 - SLACK)
                moves.append((not closes, loss if closes else loss / gain, i, j, gain))
        _, _, i, j, gain = min(moves)
        chosen[i], total = j, total + float(gain)
    chosen = _exchanged(cost, save, candidates, chosen, total - wanted * (1 - SLACK))
    best = sum(float(c[k[j]]) for c, k, j in zip(cost, candidates, chosen, strict=True))
    room = (best - bound) * (1 + 1e-9) + 1e-12 * abs(best)
    incumbent = [int(k[j]) for k, j in zip(candidates, chosen, strict=True)]
    return [k[r <= r.min() + room] for k, r in zip(candidates, reduced, strict=True)], incumbent


def _exchanged(
    cost: Sequence[Array], save: Sequence[Array], candidates: Sequence[Indices], chosen: list[int], spare: float
) -> list[int]:
    """Change two layers at a time, as long as that lowers the cost: the best pair that keeps ``spare`` at 0 or more."""
    chosen = list(chosen)
    layer = np.concatenate([np.full(len(k), i) for i, k in enumerate(candidates)])
    option = np.concatenate([np.arange(len(k)) for k in candidates])
    for _ in range(len(candidates)):
        current = [k[j] for k, j in zip(candidates, chosen, strict=True)]
        loss = np.concatenate([c[k] - c[i] for c, k, i in zip(cost, candidates, current, strict=True)])
        gain = np.concatenate([s[k] - s[i] for s, k, i in zip(save, candidates, current, strict=True)])
        pair = loss[:, None] + loss
        pair[(layer[:, None] == layer) | (gain[:, None] + gain + spare < 0)] = np.inf
        a, b = np.unravel_index(int(pair.argmin()), pair.shape)
        if not pair[a, b] < -1e-12 * np.abs(loss).max():
            break
        spare += gain[a] + gain[b]
        for move in (a, b):
            chosen[layer[move]] = int(option[move])
    return chosen


def _undominated(cost: Array, saved: Array) -> Indices:
    """Return the options that no other option dominates, by rising cost and savings."""
    order = np.lexsort((cost, -saved))
    best, undominated = math.inf, []
    for index in order:
        if cost[index] < best:
            best = cost[index]
            undominated.append(index)
    return np.array(undominated[::-1])


def even_mix(densities: Sequence[ArrayLike], saved: Sequence[ArrayLike], target: float) -> list[int]:
    """Give all layers the same density, or mix the two densities around the target, spread evenly over the depth.

    Args:
        densities: for every layer, the density of each of its options (1 is dense).
        saved: for every layer, the saving of each of its options, in any unit.
        target: the total saving required, in the same unit.

    Returns:
        The index of every layer's option. The savings meet the target, or exceed it by as little as whole layers allow.

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
    return _settled(chosen, below, above, save, target)


def _settled(chosen: list[int], below: list[int], above: list[int], save: Sequence[Array], target: float) -> list[int]:
    """Move single layers between two levels until the target is met and no layer can move back."""
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
