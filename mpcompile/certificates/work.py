"""Both models on chunk after chunk of samples, and what was found on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.certificates import bounds
from mpcompile.certificates.pair import Pair, StructureChange, check_values, double, match, replay_orders, trace
from mpcompile.certificates.steps import ENCLOSED, JACOBIAN, MEASURED, PAPER, Change, run_steps
from mpcompile.data.labels import check_range
from mpcompile.errors import GraphError, InputError, first_line
from mpcompile.ir.numerics import training_flags


@dataclass
class TierResults:
    """What all samples so far say in one tier. Of a sample no more is held than a bound and a verdict.

    Attributes:
        chunks: in which the tier was defined.
        eta, kept: for each chunk, see :class:`Change`.
        settled: with true labels, samples for which right or wrong is proven to stay.
        sharp: sum of the sharp bounds on how much cross-entropy rises.
    """

    chunks: int = 0
    eta: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    settled: int = 0
    sharp: float = 0.0

    def add(self, change: Change) -> None:
        """One chunk."""
        self.chunks += 1
        self.eta.append(change.eta)
        self.kept.append(change.kept)

    def add_labels(self, change: Change, before: Tensor, allowance: Tensor, labels: Tensor) -> None:
        """True labels of the same chunk, beside the dense model's logits."""
        own = before.argmax(1)
        decrease = change.decrease.expand(-1, before.shape[1])
        lead = bounds.margins(before, own) - decrease - 2 * allowance[:, None]
        still_wrong = lead.gather(1, labels[:, None])[:, 0] > 0
        self.settled += int((change.kept | ((own != labels) & still_wrong)).sum())
        self.sharp += float(bounds.cross_entropy_bound(before, labels, change.eta).sum())


