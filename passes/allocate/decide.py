"""Allocate: give each layer its own pattern, chosen to save a given share of the MACs (or bytes) with least damage.

menu.py lists the candidates and the savings of each pattern, prediction.py predicts the damage to every layer under
every pattern, and choice.py finds the best choice (an exact knapsack, pruning/knapsack.py). With data, that choice has
to beat the uniform choice with equal savings on calibration samples that the prediction has not seen (comparison.py).
The better one is kept, and the Plan names it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from mpcompile.calibration.sensitivity import batch_length
from mpcompile.errors import ConfigError
from mpcompile.ir.module import IRModule
from mpcompile.ir.view import layers
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.allocate.choice import Choice, choose, describe_uniform, explain_layers
from mpcompile.passes.allocate.comparison import held_out_loss
from mpcompile.passes.allocate.menu import BYTES, MACS, Candidate, check_target, fill_savings, find_candidates
from mpcompile.passes.allocate.prediction import CALIBRATED, DAMAGES, MP, UNIFORM, Samples, predict, split_samples
from mpcompile.passes.base import Allocated, Context, Decision, Pass
from mpcompile.plan import LayerPlan

__all__ = ["DAMAGES", "Allocate", "Allocation", "Comparison", "Solution"]


@dataclass(frozen=True)
class Comparison:
    """Losses of the model's output on held-out samples.

    Attributes:
        samples: number of held-out samples.
        allocation, uniform: loss under the allocation and under the uniform choice.
        tried: kind of damage -> loss under the best choice by that kind.
    """

    samples: int
    allocation: float
    uniform: float
    tried: dict[str, float]


@dataclass(frozen=True)
class Solution:
    """A choice of patterns.

    Attributes:
        damage: kind of damage that was predicted.
        unit: what is saved, ``"MACs"`` or ``"bytes"``.
        target: share that was requested.
        reachable: least and largest share that the menu can save.
        predicted: predicted damage of ``"allocation"`` and of ``"uniform"``.
        uniform: the uniform choice in words.
        held_out: the comparison on held-out samples, or None if there was none.
        kept: ``"allocation"`` or ``"uniform"``.
        inadmissible: ``"LAYER PATTERN"`` -> why that option was removed from the menu.
        saved: share that is saved.
        layers: layer name -> its pattern, the reason for it, and its options.
    """

    damage: str
    unit: str
    target: float
    reachable: tuple[float, float]
    predicted: dict[str, float]
    uniform: str
    held_out: Comparison | None
    kept: str
    inadmissible: dict[str, str]
    saved: float
    layers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Allocation(Decision):
    """The patterns of the layers.

    Attributes:
        requested: False if there is no target.
        given: number of layers whose patterns were allocated in another graph of the same model, or None.
        solution: the choice made for this graph, or None.
    """

    requested: bool
    given: int | None = None
    solution: Solution | None = None

    def record(self) -> dict[str, Any]:
        values = super().record()
        solution, given = values.pop("solution"), values.pop("given")
        return {**values, **(solution or {}), **({} if given is None else {"given": given})}


class Allocate(Pass):
    """A pattern for each layer, for :attr:`Config.mac_reduction`.

    Args:
        damage: ``"calibrated"`` predicts the loss of the model's output from the inputs and gradients of the layers;
            ``"mp"`` splits a weight into noise and structure by its Marchenko-Pastur fit, and counts the share rho(N:M)
            of the noise as lost. None: with calibration data, both, keeping the choice that loses least on held-out
            samples; without, ``"mp"``. ``"magnitude"`` is the energy of the removed weights over the mean square of the
            layer's weights, ``"seb"`` that energy over the square of the layer's w in Spectral Edge Budgeting (arXiv
            2606.02608). ``"uniform"`` predicts nothing: all layers get one density, or two densities mixed evenly.
        bytes_reduction: share of the bytes of all parameters to save, in place of multiply-accumulates.
        compare: with data, compare with the uniform pattern on held-out samples and keep the better one.

    Raises:
        ConfigError: an unknown damage, both targets, or ``"calibrated"`` without data.
        NotEligibleError: the target cannot be reached; the message gives the range that can be.

    Example:
        >>> from mpcompile import Config, transform
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).eval()
        >>> gm = transform(model, torch.randn(2, 64), Config(mac_reduction=0.3, patterns=("2:4", "dense")))
        >>> gm.plan.layers["0"].pattern
        '2:4'
    """

    name = "allocate"
    decision_type = Allocation
    provides = (Allocated,)

    def __init__(
        self, damage: str | None = None, *, bytes_reduction: float | None = None, compare: bool = True
    ) -> None:
        super().__init__()
        if damage is not None and damage not in DAMAGES:
            raise ConfigError("there is no such damage", expected=f"one of {', '.join(DAMAGES)}", found=repr(damage))
        if bytes_reduction is not None and not 0 < bytes_reduction < 1:
            raise ConfigError("bytes_reduction is not a share", expected="between 0 and 1", found=bytes_reduction)
        self.damage, self.bytes_reduction, self.compare = damage, bytes_reduction, compare

    def plan(self, gm: IRModule, ctx: Context) -> Allocation:
        target = ctx.config.mac_reduction if self.bytes_reduction is None else self.bytes_reduction
        if target is None:
            return Allocation(False)
        if self.bytes_reduction is not None and ctx.config.mac_reduction is not None:
            raise ConfigError("two targets", expected="mac_reduction or bytes_reduction", found="both")
        if ctx.patterns:  # other graphs of the same model
            return Allocation(True, given=len(ctx.patterns))
        unit = MACS if self.bytes_reduction is None else BYTES
        candidates = find_candidates(gm, ctx)
        total = fill_savings(gm, ctx, candidates, unit)
        reachable = check_target(candidates, target, total, unit)
        kinds = [self.damage] if self.damage else [MP] if ctx.calibration is None else [CALIBRATED, MP]
        data = self._data(gm, ctx, candidates, kinds[0])
        if data is None or not data.held_out:
            kinds = kinds[:1]
        choices = [self._choose(gm, ctx, candidates, kind, data, target * total) for kind in kinds]
        best, held_out = self._compare(gm, ctx, choices, data)
        kept = self._better(held_out) if held_out is not None else "uniform" if best.kind == UNIFORM else "allocation"
        chosen = best.best if kept == "allocation" else best.even
        solution = Solution(
            damage=best.kind,
            unit=unit,
            target=target,
            reachable=reachable,
            predicted={"allocation": best.damage(best.best), "uniform": best.damage(best.even)},
            uniform=describe_uniform(best.candidates, best.even),
            held_out=held_out,
            kept=kept,
            inadmissible=best.inadmissible,
            saved=best.saved(chosen) / total,
            layers=explain_layers(best, chosen, total, kept, unit),
        )
        return Allocation(True, solution=solution)

    def _data(self, gm: IRModule, ctx: Context, candidates: list[Candidate], kind: str) -> Samples | None:
        return split_samples(gm, ctx, candidates, kind, self.compare)

    def _predict(
        self, gm: IRModule, ctx: Context, candidates: list[Candidate], kind: str, data: Samples | None, target: float
    ) -> dict[str, str]:
        return predict(gm, ctx, candidates, kind, data, target)

    def _choose(
        self, gm: IRModule, ctx: Context, candidates: list[Candidate], kind: str, data: Samples | None, target: float
    ) -> Choice:
        """Return the best choice by one kind of damage for a target."""
        candidates = [replace(candidate) for candidate in candidates]  # each kind has its own costs and menu
        inadmissible = self._predict(gm, ctx, candidates, kind, data, target)
        return choose(candidates, kind, target, inadmissible)

    @staticmethod
    def _compare(
        gm: IRModule, ctx: Context, choices: list[Choice], data: Samples | None
    ) -> tuple[Choice, Comparison | None]:
        """Return the choice that loses least on held-out samples, and the comparison; the first choice if none are."""
        if data is None or not data.held_out or all(c.best == c.even for c in choices):
            return choices[0], None
        lost = {c.kind: held_out_loss(gm, ctx, c.candidates, data, c.best) for c in choices}
        best = min(choices, key=lambda choice: lost[choice.kind])
        return best, Comparison(
            samples=sum(batch_length(b, ctx.imported(gm)) for b in data.held_out),
            allocation=lost[best.kind],
            uniform=held_out_loss(gm, ctx, best.candidates, data, best.even),
            tried=lost,
        )

    @staticmethod
    def _better(held_out: Comparison) -> str:
        """Return the name of the choice that loses less."""
        return "uniform" if held_out.uniform < held_out.allocation else "allocation"

    def summary(self, decision: Allocation) -> str:
        if not decision.requested:
            return "off"
        solution = decision.solution
        if solution is None:
            return f"{decision.given} layers with the patterns of another graph of this model"
        counts = Counter(entry["pattern"] for entry in solution.layers.values())
        text = f"{solution.unit} -{solution.saved:.2%} (target {solution.target:.2%}): "
        text += ", ".join(f"{n} {pattern}" for pattern, n in sorted(counts.items()))
        if solution.damage == UNIFORM:
            return f"{text}; {solution.uniform}, as requested"
        comparison = solution.held_out
        if comparison is None:
            ratio = solution.predicted["allocation"] / (solution.predicted["uniform"] or 1.0)
            text += f"; predicted damage ({solution.damage}) {ratio:.3g}x that of {solution.uniform}"
            return f"{text}, not compared: no held-out data"
        tried = ", ".join(f"{kind} {lost:.4g}" for kind, lost in comparison.tried.items())
        return (
            f"{text}; {solution.kept} kept: on {comparison.samples} held-out samples the output loses "
            f"{comparison.allocation:.4g} by allocation ({tried}), {comparison.uniform:.4g} by {solution.uniform}"
        )

    def apply(self, gm: IRModule, decision: Allocation, ctx: Context) -> bool:
        known = {layer.name: layer for layer in layers(gm, ctx.lifted)}
        patterns = dict(ctx.patterns)
        for name, entry in decision.solution.layers.items() if decision.solution is not None else ():
            patterns[name] = None if entry["pattern"] == "dense" else Pattern.parse(entry["pattern"])
            layer = known[name]
            plan = LayerPlan(layer.kind, tuple(layer.weight.tensor.shape))
            ctx.plan.layers.setdefault(name, plan).notes["allocate"] = entry
        ctx.results.put(Allocated(patterns))
        return False  # masks come later
