"""Edges: where the singular values of noise end. Estimates of the noise variance, and thresholds above the noise.

Eigenvalues are those of WᵀW/N, W (N, M), N >= M, c = M/N. Sources: Ke, Ma and Lin, arXiv 2006.00436 (BEMA); Gavish and
Donoho, arXiv 1305.5870 (the median and the optimal hard threshold).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.rmt.law import Array, mp_quantile, numbers, positive, tracy_widom_quantile

ALPHA, BETA = 0.2, 0.1  # share of the eigenvalues excluded from a fit at each end; probability of false spikes


def bema(
    eigenvalues: ArrayLike, c: float, n_rows: int, alpha: float = ALPHA, beta: float = BETA
) -> tuple[float, float]:
    """BEMA (arXiv 2006.00436): σ̂² from the middle of a spectrum, and T₊, which pure noise exceeds with probability β.

    Over αM <= k <= (1 − α)M, with λ_k in descending order and q_k the (k − ½)/M upper quantile of MP(c, 1),
    σ̂² = Σ q_k λ_k / Σ q_k². Then T₊ = σ̂² [(1 + √c)² + t_{1−β} N^(−2/3) c^(−1/6) (1 + √c)^(4/3)], t the quantile of the
    Tracy-Widom law.

    Args:
        eigenvalues: all M eigenvalues of WᵀW/N, in any order; both results are in their units.
        c: M/N.
        n_rows: N.
        alpha: share of the eigenvalues excluded at each end.
        beta: probability that pure noise exceeds T₊.

    Raises:
        InputError: the eigenvalues are empty, not 1-D or not finite; c is outside (0, 1]; another argument is out of
            range.

    >>> sigma2, threshold = bema(4.0 * mp_quantile((np.arange(100) + 0.5) / 100, c=0.5), c=0.5, n_rows=200)
    >>> round(sigma2, 6), round(threshold, 4)
    (4.0, 11.7782)
    """
    lam, c = numbers(eigenvalues, "eigenvalues"), positive(c, "c")
    if lam.ndim != 1 or not lam.size or not np.isfinite(lam).all():
        raise InputError("eigenvalues must be a non-empty 1-D array of finite numbers")
    if c > 1 or n_rows < 1 or not 0 <= alpha < 0.5 or not 0 < beta < 1:
        found = f"c={c:g}, n_rows={n_rows}, alpha={alpha}, beta={beta}"
        raise InputError(f"bema needs c <= 1 (else transpose W), N >= 1, 0 <= alpha < 0.5, 0 < beta < 1; found {found}")
    central, p = window(lam.size, alpha)
    q = mp_quantile(p[central], c)
    sigma2 = float(q @ np.sort(lam)[::-1][central] / (q @ q))
    return sigma2, threshold(sigma2, c, n_rows, beta)


def threshold(sigma2: float, c: float, N: int, beta: float = BETA) -> float:
    """Return T₊ of :func:`bema`. Its width (Johnstone) contains (1 + √c)^(4/3), unlike ``(1 + √c)**4 / 3``."""
    width = N ** (-2 / 3) * c ** (-1 / 6) * (1 + math.sqrt(c)) ** (4 / 3)
    return sigma2 * ((1 + math.sqrt(c)) ** 2 + tracy_widom_quantile(1 - beta) * width)


def window(M: int, alpha: float) -> tuple[NDArray[np.bool_], Array]:
    """Return, for the k-th largest of M eigenvalues, whether it is central, αM <= k <= (1 − α)M, and 1 − (k − ½)/M.

    If none is central, all count as central.
    """
    k = np.arange(1, M + 1)
    central = (k >= alpha * M) & (k <= (1 - alpha) * M)
    return central | ~central.any(), 1 - (k - 0.5) / M


def median_sigma(eigenvalues: ArrayLike, c: float) -> float:
    """σ̂ from the median eigenvalue alone: σ̂² = median(λ) / μ_c, μ_c the median of MP(c, 1).

    It agrees with BEMA within 0.5 % for M >= 192, and within 4 % at M = 64. Spikes hardly affect it.

    Raises:
        InputError: there are no eigenvalues, or ``c`` is outside (0, 1].

    >>> round(median_sigma(4.0 * mp_quantile((np.arange(101) + 0.5) / 101, c=0.5), c=0.5), 6)
    2.0
    """
    lam, c = numbers(eigenvalues, "eigenvalues"), positive(c, "c")
    if not lam.size or c > 1:
        raise InputError(f"median_sigma needs eigenvalues and c <= 1; found {lam.size} eigenvalues, c={c:g}")
    return math.sqrt(max(0.0, float(np.median(lam)) / float(mp_quantile(0.5, c))))


def gavish_donoho(c: float, sigma: float | None = None, n_rows: int | None = None) -> float:
    """Optimal hard threshold: singular values below it increase the error of a low-rank reconstruction.

    With ``sigma`` and ``n_rows`` = N, τ = λ*(c) √N σ in the units of singular values, where
    λ*(c) = √(2(c + 1) + 8c / (c + 1 + √(c² + 14c + 1))). Without them, ω(c) = λ*(c)/√μ_c, to be multiplied by the
    median singular value. τ is above the edge.

    Raises:
        InputError: ``c`` is outside (0, 1], or only one of ``sigma`` and ``n_rows`` is given.

    >>> round(gavish_donoho(1.0), 3), round(gavish_donoho(1.0, sigma=1.0, n_rows=1), 4)
    (2.858, 2.3094)
    """
    c = positive(c, "c")
    if c > 1 or (sigma is None) != (n_rows is None):
        raise InputError(f"gavish_donoho needs c <= 1, and sigma with n_rows or neither; found c={c:g}")
    level = math.sqrt(2 * (c + 1) + 8 * c / (c + 1 + math.sqrt(c * c + 14 * c + 1)))
    if sigma is None or n_rows is None:
        return level / math.sqrt(float(mp_quantile(0.5, c)))
    return level * math.sqrt(n_rows) * sigma


def shuffle_edge(W: Tensor, shuffles: int = 4, seed: int = 0) -> float:
    """Return an edge that assumes no law: the largest singular value of W after a random permutation of its entries.

    It reflects the distribution of the entries, long tails included, and nothing else: differences of variance between
    rows or columns are lost. Computed in float64.

    Args:
        W: (rows, columns), or a convolution, which is unfolded.
        shuffles: number of permutations, over which the mean is taken.
        seed: seed of the permutations.

    Raises:
        InputError: the weight is empty or not finite, or ``shuffles`` is below 1.

    >>> W = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    >>> round(shuffle_edge(W) / (256**0.5 + 128**0.5), 1)
    1.0
    """
    if shuffles < 1 or W.ndim < 2 or not W.numel() or not bool(torch.isfinite(W).all()):
        raise InputError("shuffle_edge needs a finite, non-empty weight and at least one shuffle")
    flat = W.detach().double().cpu().flatten()
    generator = torch.Generator().manual_seed(seed)
    largest = []
    for _ in range(shuffles):
        mixed = flat[torch.randperm(flat.numel(), generator=generator)].reshape(W.shape[0], -1)
        gram = mixed.T @ mixed if mixed.shape[0] >= mixed.shape[1] else mixed @ mixed.T
        largest.append(math.sqrt(float(torch.linalg.eigvalsh(gram)[-1])))
    return float(np.mean(largest))
