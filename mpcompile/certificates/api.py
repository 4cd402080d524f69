"""Certify: prove, sample by sample, which properties survive replacing dense weights by sparse ones.

- ``orders.py`` puts the dense model's channels in the sparse model's order; ``pair.py`` puts both on one graph.
- ``work.py`` runs them on the samples. ``steps.py`` replaces one layer after another and bounds the effect on the
  logits, by means of enclosures (``enclosures/``).
- ``bounds.py`` translates a change of logits into labels, cross-entropy and the training objective.
- ``summary.py`` and ``report.py`` state the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mpcompile.certificates.batches import chunk_size, cut, read
from mpcompile.certificates.report import Certificates, Layer, Statement, Tier
from mpcompile.certificates.summary import summarise
from mpcompile.certificates.work import Work
from mpcompile.errors import ConfigError, InputError

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
    """Prove for each sample which properties of the dense model's output a sparse model preserves.

    - Tier 0 measures the change of the logits.
    - Tier 1 encloses the logits for every point of the segment from the dense to the sparse value of each replaced
      layer, in float64 rounded outward; the bounds of all layers add up.
    - Tier 2 bounds the Jacobian of the logits with respect to the layer's value on the same enclosure, and multiplies
      by the change: componentwise, and in the paper's form eta = L \\|R psi\\|_inf.

    For every sample, each tier gives a bound eta on the change of any logit, and a verdict: the label is proven to stay
    if z_p - z_j falls by less than the dense model's margin for every class j. If channels were reordered
    (``permute``), those of the dense model are reordered first; tokens that the sparse model skips because nothing
    reads them are skipped in both. Everything runs on the CPU in float64 copies; the
    models are not changed. Samples are read once, one batch at a time.

    Args:
        dense: the model that ``sparse`` was made from.
        sparse: the result of :func:`mpcompile.transform`, trained or not, or any module of the same structure.
        batches: one batch (a tensor, or a dict of keyword inputs), or an iterable of batches; (input, label) tuples
            provide labels.
        labels: true classes of all samples, of any integer type, in one piece or in parts; None takes the labels in
            the batches.
        tiers: which of 0, 1 and 2; None computes all that are defined. Tier 0 is always included.
        l1: lambda_1 of the training objective CE + l2 \\|W\\|_F^2 + l1 \\|W\\|_1 over the replaced weights. It is a
            property of a training run, not of a model; with 0 for both lambdas no decrease is certified.
        l2: lambda_2 of that objective.
        splits: number of parts that each segment is cut into; more parts give tighter bounds at proportional cost.
        confidence: confidence level of the statements about unseen data.
        progress: show a progress bar (on a terminal).

    Raises:
        InputError: there is no batch, inputs or labels do not fit, or the outputs are not logits (batch, classes).
        GraphError: tiers 1 or 2 were requested by number and the models differ in more than weights; ``sparse`` is
            lowered; the plan's permutation does not fit ``dense``.
        ConfigError: an argument is out of range.

    Source: arXiv 2606.02608, section on certificates; docs/certificates.md has every formula.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> sparse = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="12:16"))
        >>> report = certify(model, sparse, torch.randn(32, 16))
        >>> report["1"].certified <= report["0"].certified <= report.samples
        True
    """
    _check_arguments(dense, sparse, tiers, splits, confidence, l1, l2)
    stream = read(dense, batches, labels)
    first = next(stream)
    work = Work(dense, sparse, tiers, splits)
    with torch.no_grad():
        size = chunk_size(work.modules[0], [value[:1] for value in first[0]])
        chunks = cut(itertools.chain([first], stream), size)
        for inputs, known in tqdm(chunks, desc="certify", unit="chunk", disable=None if progress else True):
            work.add(inputs, known)
    return summarise(work, l1, l2, confidence)


def _check_arguments(dense: Any, sparse: Any, tiers: Any, splits: Any, confidence: float, l1: float, l2: float) -> None:
    for name, model in (("dense", dense), ("sparse", sparse)):
        if not isinstance(model, nn.Module):
            raise InputError(f"{name} is not a model", expected="a torch.nn.Module", found=type(model).__name__)
    if tiers is not None and (isinstance(tiers, (int, str)) or not set(tiers) <= {0, 1, 2}):
        raise ConfigError("there is no such tier", expected="a sequence of 0, 1 and 2", found=repr(tiers))
    if not isinstance(splits, int) or splits < 1:
        raise ConfigError("splits is out of range", expected="1 or more", found=repr(splits))
    if not 0 < confidence < 1:
        raise ConfigError("confidence is out of range", expected="between 0 and 1", found=confidence)
    for name, value in (("l1", l1), ("l2", l2)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} is out of range", expected="0 or more", found=value)
