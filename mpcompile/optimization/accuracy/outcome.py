"""Outcomes: what a build loses on images that no fit saw, and how sure that is.

With labels, a build is compared with the dense model image by image. Its drop of top-1 is (lost - won) / n, and the
upper bound is that of Tango's score interval for paired proportions (Statistics in Medicine 17, 891-908, 1998), which
holds for few images and for none lost, where a normal approximation fails. Without labels, the share of changed top-1
classes takes the place of the drop, which it bounds from above whatever the labels are, with the Clopper-Pearson bound.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.stats import beta, norm
from torch import Tensor

from mpcompile.errors import ConfigError


@dataclass(frozen=True)
class Outcome:
    """How the top-1 classes of a build compare with those of the dense model.

    Attributes:
        samples: number of images.
        changed: images whose top-1 class is another.
        lost, won: images that only the dense model, or only the build, classifies correctly; None without labels.
        right: images that the build classifies correctly; None without labels.
        divergence: KL(dense‖build) in nats, mean over the images.
        expected: the drop to expect from the dense model's own probabilities: mean of p(dense class) - p(class of the
            build). It needs no labels and varies less than the drop, but trusts the model's confidence.

    Example:
        >>> outcome = Outcome(500, changed=25, lost=12, won=10, right=434, divergence=0.04, expected=0.006)
        >>> outcome.drop, round(outcome.upper(0.95), 4)
        (0.004, 0.0204)
    """

    samples: int
    changed: int
    lost: int | None
    won: int | None
    right: int | None
    divergence: float
    expected: float

    @property
    def labelled(self) -> bool:
        """True if the images have labels."""
        return self.lost is not None

    @property
    def drop(self) -> float:
        """Drop of top-1 as a share of the images; without labels, the share whose top-1 class changed."""
        if self.lost is None or self.won is None:
            return self.changed / self.samples
        return (self.lost - self.won) / self.samples

    def upper(self, confidence: float) -> float:
        """Return the one-sided upper confidence bound of the drop."""
        if self.lost is None or self.won is None:
            if self.changed >= self.samples:
                return 1.0
            return float(beta.ppf(confidence, self.changed + 1, self.samples - self.changed))
        return paired_bound(self.lost, self.won, self.samples, confidence)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return the two-sided confidence interval of the drop."""
        side = (1 + confidence) / 2
        if self.lost is None or self.won is None:
            low = float(beta.ppf(1 - side, self.changed, self.samples - self.changed + 1)) if self.changed else 0.0
            return low, self.upper(side)
        return -paired_bound(self.won, self.lost, self.samples, side), self.upper(side)

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)


def paired_bound(lost: int, won: int, samples: int, confidence: float) -> float:
    """Return the one-sided upper bound of a drop (lost - won) / samples by Tango's score interval.

    Example:
        >>> round(paired_bound(0, 0, 100, 0.95), 4), round(paired_bound(5, 5, 500, 0.95), 4)
        (0.0263, 0.0117)
    """
    z = float(norm.ppf(confidence))

    def score(drop: float) -> float:
        """The standardised difference of what was observed from a true drop, plus z: 0 at the bound."""
        a = 2 * samples
        b = -lost - won + (2 * samples - lost + won) * drop
        c = -won * drop * (1 - drop)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = samples * (2 * q + drop * (1 - drop))
        return (lost - won - samples * drop) / math.sqrt(variance) + z if variance > 0 else math.inf

    low, high = (lost - won) / samples, 1.0 - 1e-12
    if z <= 0 or score(high) > 0:
        return low if z <= 0 else 1.0
    return float(brentq(score, max(low, -1 + 1e-12) + 1e-12, high, xtol=1e-10))


def images_needed(max_drop: float, confidence: float, changed: float = 0.0) -> int:
    """Return the number of images with which a build that loses nothing is shown to drop by at most ``max_drop``.

    Args:
        max_drop: the largest drop allowed, as a share.
        confidence: of the one-sided bound.
        changed: share of the images that only one of build and dense model classifies correctly.

    Example:
        >>> images_needed(0.01, 0.95), images_needed(0.01, 0.95, changed=0.04)
        (268, 1351)
    """
    z = float(norm.ppf(confidence))
    if z <= 0:
        return 1
    return math.ceil(z * z * ((1 - max_drop) / max_drop + changed / max_drop**2))


def check_goal(max_drop: float, confidence: float) -> None:
    """Check the two numbers of a statement "at most ``max_drop``, with ``confidence``".

    Raises:
        ConfigError: one is out of range.
    """
    if not 0 < max_drop < 1:
        raise ConfigError(
            "max_drop is not a share", expected="a number between 0 and 1, such as 0.01 for one point", found=max_drop
        )
    if not 0.5 <= confidence < 1:
        raise ConfigError("confidence is out of range", expected="0.5 or more, and below 1", found=confidence)


@torch.no_grad()
def compare(dense: Tensor, scores: Tensor, labels: Tensor | None) -> list[float]:
    """Return the sums of an :class:`Outcome` over one batch: they can be added over batches and processes.

    Args:
        dense, scores: class scores (B, classes) of the dense model and of the build.
        labels: int64 (B,), or None.

    Returns:
        samples, changed, lost, won, right, divergence, expected drop.
    """
    dense, scores = dense.double(), scores.double().nan_to_num(0.0)
    mine, theirs = scores.argmax(-1), dense.argmax(-1)
    log_p, log_q = dense.log_softmax(-1), scores.log_softmax(-1)
    p = log_p.exp()
    expected = p.gather(1, theirs[:, None]) - p.gather(1, mine[:, None])
    sums = [float(len(dense)), float((mine != theirs).sum())]
    if labels is None:
        sums += [0.0, 0.0, 0.0]
    else:
        hit, dense_hit = mine == labels, theirs == labels
        sums += [float((dense_hit & ~hit).sum()), float((hit & ~dense_hit).sum()), float(hit.sum())]
    return [*sums, float((p * (log_p - log_q)).sum()), float(expected.sum())]


def outcome_of(sums: list[float], labelled: bool) -> Outcome:
    """Return the outcome that the sums of :func:`compare` make."""
    samples, changed, lost, won, right, divergence, expected = sums
    count = max(1.0, samples)
    return Outcome(
        int(samples),
        int(changed),
        int(lost) if labelled else None,
        int(won) if labelled else None,
        int(right) if labelled else None,
        divergence / count,
        expected / count,
    )
