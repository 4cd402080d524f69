"""Spikes: the map of Baik, Ben Arous and Péché (BBP) from a signal's singular values to the observed ones, and back.

Let W = S + Z, S of low rank with singular value s, Z (N, M) iid with variance σ², N >= M, c = M/N. In units of σ√N, a
signal θ = s/(σ√N) is observed at y = √((1 + θ²)(c + θ²))/θ if θ > c^(1/4), else at the edge 1 + √c. For c = 1,
y = θ + 1/θ. Sources: arXiv 2606.02608, the additive model; Benaych-Georges and Nadakuditi, arXiv 1103.2221.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from mpcompile.errors import InputError
from mpcompile.rmt.law import Array, numbers, positive


def bbp(strength: ArrayLike, sigma: float, shape: tuple[int, int]) -> Array:
    """Return the singular values observed for a signal in noise: σ(√N + √M), the edge, for those hidden by the noise.

    Args:
        strength: singular values of the signal, >= 0.
        sigma: standard deviation of the noise entries.
        shape: (N, M), in either order.

    Raises:
        InputError: a value is negative, or σ or a length is not positive.

    >>> bbp([0.5, 1.0, 2.0], sigma=0.1, shape=(100, 100))
    array([2. , 2. , 2.5])
    """
    unit, c = _unit(sigma, shape)
    theta = numbers(strength, "strength") / unit
    if theta.size and theta.min() < 0:
        raise InputError("singular values cannot be negative", expected=">= 0", found=float(theta.min() * unit))
    safe = np.maximum(theta, c**0.25)  # at c^(1/4) the map gives the edge
    return unit * np.sqrt((1 + safe**2) * (c + safe**2)) / safe


def bbp_inverse(observed: ArrayLike, sigma: float, shape: tuple[int, int]) -> Array:
    """Return the strengths of the signal that explain observed singular values; 0 for those at or below the edge.

    θ² = ½ (y² − 1 − c + √((y² − 1 − c)² − 4c)). Arguments and errors as in :func:`bbp`.

    >>> bbp_inverse([2.0, 2.5], sigma=0.1, shape=(100, 100)).round(6)
    array([0., 2.])
    """
    unit, c = _unit(sigma, shape)
    y = numbers(observed, "observed") / unit
    if y.size and y.min() < 0:
        raise InputError("singular values cannot be negative", expected=">= 0", found=float(y.min() * unit))
    b = y**2 - 1 - c
    theta2 = (b + np.sqrt(np.maximum(b * b - 4 * c, 0.0))) / 2
    return np.where(y > (1 + math.sqrt(c)) * (1 + 1e-12), unit * np.sqrt(np.maximum(theta2, 0.0)), 0.0)


def _unit(sigma: float, shape: tuple[int, int]) -> tuple[float, float]:
    """σ√N and c."""
    N, M = max(shape), min(shape)
    positive(M, "shape")
    return positive(sigma, "sigma") * math.sqrt(N), M / N