class Work:
    """Both models, and what was found on the chunks so far.

    Attributes:
        samples, classes: of the chunks.
        whole: tier -> all steps together.
        steps: for each step, tier -> that step alone, and why tiers 1 and 2 are missing.
        loss: sum of what replacing the weights changed cross-entropy by; None without labels.
    """

    def __init__(self, dense: nn.Module, sparse: nn.Module, tiers: Sequence[int] | None, splits: int) -> None:
        self.given = (dense, sparse)  # what torch.compile made runs as it is, and is certified as the module inside
        self.modules = [double(getattr(m, "_orig_mod", m)) for m in self.given]
        self.asked = tiers
        self.tiers = (0, 1, 2) if tiers is None else tuple(tiers)
        self.splits = splits
        self.pairs: dict[tuple[Any, ...], Pair] = {}
        self.structure: str | None = None
        self.moved = 0
        self.chunks = self.samples = self.classes = self.disagreements = 0
        self.allowance = 0.0
        self.loss: float | None = None
        self.whole: dict[str, TierResults] = {}
        self.steps: list[dict[str, TierResults]] = []
        self.violations = 0
        self.skip: dict[int, str] = {}  # steps that can't be enclosed in one chunk aren't tried in the next

    def _pair(self, inputs: list[Tensor], expected: tuple[Tensor, Tensor]) -> Pair | None:
        """The pair for inputs of these shapes, made where it is new; None where the models differ in structure."""
        key = tuple(v.shape for v in inputs)
        if self.structure is None and key not in self.pairs:
            if not self.pairs:
                dense, sparse = self.modules
                self.modules[0], self.moved = replay_orders(dense, sparse, inputs)
            networks = [trace(module, inputs) for module in self.modules]
            try:
                pair = match(*networks)
            except StructureChange as difference:
                self.structure = str(difference)
                if self.asked is not None and not {1, 2}.isdisjoint(self.asked):
                    raise GraphError(
                        f"no enclosure across a change of structure: {difference}",
                        expected="two models that differ in weights alone",
                        hint="ask for tiers=(0,), which is measured; or give a dense model of the same structure",
                    ) from difference
                return None
            for tensors, logits, which in zip((pair.dense, pair.sparse), expected, ("dense", "sparse"), strict=True):
                check_values(pair, tensors, inputs, logits, which)
            self.pairs[key] = pair
        return self.pairs.get(key)

    def add(self, inputs: list[Tensor], labels: Tensor | None) -> None:
        """One chunk."""
        ran = [_logits(model, inputs) for model in self.given]
        exact = [value.double() for value in inputs]
        before, after = (_logits(module, exact) for module in self.modules)
        if before.shape != after.shape:
            raise InputError(
                "the models return different shapes", expected=tuple(before.shape), found=tuple(after.shape)
            )
        allowance = (ran[0] - before).abs().amax(1) + (ran[1] - after).abs().amax(1)
        pair = self._pair(exact, (before, after))
        own = before.argmax(1)
        change = after - before
        decrease = change - change.gather(1, own[:, None])
        kept = bounds.label_kept(bounds.margins(before, own), decrease, allowance)
        found = {MEASURED: Change(change.abs().amax(1) + allowance, decrease, kept)}
        if pair is not None and not {1, 2}.isdisjoint(self.tiers):
            found |= self._steps(pair, exact, before, after, own, allowance)
        self.disagreements += int((ran[0].argmax(1) != ran[1].argmax(1)).sum())
        self.allowance = max(self.allowance, float(allowance.max()))
        self.chunks, self.samples, self.classes = self.chunks + 1, self.samples + len(own), before.shape[1]
        for name, result in found.items():
            self.whole.setdefault(name, TierResults()).add(result)
        if labels is not None:
            self._add_labels(labels, before, after, allowance, found)

    def _add_labels(
        self, labels: Tensor, before: Tensor, after: Tensor, allowance: Tensor, found: dict[str, Change]
    ) -> None:
        check_range(labels, before.shape[1])
        losses = [F.cross_entropy(logits, labels, reduction="sum") for logits in (after, before)]
        self.loss = (self.loss or 0.0) + float(losses[0] - losses[1])
        for name, change in found.items():
            self.whole[name].add_labels(change, before, allowance, labels)

    def _steps(
        self, pair: Pair, inputs: list[Tensor], before: Tensor, after: Tensor, own: Tensor, allowance: Tensor
    ) -> dict[str, Change]:
        """Sums over the steps, and whether the label of the dense model survives them all."""
        results = list(run_steps(pair, inputs, own, allowance, before, self.tiers, self.splits, self.skip))
        self.skip |= {number: r.reason for number, r in enumerate(results) if r.reason is not None}
        self.steps = self.steps or [{} for _ in results]
        for of_step, result in zip(self.steps, results, strict=True):
            for tier, alone in result.tiers.items():
                of_step.setdefault(tier, TierResults()).add(alone)
        found = {}
        names = [ENCLOSED] * (1 in self.tiers) + [JACOBIAN, PAPER] * (2 in self.tiers)
        zero = torch.zeros(len(own), dtype=torch.float64)
        missing = Change(zero + torch.inf, zero[:, None] + torch.inf, zero > 0)
        margin = bounds.margins(before, own)
        for name in names:
            changes = [r.tiers.get(name, missing) for r in results]
            eta = sum((c.eta for c in changes), zero)
            decrease = sum((c.decrease for c in changes), zero[:, None])
            self.violations += int(((after - before).abs().amax(1) > eta + allowance).sum())
            for result in results:
                if name in result.tiers:
                    self.violations += int((result.tiers[MEASURED].eta > result.tiers[name].eta + allowance).sum())
            found[name] = Change(eta + allowance, decrease, bounds.label_kept(margin, decrease, allowance))
        return found


def _logits(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Logits as float64 on the CPU, from a model as it is, in eval mode."""
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    place = [v if tensor is None else v.to(tensor.device) for v in inputs]
    if tensor is not None and tensor.is_floating_point():
        place = [v.to(tensor.dtype) if v.is_floating_point() else v for v in place]
    try:
        with training_flags(model, False):
            found = model(*place)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"the model rejects a batch: {first_line(error)}",
            expected="inputs that both models accept",
            found=", ".join(str(tuple(v.shape)) for v in inputs),
        ) from error
    found = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] < 2:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError("the model returns no logits", expected="(batch, classes), 2 classes or more", found=shape)
    if not bool(torch.isfinite(found).all()):
        raise InputError("the model returns logits that are not finite", hint="check the inputs and the weights")
    return found.detach().double().cpu()
