"""Bounds: the effect of a change of logits on labels, cross-entropy, penalty and unseen data. Pure functions.

Source, unless stated otherwise: arXiv 2606.02608, section on certificates. Forms sharper than the paper's are marked.
"""

from __future__ import annotations

import torch
from scipy.stats import beta
from torch import Tensor


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """z_p - z_j for every class j, (batch, classes), p the label; infinite at j = p.

    Example:
        >>> margins(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        tensor([[inf, 2.]])
    """
    lead = logits.gather(1, labels[:, None]) - logits
    return lead.scatter(1, labels[:, None], torch.inf)


def label_kept(margin: Tensor, decrease: Tensor, allowance: Tensor) -> Tensor:
    """True where the label is proven unchanged: margin_pj > decrease_pj + 2 allowance for every class j except p.

    This is the pairwise form, sharper than the paper's; with decrease = 2 eta for all j it is the paper's: the margin
    exceeds 2 eta.

    Args:
        margin: the dense model's, from :func:`margins`.
        decrease: upper bound on how much z_p - z_j falls, (batch, classes) or (batch, 1); the entry at p is ignored.
        allowance: rounding allowance of each of the two logits, (batch,).

    Returns:
        Boolean (batch,).
    """
    return ((margin > decrease + 2 * allowance[:, None]) | (margin == torch.inf)).all(1)  # false where a bound is NaN


def cross_entropy_bound(logits: Tensor, labels: Tensor, eta: Tensor) -> Tensor:
    """log(p_y + (1 - p_y) exp(2 eta)): the most that cross-entropy can rise if no logit moves by more than eta.

    Sharper than the paper's bound 2 eta, and attained: the worst case lowers z_y by eta and raises all others by eta.

    Args:
        logits: the dense model's, (batch, classes).
        labels: the true classes y, (batch,).
        eta: (batch,).

    Example:
        >>> cross_entropy_bound(torch.tensor([[9.0, 0.0]]), torch.tensor([0]), torch.tensor([1.0])).item() < 0.001
        True
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    rest = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    return torch.logaddexp(own, rest + 2 * eta) - torch.logaddexp(own, rest)


def penalty_change(dense: Tensor, sparse: Tensor, l1: float, l2: float) -> float:
    """Change of the elastic-net penalty of one weight: l2 (\\|S\\|_F^2 - \\|A\\|_F^2) + l1 (\\|S\\|_1 - \\|A\\|_1).

    A is the dense weight and S the sparse one. For a mask split A = S + R with S * R = 0 this is
    -l2 \\|R\\|_F^2 - l1 \\|R\\|_1; if kept values changed, it is the Frobenius form with its cross term.
    """
    a, s = dense.double(), sparse.double()
    return l2 * float(s.square().sum() - a.square().sum()) + l1 * float(s.abs().sum() - a.abs().sum())


def is_mask_split(dense: Tensor, sparse: Tensor) -> bool:
    """True if the sparse weight is the dense one with some values set to zero."""
    return bool(((sparse == 0) | (sparse == dense)).all())


def upper_rate(events: int, trials: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper confidence bound on the rate of ``events`` in ``trials``.

    Example:
        >>> round(upper_rate(0, 5000), 5)
        0.0006
    """
    return 1.0 if events >= trials else float(beta.ppf(confidence, events + 1, trials - events))
