"""The candidates of an allocation: every weight that may be masked, its menu of patterns, and their savings."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpcompile.errors import NotEligibleError
from mpcompile.ir.macs import count, node_macs
from mpcompile.ir.module import IRModule
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels.nm_format import Pattern, packed_bytes
from mpcompile.passes.base import Context
from mpcompile.passes.mask import eligible
from mpcompile.pruning import knapsack

MACS, BYTES = "MACs", "bytes"


@dataclass
class Candidate:
    """A weight, and the patterns that it may get.

    Attributes:
        uses: the nodes that use the weight.
        names: layer names of these uses, without duplicates.
        options: patterns from the densest to the sparsest; None is dense.
        saved: MACs or bytes that each option saves.
        costs: predicted damage of each option.
    """

    uses: list[LayerOp]
    names: list[str]
    options: list[Pattern | None]
    saved: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first layer that uses the weight."""
        return self.names[0]

    @property
    def density(self) -> list[float]:
        """Share of the values that each option keeps."""
        return [1.0 if pattern is None else pattern.density for pattern in self.options]

    @property
    def masks(self) -> list[Pattern]:
        """The options that are not dense."""
        return [pattern for pattern in self.options if pattern is not None]

    def set_costs(self, costs: list[float]) -> None:
        """Set the damage of :attr:`masks`; dense costs nothing."""
        self.costs = [0.0] * (len(self.options) - len(costs)) + costs


def label(pattern: Pattern | None) -> str:
    """Return the name of a pattern in the Plan."""
    return "dense" if pattern is None else str(pattern)


def find_candidates(gm: IRModule, ctx: Context) -> list[Candidate]:
    """Return every weight that may be masked, once, with its menu; layers that share a weight share its pattern.

    Raises:
        NotEligibleError: no weight can be masked.
    """
    names, by_weight = set(eligible(gm, ctx)), dict[int, Candidate]()
    dense = not ctx.config.patterns or "dense" in ctx.config.patterns
    for use in layers(gm, ctx.lifted):
        if use.name not in names:
            continue
        weight = use.weight.tensor
        menu: list[Pattern | None] = [p for p in ctx.config.menu(weight) if p.n < p.m]
        options = [None, *menu] if dense or not menu else menu
        candidate = by_weight.setdefault(id(weight), Candidate([], [], options))
        candidate.uses.append(use)
        if use.name not in candidate.names:
            candidate.names.append(use.name)
    if not by_weight:
        raise NotEligibleError(
            "no layer can be masked",
            expected="a linear or convolution layer that one of the patterns fits",
            found="none",
            hint="choose other patterns, or a narrower exclude",
        )
    return list(by_weight.values())


def fill_savings(gm: IRModule, ctx: Context, candidates: list[Candidate], unit: str) -> float:
    """Fill in the savings of every option, and return the total of the whole model.

    Args:
        unit: :data:`MACS` per sample, or :data:`BYTES` of all parameters.

    Raises:
        NotEligibleError: the total is 0.
    """
    if unit == BYTES:
        for candidate in candidates:
            weight = candidate.uses[0].weight.tensor
            size = weight.numel() * weight.itemsize
            packed = [size if p is None else packed_bytes(weight.shape, weight.itemsize, *p) for p in candidate.options]
            candidate.saved = [float(size - part) for part in packed]
        parameters = {id(p): p for p in [*gm.parameters(), *ctx.lifted.tensors.values()]}
        total = float(sum(p.numel() * p.itemsize for p in parameters.values()))
    else:
        macs = node_macs(gm, ctx.lifted)
        for candidate in candidates:
            own = sum(macs[name] for name in candidate.names)
            candidate.saved = [own * (1 - density) for density in candidate.density]
        counted = count(gm, lifted=ctx.lifted)[0]
        total = float(counted.dense or counted.executed)
    if not total:
        raise NotEligibleError(
            f"{unit} cannot be reduced: there are none",
            expected="example inputs with at least one sample",
            found="an empty batch, or a model without products",
            hint="give a batch that is not empty",
        )
    return total


def check_target(candidates: list[Candidate], target: float, total: float, unit: str) -> tuple[float, float]:
    """Return the smallest and the largest share that the menu can save.

    Raises:
        NotEligibleError: ``target`` is outside that range.
    """
    low, high = (v / total for v in knapsack.reachable([candidate.saved for candidate in candidates]))
    if not low * (1 - 1e-9) <= target <= high * (1 + 1e-9):
        menu = ", ".join(dict.fromkeys(label(p) for candidate in candidates for p in candidate.options))
        raise NotEligibleError(
            f"{unit} cannot be reduced by {target:.2%}",
            expected=f"{low:.2%} to {high:.2%}, with {menu} on {len(candidates)} layers",
            found=f"{target:.2%}",
            hint="give a denser or a sparser pattern in Config(patterns=...), or include more layers",
        )
    return low, high
