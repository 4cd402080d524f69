"""Spectral Edge Budgeting (SEB): how readily each layer gives up weights, from the edge σ₊ of its noise.

A weight is scored |W| / w, with one w per layer, and the smallest scores of all layers are pruned first: w grows with
σ₊, so that a layer with a higher noise edge loses more weights. Pure functions of numbers.

Source: arXiv 2606.02608, Online Resource 2, "Spectral Edge Budgeting", "Layer-type extension" and "Four-regime
strategy"; the presets were selected there on ViT-B/16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_FLOOR = 0.1  # smallest w: no layer is exempt from pruning


class Preset(NamedTuple):
    """How strongly w depends on the edges, and the sparsity at which this ends (see :func:`seb_weights`).

    Attributes:
        attention: beta of attention projections.
        other: beta of all other layers.
        s_d: sparsity at and above which all w are 1.
    """

    attention: float
    other: float
    s_d: float


def seb_preset(sparsity: float) -> Preset:
    """The paper's beta and s_d for edges σ₊ at a given sparsity, the share of weights removed.

    Up to a sparsity of 0.2 this is plain magnitude pruning, beta = 0. In this range the paper finds σ₊ to be no better
    than magnitude, and its hybrid of magnitude and SER (:mod:`mpcompile.pruning.ser`) starts with exact magnitude
    pruning. (The paper's beta = 0.5, s_d = 0.3 for this range belong to another signal, the power-law exponent of the
    spectrum's tail.)

    >>> seb_preset(0.2).other, seb_preset(0.35).other, seb_preset(0.5).other, seb_preset(0.6)
    (0.0, 1.0, 1.25, Preset(attention=1.0, other=2.0, s_d=0.85))
    """
    if sparsity <= 0.2:
        return Preset(0.0, 0.0, 0.3)
    if sparsity <= 0.4:
        return Preset(1.0, 1.0, 0.5)
    if sparsity <= 0.55:
        return Preset(1.25, 1.25, 0.7)
    return Preset(1.0, 2.0, 0.85)


def seb_weights(edges: ArrayLike, sparsity: float, beta: ArrayLike, s_d: float) -> Array:
    """w = max(0.1, 1 + beta d(s) z), with z the edges σ₊ standardised over the layers and d(s) = max(0, 1 - s / s_d).

    Args:
        edges: σ₊ of each layer, (layers,), in any unit.
        sparsity: s, the share of weights removed.
        beta: how strongly w depends on z, one number or (layers,).
        s_d: sparsity at and above which all w are 1.

    >>> seb_weights([1.0, 2.0, 3.0], sparsity=0.35, beta=1.0, s_d=0.7).round(3)
    array([0.388, 1.   , 1.612])
    """
    edge = np.asarray(edges, dtype=float)
    spread = float(edge.std())
    z = (edge - edge.mean()) / spread if spread > 0 else np.zeros_like(edge)
    return np.maximum(_FLOOR, 1 + np.asarray(beta) * max(0.0, 1 - sparsity / s_d) * z)


def layer_weights(edges: Mapping[str, float], sparsity: float) -> dict[str, float]:
    """Return :func:`seb_weights` by layer name, with the paper's preset; names with ``attn`` are attention projections.

    Args:
        edges: name of the layer (or of its weight) -> σ₊.
        sparsity: the share of all these weights that is removed.

    >>> layer_weights({"a": 1.0, "b": 3.0}, 0.3)
    {'a': 0.6, 'b': 1.4}
    """
    preset = seb_preset(sparsity)
    beta = [preset.attention if "attn" in name else preset.other for name in edges]
    weights = seb_weights(list(edges.values()), sparsity, beta, preset.s_d)
    return dict(zip(edges, weights.tolist(), strict=True))
