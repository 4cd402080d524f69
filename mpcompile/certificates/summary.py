"""Make the report of a certification from the sums over all samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mpcompile.certificates import bounds
from mpcompile.certificates.pair import NetworkPair
from mpcompile.certificates.report import DETERMINISTIC, NONE, PROBABLE, Certificates, Layer, Statement, Tier
from mpcompile.certificates.steps import ENCLOSED, JACOBIAN, MEASURED, PAPER
from mpcompile.certificates.work import TierResults, Work


def summarise(work: Work, l1: float, l2: float, confidence: float) -> Certificates:
    """The report on all samples that ``work`` has seen; arguments as in :func:`mpcompile.certify`."""
    pair = next(iter(work.pairs.values()), None)
    layers = _layers(work, pair, l1, l2) if pair is not None else []
    penalty = _penalty(pair, l1, l2) if pair is not None and (l1 or l2) else None
    squared = _penalty(pair, 0.0, 1.0) if pair is not None else None
    tiers = []
    for name in (MEASURED, ENCLOSED, JACOBIAN, PAPER):
        sums = work.whole.get(name)
        if sums is not None and sums.chunks == work.chunks:
            tiers.append(_tier(name, sums, work, penalty, squared))
    report = Certificates(
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
    report.statements += list(_statements(report, work, confidence))
    return report


def _penalty(pair: NetworkPair, l1: float, l2: float) -> float:
    """Change of the elastic-net penalty over all replaced weights."""
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


def _layers(work: Work, pair: NetworkPair, l1: float, l2: float) -> list[Layer]:
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


def _statements(report: Certificates, work: Work, confidence: float) -> Iterator[Statement]:
    for tier in report.tiers:
        yield from _about_tier(tier, report)
    if report.ce_change is not None:
        text = f"mean cross-entropy on these samples changed by {report.ce_change:+.4g} (measured)"
        yield Statement(DETERMINISTIC, text)
    yield Statement(
        DETERMINISTIC,
        "rounding: the logits that the two models returned differ from their logits in float64 by at most "
        f"{report.allowance:.1e}, both models together; every margin allows for twice that. Tiers 1 and 2 round "
        "outward from the replaced layer on; the input of that layer is taken as computed",
    )
    if work.moved:
        text = f"{work.moved} channel reorderings were repeated on the dense model, which leaves its function unchanged"
        yield Statement(DETERMINISTIC, text)
    yield from _about_unseen(report, confidence)
    if work.structure is not None:
        yield Statement(NONE, f"tiers 1 and 2: the models differ in more than weights: {work.structure}")
    for layer in report.layers:
        if layer.reason:
            yield Statement(NONE, f"tiers 1 and 2 at {layer.name}: {layer.reason}")
    if report.violations:
        text = f"{report.violations} measured changes exceed their bounds: the bounds above are wrong; report this"
        yield Statement(NONE, text)


def _about_tier(tier: Tier, report: Certificates) -> Iterator[Statement]:
    """State the facts that a tier proves about labels, accuracy and the training objective on these samples."""
    text = f"tier {tier.name}: the label of {tier.certified} of {tier.samples} samples is the dense model's"
    text += ", also at every point of each segment" if tier.name != MEASURED else ""
    text += f"; at most {tier.label_changes:.2%} of these labels change"
    if tier.settled is not None:
        text += f", and accuracy on these samples changes by at most {1 - tier.settled / tier.samples:.2%}"
    yield Statement(DETERMINISTIC, text)
    if tier.objective is None:
        return
    text = f"tier {tier.name}: CE + {report.l2:g} |W|_F^2 + {report.l1:g} |W|_1 over these samples "
    if tier.objective < 0:
        yield Statement(DETERMINISTIC, text + f"falls by at least {-tier.objective:.4g}")
    elif math.isfinite(tier.objective):
        yield Statement(NONE, text + f"is not proven to fall (it rises by at most {tier.objective:.4g})")
    else:
        yield Statement(NONE, text + "has no bound")


def _about_unseen(report: Certificates, confidence: float) -> Iterator[Statement]:
    """State what the samples imply for unseen samples of the same population."""
    n = report.samples
    rate = bounds.upper_rate(report.disagreements, n, confidence)
    drawn = "if these samples are drawn at random from the population and were not used to make the sparse model"
    yield Statement(
        PROBABLE,
        f"labels of unseen samples differ at a rate of at most {rate:.3%} (Clopper-Pearson, {confidence:.0%}; "
        f"{report.disagreements} of {n} differ here), {drawn}; accuracy differs by at most this rate",
    )
    for tier in report.tiers:
        rate = bounds.upper_rate(n - tier.certified, n, confidence)
        text = f"tier {tier.name} fails to certify unseen samples at a rate of at most {rate:.3%} ({confidence:.0%})"
        yield Statement(PROBABLE, f"{text}, {drawn}")
