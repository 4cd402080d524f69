"""Spectra and matrices with known structure, for tests of the Marchenko-Pastur module."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from mpcompile import rmt


def wishart(N: int, M: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues of WᵀW/N, descending, for a Gaussian (N, M) W, drawn by its bidiagonal form (math-ph/0206043)."""
    a = np.sqrt(rng.chisquare(N - np.arange(M)))
    b = np.sqrt(rng.chisquare(np.arange(M - 1, 0, -1)))
    diagonal = a**2
    diagonal[1:] += b**2
    return eigvalsh_tridiagonal(diagonal, a[:-1] * b)[::-1] / N


def planted(randn: Callable[..., Tensor], N: int, M: int, values: Tensor) -> Tensor:
    """Return a matrix (N, M) with these singular values and random singular vectors."""
    u, v = torch.linalg.qr(randn(N, len(values)))[0], torch.linalg.qr(randn(M, len(values)))[0]
    return (u * values) @ v.T


def fit_error(lam: np.ndarray, N: int) -> float:
    """``Fit.fit_error`` of descending eigenvalues without spikes, from its definition."""
    M = lam.size
    k = np.arange(math.ceil(0.2 * M), math.floor(0.8 * M) + 1)
    F = rmt.mp_cdf(lam[k - 1], M / N, rmt.bema(lam, M / N, N)[0])
    return float(np.abs(F - 1 + (k - 0.5) / M).max())
