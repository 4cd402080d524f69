"""Bounds: from a change of logits to labels, cross-entropy, penalty and unseen data. Pure functions of tensors.

Source, unless another is named: arXiv 2606.02608, section on certificates. Sharper forms are marked.
"""

from __future__ import annotations

import torch
from scipy.stats import beta
from torch import Tensor


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_p - z_j for each class j, (batch, classes); infinite at j = p.

    Example:
        >>> margins(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        tensor([[inf, 2.]])
    """
    found = logits.gather(1, labels[:, None]) - logits
    return found.scatter(1, labels[:, None], torch.inf)


def label_kept(margin: Tensor, decrease: Tensor, allowance: Tensor) -> Tensor:
    """Whether the label is proven unchanged: margin_pj > decrease_pj + 2 allowance for every class j but p.

    The pairwise form. With decrease = 2 eta for all j it is the paper's: the margin exceeds 2 eta.

    Args:
        margin: of the dense model, from :func:`margins`.
        decrease: upper bound on how much z_p - z_j falls, (batch, classes) or (batch, 1); the entry at p is ignored.
        allowance: of each of the two logits, (batch,).
    """
    return ((margin > decrease + 2 * allowance[:, None]) | (margin == torch.inf)).all(1)  # never where a bound is NaN


def cross_entropy_bound(logits: Tensor, labels: Tensor, eta: Tensor) -> Tensor:
    """log(p_y + (1 - p_y) exp(2 eta)): the most that cross-entropy can rise if no logit moves by more than eta.

    Sharp: the worst case lowers z_y by eta and raises all others by eta. At most 2 eta, the paper's bound.

    Args:
        logits: of the dense model, (batch, classes); eta (batch,).

    Example:
        >>> cross_entropy_bound(torch.tensor([[9.0, 0.0]]), torch.tensor([0]), torch.tensor([1.0])).item() < 0.001
        True
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    rest = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return torch.logaddexp(own, rest + 2 * eta) - torch.logaddexp(own, rest)


def penalty_change(dense: Tensor, sparse: Tensor, l1: float, l2: float) -> float:
    """l2 (\\|S\\|_F^2 - \\|A\\|_F^2) + l1 (\\|S\\|_1 - \\|A\\|_1), which is how the elastic net of one weight changes.

    For a mask split A = S + R, S * R = 0, that is -l2 \\|R\\|_F^2 - l1 \\|R\\|_1; where kept values moved it is the
    Frobenius form with its cross term.
    """
    a, s = dense.double(), sparse.double()
    return l2 * float(s.square().sum() - a.square().sum()) + l1 * float(s.abs().sum() - a.abs().sum())


def is_mask_split(dense: Tensor, sparse: Tensor) -> bool:
    """Whether the sparse weight is the dense one with some values set to zero."""
    return bool(((sparse == 0) | (sparse == dense)).all())


def upper_rate(events: int, trials: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson upper confidence bound on a rate, one-sided.

    Example:
        >>> round(upper_rate(0, 5000), 5)
        0.0006
    """
    return 1.0 if events >= trials else float(beta.ppf(confidence, events + 1, trials - events))
