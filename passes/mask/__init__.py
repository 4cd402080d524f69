"""Mask: choose N of every M values of each eligible weight, and fix the choice in the graph."""

from mpcompile import _moved
from mpcompile.passes.mask.choice import Masked, Masks
from mpcompile.passes.mask.eligibility import eligible, reason, verify
from mpcompile.passes.mask.insert import Mask
from mpcompile.pruning.scores import covariance_mask, magnitude_mask, top_n

__all__ = [
    "Mask",
    "Masked",
    "Masks",
    "covariance_mask",
    "eligible",
    "magnitude_mask",
    "reason",
    "top_n",
    "verify",
]

__getattr__ = _moved.renamed(__name__, {"sources": "passes.mask.projector.sources"})
