"""Work: run both models on one chunk of samples after another, and accumulate the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.certificates import bounds
from mpcompile.certificates.orders import replay_orders
from mpcompile.certificates.pair import NetworkPair, StructureChange, check_values, double, match, trace
from mpcompile.certificates.steps import ENCLOSED, JACOBIAN, MEASURED, PAPER, Change, run_steps
from mpcompile.certificates.tokens import skip_tokens
from mpcompile.data.labels import check_range
from mpcompile.data.outputs import class_scores, described
from mpcompile.errors import GraphError, InputError, first_line
from mpcompile.ir.numerics import training_flags


@dataclass
class TierResults:
    """The results of one tier on all samples so far; per sample only a bound and a verdict are stored.

    Attributes:
        chunks: number of chunks in which the tier was defined.
        eta, kept: for each chunk, see :class:`Change`.
        settled: with true labels, number of samples for which right or wrong is proven to stay.
        sharp: sum of the sharp bounds on the rise of cross-entropy.
    """

    chunks: int = 0
    eta: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    settled: int = 0
    sharp: float = 0.0

    def add(self, change: Change) -> None:
        """Add the results of one chunk."""
        self.chunks += 1
        self.eta.append(change.eta)
        self.kept.append(change.kept)

    def add_labels(self, change: Change, before: Tensor, allowance: Tensor, labels: Tensor) -> None:
        """Add the results for the true labels of the same chunk; ``before`` are the dense model's logits."""
        own = before.argmax(1)
        decrease = change.decrease.expand(-1, before.shape[1])
        lead = bounds.margins(before, own) - decrease - 2 * allowance[:, None]
        still_wrong = lead.gather(1, labels[:, None])[:, 0] > 0
        self.settled += int((change.kept | ((own != labels) & still_wrong)).sum())
        self.sharp += float(bounds.cross_entropy_bound(before, labels, change.eta).sum())


