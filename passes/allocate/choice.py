"""The choice of patterns: the one with the least predicted damage for a target, the uniform one, and the reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpcompile.passes.allocate.menu import Candidate, label
from mpcompile.passes.allocate.prediction import UNIFORM
from mpcompile.pruning import knapsack


@dataclass
class Choice:
    """The best choice by one kind of damage, and the uniform choice from the same menu.

    Attributes:
        kind: kind of damage.
        candidates: the candidates, with the costs and the menu of that kind.
        best, even: the best and the uniform choice, as indices into each candidate's options.
        price: damage per unit saved at the margin of the best choice; 0 if nothing was predicted.
        inadmissible: ``"LAYER PATTERN"`` -> why that option was removed from the menu.
    """

    kind: str
    candidates: list[Candidate]
    best: list[int]
    even: list[int]
    price: float
    inadmissible: dict[str, str]

    def damage(self, chosen: Sequence[int]) -> float:
        """Return the predicted damage of a choice."""
        return float(sum(c.costs[i] for c, i in zip(self.candidates, chosen, strict=True)))

    def saved(self, chosen: Sequence[int]) -> float:
        """Return the MACs or bytes that a choice saves."""
        return float(sum(c.saved[i] for c, i in zip(self.candidates, chosen, strict=True)))


def choose(candidates: list[Candidate], kind: str, target: float, inadmissible: dict[str, str]) -> Choice:
    """Return the best and the uniform choice for a target, from candidates whose savings and costs are filled in."""
    costs, saved = [c.costs for c in candidates], [c.saved for c in candidates]
    even = knapsack.even_mix([c.density for c in candidates], saved, target)
    best, price = (even, 0.0) if kind == UNIFORM else knapsack.solve(costs, saved, target)
    return Choice(kind, candidates, best, even, price, inadmissible)


def describe_uniform(candidates: Sequence[Candidate], chosen: Sequence[int]) -> str:
    """Describe a uniform choice in words."""
    used = Counter(label(c.options[i]) for c, i in zip(candidates, chosen, strict=True))
    names = " and ".join(sorted(used))
    return f"{names} everywhere" if len(used) == 1 else f"{names} mixed evenly"


def explain_layers(
    choice: Choice, chosen: Sequence[int], total: float, kept: str, unit: str
) -> dict[str, dict[str, Any]]:
    """Return for every layer its pattern, the damage and savings of each option, and the reason for the choice."""
    entries = {}
    uniform = "uniform: better than allocation on held-out samples" if choice.price else "uniform, as requested"
    for candidate, i in zip(choice.candidates, chosen, strict=True):
        options = {
            label(p): {"damage": c, "saved": s / total}
            for p, c, s in zip(candidate.options, candidate.costs, candidate.saved, strict=True)
        }
        why = _why(candidate, i, choice.price, unit) if kept == "allocation" else uniform
        for name in candidate.names:
            entries[name] = {"pattern": label(candidate.options[i]), "why": why, "options": options}
    return entries


def _why(candidate: Candidate, i: int, price: float, unit: str) -> str:
    """Compare the next sparser and the next denser option: damage per unit saved, over the marginal price."""

    def ratio(a: int, b: int) -> str:
        gain = (candidate.saved[b] - candidate.saved[a]) * price
        return f"{(candidate.costs[b] - candidate.costs[a]) / gain:.2g}x" if gain > 0 else "more than"

    parts = []
    if i + 1 < len(candidate.options):
        parts.append(f"{label(candidate.options[i + 1])} would save {unit} at {ratio(i, i + 1)} the marginal damage")
    else:
        parts.append("the sparsest on its menu")
    if i > 0:
        parts.append(f"chosen over {label(candidate.options[i - 1])} at {ratio(i - 1, i)} the marginal damage")
    return ", ".join(parts)
