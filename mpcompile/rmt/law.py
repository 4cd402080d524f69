"""The Marchenko-Pastur (MP) law, and the Tracy-Widom law at its edge, as functions of numbers.

Sources: arXiv 2606.02608 (MP law); Chiani, arXiv 1209.3394 (Tracy-Widom quantiles).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import gamma
from torch import Tensor

from mpcompile.errors import InputError

Array = NDArray[np.float64]


def mp_density(x: ArrayLike, c: float, sigma2: float = 1.0) -> Array:
    """Density of the MP law, f(x) = √((λ₊ − x)(x − λ₋)) / (2π c σ² x) on [λ₋, λ₊], 0 outside; shaped like ``x``.

    For c > 1 it integrates to 1/c: it does not contain the atom 1 − 1/c at 0. At c = 1 it diverges at x = 0 (inf).

    Raises:
        InputError: ``x`` contains NaN; ``c`` or ``sigma2`` is not positive and finite.

    >>> float(mp_density(1.0, c=1.0).round(4))  # √3 / 2π
    0.2757
    """
    x, c, sigma2 = numbers(x, "x"), positive(c, "c"), positive(sigma2, "sigma2")
    low, high = sigma2 * (1 - math.sqrt(c)) ** 2, sigma2 * (1 + math.sqrt(c)) ** 2
    inside = (x > low) & (x < high)
    y = np.where(inside, x, high)
    f = np.sqrt((high - y) * (y - low)) / (2 * math.pi * c * sigma2 * y)
    return np.where((x == 0) & (low == 0), np.inf, f)


def mp_cdf(x: ArrayLike, c: float, sigma2: float = 1.0) -> Array:
    """Distribution function of the MP law in closed form, 0 below the bulk and 1 above; shaped like ``x``.

    With x = σ²(1 + c − 2√c cos t) the integrand is smooth, and its integral over [0, t] is
    F = t/π + (√c sin t − (1 − c) δ) / (πc), δ = atan(√c sin t / (1 − √c cos t)). For c > 1, by duality,
    F_c(x) = (1 − 1/c)·[x >= 0] + F_{1/c}(x/c)/c.

    Raises:
        InputError: as :func:`mp_density`.

    >>> mp_cdf([-1.0, 2.0, 9.0], c=1.0).round(4)  # 1/2 + 1/π in the middle
    array([0.    , 0.8183, 1.    ])
    """
    x, c = numbers(x, "x") / positive(sigma2, "sigma2"), positive(c, "c")
    if c > 1:
        return (x >= 0) * (1 - 1 / c) + mp_cdf(x / c, 1 / c) / c
    sin2 = np.clip((x - (1 - math.sqrt(c)) ** 2) / (4 * math.sqrt(c)), 0.0, 1.0)  # sin²(t/2)
    return _cdf_of_angle(2 * np.arcsin(np.sqrt(sin2)), c)


def mp_quantile(p: ArrayLike, c: float) -> Array:
    """Inverse of :func:`mp_cdf` for σ² = 1 (multiply by any other σ²), exact up to rounding; shaped like ``p``.

    Raises:
        InputError: ``p`` is outside [0, 1]; ``c`` is not positive and finite.

    >>> mp_quantile([0.0, 0.5, 1.0], c=0.25).round(4)
    array([0.25 , 0.916, 2.25 ])
    """
    p, c = numbers(p, "p"), positive(c, "c")
    if p.size and (p.min() < 0 or p.max() > 1):
        raise InputError(f"p must lie in [0, 1]; found {p.min():g} to {p.max():g}")
    if c > 1:
        return np.where(p <= 1 - 1 / c, 0.0, c * mp_quantile(np.clip(1 - c * (1 - p), 0.0, 1.0), 1 / c))
    low, high = np.zeros_like(p), np.full_like(p, math.pi)
    for _ in range(54):  # bisection in t
        t = (low + high) / 2
        below = _cdf_of_angle(t, c) < p
        low, high = np.where(below, t, low), np.where(below, high, t)
    t = np.where(p == 1, math.pi, np.where(p == 0, 0.0, high))
    return (1 - math.sqrt(c)) ** 2 + 4 * math.sqrt(c) * np.sin(t / 2) ** 2


def tracy_widom_quantile(p: float) -> float:
    """Quantile of the Tracy-Widom law of order 1, approximated by a shifted gamma law with |error| < 0.03.

    Source: Chiani, arXiv 1209.3394.

    Raises:
        InputError: ``p`` is not strictly between 0 and 1.

    >>> round(tracy_widom_quantile(0.95), 4)
    0.9794
    """
    if not 0 < p < 1:
        raise InputError(f"p must lie strictly between 0 and 1; found {p}")
    return float(gamma.ppf(p, 46.446, scale=0.186054)) - 9.84801


def _cdf_of_angle(t: Array, c: float) -> Array:
    """:func:`mp_cdf` at x = 1 + c − 2√c cos t, for c <= 1 and σ² = 1."""
    s, r = np.sin(t), math.sqrt(c)
    return t / math.pi + (r * s - (1 - c) * np.arctan2(r * s, 1 - r * np.cos(t))) / (math.pi * c)


def numbers(x: ArrayLike, name: str) -> Array:
    """Return ``x`` as a float64 array, or raise an InputError that names it if it contains NaN."""
    x = np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
    if np.isnan(x).any():
        raise InputError(f"{name} holds NaN")
    return x


def positive(value: float, name: str) -> float:
    """Return ``value`` as a float, or raise an InputError that names it if it is not positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be positive and finite; found {value}")
    return float(value)