class Work:
    """Both models, and the results on the chunks so far.

    Attributes:
        given: the models as the caller passed them.
        modules: float64 copies, the dense one with the sparse model's order of channels, and skipping the same tokens.
        pairs: shapes of the inputs -> the two models on one graph.
        structure: how the models differ in more than weights, or None.
        moved: number of channel classes that were reordered in the dense model.
        chunks, samples, classes: their numbers so far.
        disagreements, allowance, violations: see :class:`mpcompile.certificates.report.Certificates`.
        whole: tier -> results of all steps together.
        steps: for each step, tier -> results of that step alone.
        skip: number of a step -> why it cannot be enclosed; such steps are not tried again in later chunks.
        loss: sum over the samples of the change of cross-entropy; None without labels.
    """

    def __init__(self, dense: nn.Module, sparse: nn.Module, tiers: Sequence[int] | None, splits: int) -> None:
        self.given = (dense, sparse)  # a model from torch.compile is run as it is; the module inside it is certified
        self.modules = [double(getattr(m, "_orig_mod", m)) for m in self.given]
        self.asked = tiers
        self.tiers = (0, 1, 2) if tiers is None else tuple(tiers)
        self.splits = splits
        self.pairs: dict[tuple[Any, ...], NetworkPair] = {}
        self.structure: str | None = None
        self.moved = 0
        self.chunks = self.samples = self.classes = self.disagreements = 0
        self.allowance = 0.0
        self.loss: float | None = None
        self.whole: dict[str, TierResults] = {}
        self.steps: list[dict[str, TierResults]] = []
        self.violations = 0
        self.skip: dict[int, str] = {}

    def _pair(self, inputs: list[Tensor], expected: tuple[Tensor, Tensor]) -> NetworkPair | None:
        """The pair for inputs of these shapes, made on first use; None if the models differ in structure."""
        key = tuple(v.shape for v in inputs)
        if self.structure is None and key not in self.pairs:
            if not self.pairs:
                dense, sparse = self.modules
                dense, self.moved = replay_orders(dense, sparse, inputs)
                self.modules[0] = skip_tokens(dense, sparse, inputs)
            networks = [trace(module, inputs) for module in self.modules]
            try:
                pair = match(*networks)
            except StructureChange as difference:
                self.structure = str(difference)
                if self.asked is not None and not {1, 2}.isdisjoint(self.asked):
                    raise GraphError(
                        f"no enclosure across a change of structure: {difference}",
                        expected="two models that differ in weights alone",
                        hint="request tiers=(0,), which only measures, or pass a dense model of the same structure",
                    ) from difference
                return None
            for tensors, logits, which in zip((pair.dense, pair.sparse), expected, ("dense", "sparse"), strict=True):
                check_values(pair, tensors, inputs, logits, which)
            self.pairs[key] = pair
        return self.pairs.get(key)

    def add(self, inputs: list[Tensor], labels: Tensor | None) -> None:
        """Run and bound one chunk of samples."""
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
        results = {MEASURED: Change(change.abs().amax(1) + allowance, decrease, kept)}
        if pair is not None and not {1, 2}.isdisjoint(self.tiers):
            results |= self._steps(pair, exact, before, after, own, allowance)
        self.disagreements += int((ran[0].argmax(1) != ran[1].argmax(1)).sum())
        self.allowance = max(self.allowance, float(allowance.max()))
        self.chunks, self.samples, self.classes = self.chunks + 1, self.samples + len(own), before.shape[1]
        for name, result in results.items():
            self.whole.setdefault(name, TierResults()).add(result)
        if labels is not None:
            self._add_labels(labels, before, after, allowance, results)

    def _add_labels(
        self, labels: Tensor, before: Tensor, after: Tensor, allowance: Tensor, results: dict[str, Change]
    ) -> None:
        check_range(labels, before.shape[1])
        losses = [F.cross_entropy(logits, labels, reduction="sum") for logits in (after, before)]
        self.loss = (self.loss or 0.0) + float(losses[0] - losses[1])
        for name, change in results.items():
            self.whole[name].add_labels(change, before, allowance, labels)

    def _steps(
        self, pair: NetworkPair, inputs: list[Tensor], before: Tensor, after: Tensor, own: Tensor, allowance: Tensor
    ) -> dict[str, Change]:
        """Each tier summed over the steps: the whole change, and whether the dense model's label survives it."""
        results = list(run_steps(pair, inputs, own, allowance, before, self.tiers, self.splits, self.skip))
        self.skip |= {number: r.reason for number, r in enumerate(results) if r.reason is not None}
        self.steps = self.steps or [{} for _ in results]
        for of_step, result in zip(self.steps, results, strict=True):
            for tier, alone in result.tiers.items():
                of_step.setdefault(tier, TierResults()).add(alone)
        together = {}
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
            together[name] = Change(eta + allowance, decrease, bounds.label_kept(margin, decrease, allowance))
        return together


def _logits(model: nn.Module, inputs: list[Tensor]) -> Tensor:
    """A model's logits in eval mode, computed in its own dtype and on its own device, as float64 on the CPU."""
    tensor = next((t for t in (*model.parameters(), *model.buffers())), None)
    place = [v if tensor is None else v.to(tensor.device) for v in inputs]
    if tensor is not None and tensor.is_floating_point():
        place = [v.to(tensor.dtype) if v.is_floating_point() else v for v in place]
    try:
        with training_flags(model, False):
            output = model(*place)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"the model rejects a batch: {first_line(error)}",
            expected="inputs that both models accept",
            found=", ".join(str(tuple(v.shape)) for v in inputs),
        ) from error
    scores = class_scores(output)
    if scores is None or scores.shape[1] < 2:
        found = described(output)
        raise InputError("the model returns no logits", expected="(batch, classes), 2 classes or more", found=found)
    output = scores
    if not bool(torch.isfinite(output).all()):
        raise InputError("the model returns logits that are not finite", hint="check the inputs and the weights")
    return output.detach().double().cpu()
