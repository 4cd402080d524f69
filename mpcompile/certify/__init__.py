"""Certificates: what replacing dense weights by sparse ones can't have changed, sample by sample.

``pair.py`` puts the two models on one graph, ``steps.py`` replaces one layer after another and bounds what that does,
on enclosures (``enclosure.py``, ``functions.py``, ``rules.py``); ``bounds.py`` turns a change of logits into labels,
cross-entropy and the training objective, and ``report.py`` says it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile.certify import bounds
from mpcompile.certify.batches import chunk_size, read
from mpcompile.certify.pair import (
    Pair,
    StructureChange,
    check_values,
    double,
    match,
    replay_orders,
    trace,
)
from mpcompile.certify.report import (
    DETERMINISTIC,
    NONE,
    PROBABLE,
    Certificates,
    Layer,
    Statement,
    Tier,
)
from mpcompile.certify.steps import ENCLOSED, JACOBIAN, MEASURED, PAPER, Change, StepResult, run_steps
from mpcompile.errors import ConfigError, GraphError, InputError
from mpcompile.graph import training_flags

__all__ = ["Certificates", "Layer", "Statement", "Tier", "certify"]


def certify(
    dense: nn.Module,
    sparse: nn.Module,
    batches: Any,
    labels: Any = None,
    *,
    tiers: Sequence[int] | None = None,
    l1: float = 0.0,
    l2: float = 0.0,
    splits: int = 4,
    confidence: float = 0.95,
    progress: bool = True,
) -> Certificates:
    """Prove for single samples what a sparse model leaves as the dense model had it.

    - Tier 0 measures the change of the logits.
    - Tier 1 encloses the logits, for every point of the segment from the dense to the sparse value of each replaced
      layer, in outward rounded float64; the steps of several layers add up.
    - Tier 2 bounds the Jacobian of the logits by the layer's value on the same enclosure and multiplies: componentwise,
      and in the paper's form eta = L \\|R psi\\|_inf.

    Each gives, for every sample, a bound eta on the change of any logit and a verdict whether the label is proven to
    stay: z_p - z_j falls by less than the dense model's margin, for every class j. Reordered channels (``permute``) are
    reordered in the dense model first. Runs on the CPU, in float64 copies; the models are not changed.

    Args:
        dense: the model that ``sparse`` was made from.
        sparse: what :func:`mpcompile.transform` returned, trained or not, or any module of the same structure.
        batches: one batch (a tensor, or a dict of keyword inputs), or an iterable of batches; (input, label) tuples
            bring labels along.
        labels: true classes of all samples, or None.
        tiers: of 0, 1 and 2; None takes all that are defined. Tier 0 is always there.
        l1, l2: lambda_1 and lambda_2 of the training objective CE + l2 \\|W\\|_F^2 + l1 \\|W\\|_1 over the replaced
            weights. They are facts about a training run, not of a model: 0, 0 certifies no decrease.
        splits: parts that each segment is cut into; more are tighter, and cost as much more.
        confidence: of the statements about unseen data.
        progress: show a progress bar (on a terminal).

    Raises:
        InputError: no batch, inputs or labels that don't fit, or outputs that are no logits (batch, classes).
        GraphError: tiers 1 or 2 were asked for by number and the models differ in more than weights; ``sparse`` is
            lowered; the plan's permutation doesn't fit ``dense``.
        ConfigError: an argument has no such value.

    Source: arXiv 2606.02608, section on certificates; docs/certificates.md has every formula.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> sparse = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="12:16"))
        >>> report = certify(model, sparse, torch.randn(32, 16))
        >>> report["1"].certified <= report["0"].certified <= report.samples
        True
    """
    _check_arguments(dense, sparse, tiers, splits, confidence, l1, l2)
    chunks = read(dense, batches, labels)
    work = _Work(dense, sparse, tiers, splits)
    with torch.no_grad():
        size = chunk_size(work.modules[0], next(iter(chunks(1)))[0])
        for inputs, known in tqdm(list(chunks(size)), desc="certify", unit="chunk", disable=None if progress else True):
            work.add(inputs, known)
    return _report(work, l1, l2, confidence)


def _check_arguments(dense: Any, sparse: Any, tiers: Any, splits: Any, confidence: float, l1: float, l2: float) -> None:
    for name, model in (("dense", dense), ("sparse", sparse)):
        if not isinstance(model, nn.Module):
            raise InputError(f"{name} is not a model", expected="a torch.nn.Module", found=type(model).__name__)
    if tiers is not None and (isinstance(tiers, (int, str)) or not set(tiers) <= {0, 1, 2}):
        raise ConfigError("there is no such tier", expected="a sequence of 0, 1 and 2", found=repr(tiers))
    if not isinstance(splits, int) or splits < 1:
        raise ConfigError("splits has no such value", expected="1 or more", found=repr(splits))
    if not 0 < confidence < 1:
        raise ConfigError("confidence has no such value", expected="between 0 and 1", found=confidence)
    for name, value in (("l1", l1), ("l2", l2)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} has no such value", expected="0 or more", found=value)


class _Work:
    """Both models, and what was found on the chunks so far."""

    def __init__(self, dense: nn.Module, sparse: nn.Module, tiers: Sequence[int] | None, splits: int) -> None:
        self.given = (dense, sparse)  # what torch.compile made runs as it is, and is certified as the module inside
        self.modules = [double(getattr(m, "_orig_mod", m)) for m in self.given]
        self.asked = tiers
        self.tiers = (0, 1, 2) if tiers is None else tuple(tiers)
        self.splits = splits
        self.pairs: dict[tuple[Any, ...], Pair] = {}
        self.structure: str | None = None
        self.moved = 0
        self.logits: list[Tensor] = []
        self.after: list[Tensor] = []
        self.allowances: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.disagreements = 0
        self.totals: list[dict[str, Change]] = []
        self.steps: list[list[StepResult]] = []
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
        self.logits.append(before)
        self.after.append(after)
        self.allowances.append(allowance)
        self.totals.append(found)
        if labels is not None:
            self.labels.append(labels)

    def _steps(
        self, pair: Pair, inputs: list[Tensor], before: Tensor, after: Tensor, own: Tensor, allowance: Tensor
    ) -> dict[str, Change]:
        """Sums over the steps, and whether the label of the dense model survives them all."""
        results = list(run_steps(pair, inputs, own, allowance, before, self.tiers, self.splits, self.skip))
        self.skip |= {number: r.reason for number, r in enumerate(results) if r.reason is not None}
        self.steps.append(results)
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
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the model rejects a batch: {str(error).splitlines()[0]}",
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


def _report(work: _Work, l1: float, l2: float, confidence: float) -> Certificates:
    before, after = torch.cat(work.logits), torch.cat(work.after)
    allowance = torch.cat(work.allowances)
    labels = torch.cat(work.labels) if work.labels else None
    own = before.argmax(1)
    pair = next(iter(work.pairs.values()), None)
    layers = _layers(work, pair, l1, l2) if pair is not None else []
    penalty = _penalty(pair, l1, l2) if pair is not None else None
    squared = _penalty(pair, 0.0, 1.0) if pair is not None else None
    tiers = []
    for name in (MEASURED, ENCLOSED, JACOBIAN, PAPER):
        parts = [chunk[name] for chunk in work.totals if name in chunk]
        if len(parts) == len(work.totals):
            tiers.append(_tier(name, parts, before, own, labels, allowance, penalty if l1 or l2 else None, squared))
    ce = None
    if labels is not None:
        loss = torch.nn.functional.cross_entropy
        ce = float(loss(after, labels) - loss(before, labels))
    found = Certificates(
        len(own),
        before.shape[1],
        work.disagreements,
        float(allowance.max()),
        l1,
        l2,
        tiers,
        layers,
        [],
        ce,
        work.violations,
    )
    found.statements += list(_statements(found, work, confidence))
    return found


def _penalty(pair: Pair, l1: float, l2: float) -> float:
    weights = dict.fromkeys(w for step in pair.steps for w in step.weights)  # a shared weight counts once
    return sum(bounds.penalty_change(pair.dense[w], pair.sparse[w], l1, l2) for w in weights)


def _tier(
    name: str,
    parts: list[Change],
    before: Tensor,
    own: Tensor,
    labels: Tensor | None,
    allowance: Tensor,
    penalty: float | None,
    squared: float | None,
) -> Tier:
    eta = torch.cat([p.eta for p in parts])
    kept = torch.cat([p.kept for p in parts])
    ce_mean = float((2 * eta).mean())
    settled, sharp = None, None
    if labels is not None:
        right = own == labels
        decrease = torch.cat([p.decrease.expand(-1, before.shape[1]) for p in parts])
        lead = bounds.margins(before, own) - decrease - 2 * allowance[:, None]
        still_wrong = lead.gather(1, labels[:, None])[:, 0] > 0
        settled = int((kept | (~right & still_wrong)).sum())
        sharp = float(bounds.cross_entropy_bound(before, labels, eta).mean())
    rise = ce_mean if sharp is None else sharp
    objective = None if penalty is None else rise + penalty
    least = rise / -squared if squared is not None and squared < 0 and math.isfinite(rise) else None
    return Tier(
        name,
        len(eta),
        int(kept.sum()),
        settled,
        kept.tolist(),
        eta.tolist(),
        float(eta.median()),
        ce_mean,
        sharp,
        objective,
        least,
    )


def _layers(work: _Work, pair: Pair, l1: float, l2: float) -> list[Layer]:
    rows = []
    for place, step in enumerate(pair.steps):
        results = [chunk[place] for chunk in work.steps]
        weights = [(pair.dense[w], pair.sparse[w]) for w in step.weights]
        squares = [float((a - s).square().sum()) for a, s in weights], [float(a.square().sum()) for a, _ in weights]
        split = "" if not weights else "mask" if all(bounds.is_mask_split(a, s) for a, s in weights) else "moved"
        removed = math.sqrt(sum(squares[0]) / max(sum(squares[1]), 1e-300)) if weights else 0.0
        row = Layer(step.name, split, removed, reason=next((r.reason for r in results if r.reason), None))
        for name in (MEASURED, ENCLOSED, JACOBIAN, PAPER):
            if all(name in r.tiers for r in results) and results:
                eta = torch.cat([r.tiers[name].eta for r in results])
                row.median[name] = float(eta.median())
                row.certified[name] = int(sum(int(r.tiers[name].kept.sum()) for r in results))
                if name in (MEASURED, ENCLOSED) and (l1 or l2):
                    change = sum(bounds.penalty_change(a, s, l1, l2) for a, s in weights)
                    row.objective = float((2 * eta).mean()) + change
        rows.append(row)
    return rows


def _statements(found: Certificates, work: _Work, confidence: float) -> Iterator[Statement]:
    n = found.samples
    for tier in found.tiers:
        text = f"tier {tier.name}: the label of {tier.certified} of {n} samples is the dense model's"
        text += ", on all of each segment too" if tier.name != MEASURED else ""
        text += f"; at most {tier.label_changes:.2%} of these labels change"
        if tier.settled is not None:
            text += f", and accuracy on them moves by at most {1 - tier.settled / n:.2%}"
        yield Statement(DETERMINISTIC, text)
        if tier.objective is not None:
            good = tier.objective < 0
            text = f"tier {tier.name}: CE + {found.l2:g} |W|_F^2 + {found.l1:g} |W|_1 over these samples "
            text += (
                f"falls by at least {-tier.objective:.4g}"
                if good
                else f"is not proven to fall (it rises by at most {tier.objective:.4g})"
                if math.isfinite(tier.objective)
                else "has no bound"
            )
            yield Statement(DETERMINISTIC if good else NONE, text)
    if found.ce_change is not None:
        text = f"mean cross-entropy on these samples changed by {found.ce_change:+.4g} (measured)"
        yield Statement(DETERMINISTIC, text)
    yield Statement(
        DETERMINISTIC,
        f"rounding: logits of the models as they ran differ from float64 by at most {found.allowance:.1e} in all; "
        "every margin leaves twice that. Tiers 1 and 2 round outward from a replaced layer on; what it reads is taken "
        "as it was computed",
    )
    if work.moved:
        text = f"{work.moved} orders of channels were replayed on the dense model, whose function stays"
        yield Statement(DETERMINISTIC, text)
    rate = bounds.upper_rate(found.disagreements, n, confidence)
    drawn = "if these samples are drawn at random from the population and were not used to make the sparse model"
    yield Statement(
        PROBABLE,
        f"labels of unseen samples differ at a rate of at most {rate:.3%} (Clopper-Pearson, {confidence:.0%}; "
        f"{found.disagreements} of {n} differ here), {drawn}; so does accuracy by at most that",
    )
    for tier in found.tiers:
        rate = bounds.upper_rate(n - tier.certified, n, confidence)
        text = f"tier {tier.name} fails to certify unseen samples at a rate of at most {rate:.3%} ({confidence:.0%})"
        yield Statement(PROBABLE, f"{text}, {drawn}")
    if work.structure is not None:
        yield Statement(NONE, f"tiers 1 and 2: the models differ in more than weights: {work.structure}")
    for layer in found.layers:
        if layer.reason:
            yield Statement(NONE, f"tiers 1 and 2 at {layer.name}: {layer.reason}")
    if found.violations:
        text = f"{found.violations} measured changes exceed their bounds: the bounds above are wrong; report this"
        yield Statement(NONE, text)
