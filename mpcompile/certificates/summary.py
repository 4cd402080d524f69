"""The report on what was found."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mpcompile.certificates import bounds
from mpcompile.certificates.pair import Pair
from mpcompile.certificates.report import DETERMINISTIC, NONE, PROBABLE, Certificates, Layer, Statement, Tier
from mpcompile.certificates.steps import ENCLOSED, JACOBIAN, MEASURED, PAPER
from mpcompile.certificates.work import TierResults, Work


def summarise(work: Work, l1: float, l2: float, confidence: float) -> Certificates:
    pair = next(iter(work.pairs.values()), None)
    layers = _layers(work, pair, l1, l2) if pair is not None else []
    penalty = _penalty(pair, l1, l2) if pair is not None and (l1 or l2) else None
    squared = _penalty(pair, 0.0, 1.0) if pair is not None else None
    tiers = []
    for name in (MEASURED, ENCLOSED, JACOBIAN, PAPER):
        sums = work.whole.get(name)
        if sums is not None and sums.chunks == work.chunks:
            tiers.append(_tier(name, sums, work, penalty, squared))
    found = Certificates(
        work.samples,
        work.classes,
        work.disagreements,
        work.allowance,
        l1,
        l2,
        tiers,
        layers,
        [],
        None if work.loss is None else work.loss / work.samples,
        work.violations,
    )
    found.statements += list(_statements(found, work, confidence))
    return found


def _penalty(pair: Pair, l1: float, l2: float) -> float:
    weights = dict.fromkeys(w for step in pair.steps for w in step.weights)  # a shared weight counts once
    return sum(bounds.penalty_change(pair.dense[w], pair.sparse[w], l1, l2) for w in weights)


def _tier(name: str, sums: TierResults, work: Work, penalty: float | None, squared: float | None) -> Tier:
    eta, kept = torch.cat(sums.eta), torch.cat(sums.kept)
    ce_mean = float((2 * eta).mean())
    labelled = work.loss is not None
    settled, sharp = (sums.settled, sums.sharp / len(eta)) if labelled else (None, None)
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


def _layers(work: Work, pair: Pair, l1: float, l2: float) -> list[Layer]:
    rows = []
    for place, step in enumerate(pair.steps):
        sums = work.steps[place] if work.steps else {}
        weights = [(pair.dense[w], pair.sparse[w]) for w in step.weights]
        squares = [float((a - s).square().sum()) for a, s in weights], [float(a.square().sum()) for a, _ in weights]
        split = "" if not weights else "mask" if all(bounds.is_mask_split(a, s) for a, s in weights) else "moved"
        removed = math.sqrt(sum(squares[0]) / max(sum(squares[1]), 1e-300)) if weights else 0.0
        row = Layer(step.name, split, removed, reason=work.skip.get(place))
        for name in (MEASURED, ENCLOSED, JACOBIAN, PAPER):
            if name in sums and sums[name].chunks == work.chunks:
                eta = torch.cat(sums[name].eta)
                row.median[name] = float(eta.median())
                row.certified[name] = sum(int(kept.sum()) for kept in sums[name].kept)
                if name in (MEASURED, ENCLOSED) and (l1 or l2):
                    change = sum(bounds.penalty_change(a, s, l1, l2) for a, s in weights)
                    row.objective = float((2 * eta).mean()) + change
        rows.append(row)
    return rows


def _statements(found: Certificates, work: Work, confidence: float) -> Iterator[Statement]:
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
