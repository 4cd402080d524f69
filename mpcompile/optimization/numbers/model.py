"""The numbers of a search: what every choice damages and costs, and the best choice for a budget of damage.

Damage is the divergence of the outputs from those of the dense model, KL in nats. It is measured for levels of merging
as a whole, since it is not additive over blocks, and predicted for patterns, layer by layer (pruning/damage.py). Both
together damage

    D = t + s m + 2 κ sqrt(t s m),

t the damage of merging, m the sum over the layers; the scale s and the interaction κ are measured (:meth:`Model.fit`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mpcompile.optimization.recipe import Recipe
from mpcompile.pruning import knapsack


@dataclass(frozen=True)
class Level:
    """A schedule of merging.

    Attributes:
        merges: tokens merged per block; empty for none.
        damage: divergence that it causes by itself.
        cost: of the whole model with this schedule and dense weights: microseconds, multiply-accumulates or bytes.
    """

    merges: tuple[int, ...]
    damage: float
    cost: float


@dataclass(frozen=True)
class Menu:
    """The patterns of one weight.

    Attributes:
        layers: the layers that use it, which share its pattern.
        patterns: ``"dense"`` first.
        damages: divergence that each pattern causes by itself.
        costs: for each level, the cost of each pattern, in the unit of :attr:`Level.cost`.
    """

    layers: tuple[str, ...]
    patterns: tuple[str, ...]
    damages: tuple[float, ...]
    costs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Choice:
    """The cheapest choice for a budget.

    Attributes:
        recipe: the choice.
        level: number of its level.
        masks: sum m of the damages of its patterns.
        damage, cost: predicted, of the whole.
    """

    recipe: Recipe
    level: int
    masks: float
    damage: float
    cost: float


@dataclass(frozen=True)
class Drops:
    """Expected drop as a function of damage: drop = factor * damage^power, fitted to builds of which both are known.

    Example:
        >>> round(Drops().of(0.04), 4), round(Drops().damage(0.01), 3)
        (0.0089, 0.046)
    """

    factor: float = 0.13
    power: float = 0.833

    def of(self, damage: float) -> float:
        """Return the expected drop of top-1, a share."""
        return min(1.0, self.factor * max(0.0, damage) ** self.power)

    def damage(self, drop: float) -> float:
        """Return the damage at which a drop is expected."""
        return (drop / self.factor) ** (1 / self.power)

    def fit(self, pairs: Sequence[tuple[float, float]]) -> Drops:
        """Return the function through (damage, expected drop) of builds, by least squares of the logarithms."""
        known = [(math.log(d), math.log(e)) for d, e in pairs if d > 1e-6 and e > 1e-5]
        if not known:
            return self
        x, y = np.array(known).T
        if len(known) < 3 or np.ptp(x) < 1:
            return replace(self, factor=float(np.exp((y - self.power * x).mean())))
        power = float(np.clip(np.polyfit(x, y, 1)[0], 0.4, 1.2))
        return Drops(float(np.exp((y - power * x).mean())), power)


@dataclass
class Model:
    """All numbers of a search.

    Attributes:
        levels: schedules of merging, by rising damage; the first merges nothing.
        menus: of all weights that may be masked.
        scale, interaction: s and κ.
        drops: expected drop as a function of damage.

    Example:
        >>> menu = Menu(("fc",), ("dense", "8:16"), (0.0, 0.1), ((10.0, 6.0),))
        >>> model = Model([Level((), 0.0, 30.0)], [menu])
        >>> model.best(0.2).cost, model.best(0.05).cost
        (26.0, 30.0)
    """

    levels: list[Level]
    menus: list[Menu]
    scale: float = 1.0
    interaction: float = 0.3
    drops: Drops = field(default_factory=Drops)

    def damage(self, merging: float, masks: float) -> float:
        """Return D for the damage t of merging and the sum m over the patterns."""
        scaled = self.scale * masks
        return merging + scaled + 2 * self.interaction * math.sqrt(max(0.0, merging * scaled))

    def room(self, merging: float, budget: float) -> float:
        """Return the sum m that a budget leaves behind merging of damage t; negative if merging exceeds it."""
        if merging > budget:
            return -1.0
        root = math.sqrt(self.interaction**2 * merging + budget - merging) - self.interaction * math.sqrt(merging)
        return root * root / self.scale

    def best(self, budget: float, masks: bool = True, tokens: bool = True) -> Choice:
        """Return the cheapest choice with a predicted damage within a budget.

        For each level, the patterns are an exact choice (a multiple-choice knapsack solved by HiGHS).

        Args:
            budget: of damage; 0 or more.
            masks, tokens: allow these.
        """
        found = [
            self._at(number, room, masks)
            for number, level in enumerate(self.levels)
            if (number == 0 or tokens) and (room := self.room(level.damage, budget)) >= 0
        ]
        return min(found, key=lambda choice: (choice.cost, choice.damage))

    def _at(self, number: int, room: float, masks: bool) -> Choice:
        """Return the cheapest choice at a level whose patterns damage at most ``room``."""
        level, menus = self.levels[number], self.menus if masks else []
        chosen = [0] * len(menus)
        if menus and room > 0:
            most = [max(menu.damages) for menu in menus]
            spared = [[top - damage for damage in menu.damages] for menu, top in zip(menus, most, strict=True)]
            # a pattern that damages more than all others may have to be spared in full
            costs = [list(menu.costs[number]) for menu in menus]
            target = max(0.0, sum(most) - room)
            chosen, _ = knapsack.solve(costs, spared, target)
        patterns = tuple(
            (layer, menu.patterns[i]) for menu, i in zip(menus, chosen, strict=True) if i for layer in menu.layers
        )
        lost = sum(menu.damages[i] for menu, i in zip(menus, chosen, strict=True))
        cost = level.cost + sum(
            menu.costs[number][i] - menu.costs[number][0] for menu, i in zip(menus, chosen, strict=True)
        )
        return Choice(Recipe(level.merges, patterns), number, lost, self.damage(level.damage, lost), cost)

    def reach(self, masks: bool = True, tokens: bool = True) -> tuple[float, float]:
        """Return the largest and the smallest predicted cost of any choice."""
        return self.levels[0].cost, self.best(math.inf, masks, tokens).cost

    def least_damage(self, cost: float, masks: bool = True, tokens: bool = True) -> Choice:
        """Return the choice that costs at most ``cost``, with the least damage: by bisection on the budget."""
        low, high = 0.0, 1e-4
        while self.best(high, masks, tokens).cost > cost and high < 1e6:
            low, high = high, high * 4
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if self.best(middle, masks, tokens).cost <= cost else (middle, high)
        return self.best(high, masks, tokens)

    def fit(self, measured: Sequence[tuple[float, float, float]]) -> None:
        """Set the scale and the interaction from builds.

        Args:
            measured: (t, m, D) of builds: damage of merging, predicted sum over the patterns, measured divergence.
        """
        alone = [math.log(d / m) for t, m, d in measured if m > 0 and t == 0 and d > 0]
        if alone:
            self.scale = math.exp(sum(alone) / len(alone))
        both = [
            (d - t - self.scale * m) / (2 * math.sqrt(t * self.scale * m)) for t, m, d in measured if m > 0 and t > 0
        ]
        if both:
            self.interaction = min(1.0, max(-0.5, sum(both) / len(both)))


def interpolated(at: Mapping[int, float], rows: float) -> float:
    """Return a value that is known at some numbers of rows: linear in between, in proportion to the rows outside.

    Example:
        >>> interpolated({100: 10.0, 200: 30.0}, 150), interpolated({100: 10.0}, 50), interpolated({100: 10.0}, 300)
        (20.0, 5.0, 30.0)
    """
    known = sorted(at.items())
    outside = known[0] if rows <= known[0][0] else known[-1] if rows >= known[-1][0] else None
    if outside is not None:
        return outside[1] * rows / outside[0]
    return float(np.interp(rows, [r for r, _ in known], [v for _, v in known]))
