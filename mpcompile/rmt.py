"""Random-matrix analysis of a weight: the Marchenko-Pastur (MP) law, its edge σ₊, the spikes above it, and the fit.

W (N, M), N >= M, entries iid with mean 0 and variance σ²; X = WᵀW/N; c = M/N in (0, 1]. As N grows the eigenvalues of
X fill [λ₋, λ₊] = σ²(1 ∓ √c)², and the singular values of W end at σ₊ = √(N λ₊) = σ(√N + √M). What stands above the
edge ("spikes") is structure. Eigenvalues are in units of weight², σ and edges in units of weight. Sources: MP law and
σ₊ as in arXiv 2606.02608; BEMA, arXiv 2006.00436 (Ke, Ma, Lin); Tracy-Widom quantiles, arXiv 1209.3394 (Chiani).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import gamma
from torch import Tensor

from mpcompile.errors import InputError

__all__ = ["Fit", "bema", "fit", "fit_qkv", "mp_cdf", "mp_density", "mp_quantile", "tracy_widom_quantile"]

Array = NDArray[np.float64]
Verdict = Literal["mp", "not_mp", "low_confidence"]

ALPHA, BETA = 0.2, 0.1  # share of the eigenvalues left out of a fit at each end; rate of false spikes
MIN_M, MIN_C, MIN_RANK = 64, 0.03, 0.98  # below the first two: too noisy to judge; rank / M below the third: not MP


def mp_density(x: ArrayLike, c: float, sigma2: float = 1.0) -> Array:
    """Density of the MP law, f(x) = √((λ₊ − x)(x − λ₋)) / (2π c σ² x) on [λ₋, λ₊], 0 outside; shaped like ``x``.

    For c > 1 it integrates to 1/c: the atom 1 − 1/c at 0 is not in it. At c = 1 it diverges at x = 0 (inf).
    Raises InputError: NaN in ``x``; ``c`` or ``sigma2`` not positive and finite.

    >>> float(mp_density(1.0, c=1.0).round(4))  # √3 / 2π
    0.2757
    """
    x, c, sigma2 = _numbers(x, "x"), _positive(c, "c"), _positive(sigma2, "sigma2")
    low, high = sigma2 * (1 - math.sqrt(c)) ** 2, sigma2 * (1 + math.sqrt(c)) ** 2
    inside = (x > low) & (x < high)
    y = np.where(inside, x, high)
    f = np.sqrt((high - y) * (y - low)) / (2 * math.pi * c * sigma2 * y)
    return np.where((x == 0) & (low == 0), np.inf, f)


def mp_cdf(x: ArrayLike, c: float, sigma2: float = 1.0) -> Array:
    """Distribution function of the MP law in closed form, 0 below the bulk and 1 above; shaped like ``x``.

    With x = σ²(1 + c − 2√c cos t) the integrand is smooth, and its integral over [0, t] is
    F = t/π + (√c sin t − (1 − c) δ) / (πc), δ = atan(√c sin t / (1 − √c cos t)). For c > 1 by duality:
    F_c(x) = (1 − 1/c)·[x >= 0] + F_{1/c}(x/c)/c. Raises InputError as ``mp_density`` does.

    >>> mp_cdf([-1.0, 2.0, 9.0], c=1.0).round(4)  # 1/2 + 1/π in the middle
    array([0.    , 0.8183, 1.    ])
    """
    x, c = _numbers(x, "x") / _positive(sigma2, "sigma2"), _positive(c, "c")
    if c > 1:
        return (x >= 0) * (1 - 1 / c) + mp_cdf(x / c, 1 / c) / c
    sin2 = np.clip((x - (1 - math.sqrt(c)) ** 2) / (4 * math.sqrt(c)), 0.0, 1.0)  # sin²(t/2)
    return _cdf_of_angle(2 * np.arcsin(np.sqrt(sin2)), c)


def mp_quantile(p: ArrayLike, c: float) -> Array:
    """Inverse of ``mp_cdf`` for σ² = 1 (multiply by another σ²), by bisection in t to rounding; shaped like ``p``.

    Raises InputError: ``p`` outside [0, 1]; ``c`` not positive and finite.

    >>> mp_quantile([0.0, 0.5, 1.0], c=0.25).round(4)
    array([0.25 , 0.916, 2.25 ])
    """
    p, c = _numbers(p, "p"), _positive(c, "c")
    if p.size and (p.min() < 0 or p.max() > 1):
        raise InputError(f"p must lie in [0, 1]; found {p.min():g} to {p.max():g}")
    if c > 1:
        return np.where(p <= 1 - 1 / c, 0.0, c * mp_quantile(np.clip(1 - c * (1 - p), 0.0, 1.0), 1 / c))
    low, high = np.zeros_like(p), np.full_like(p, math.pi)
    for _ in range(54):
        t = (low + high) / 2
        below = _cdf_of_angle(t, c) < p
        low, high = np.where(below, t, low), np.where(below, high, t)
    t = np.where(p == 1, math.pi, np.where(p == 0, 0.0, high))
    return (1 - math.sqrt(c)) ** 2 + 4 * math.sqrt(c) * np.sin(t / 2) ** 2


def tracy_widom_quantile(p: float) -> float:
    """Quantile of the Tracy-Widom law of order 1, as a shifted gamma (Chiani, arXiv 1209.3394); |error| < 0.03.

    Raises InputError: ``p`` not strictly between 0 and 1.

    >>> round(tracy_widom_quantile(0.95), 4)
    0.9794
    """
    if not 0 < p < 1:
        raise InputError(f"p must lie strictly between 0 and 1; found {p}")
    return float(gamma.ppf(p, 46.446, scale=0.186054)) - 9.84801


def bema(
    eigenvalues: ArrayLike, c: float, n_rows: int, alpha: float = ALPHA, beta: float = BETA
) -> tuple[float, float]:
    """BEMA (arXiv 2006.00436): σ̂² from the middle of a spectrum, and T₊, which pure noise exceeds with probability β.

    λ_k falling, q_k the (k − ½)/M upper quantile of MP(c, 1), αM <= k <= (1 − α)M: σ̂² = Σ q_k λ_k / Σ q_k². Then
    T₊ = σ̂² [(1 + √c)² + t_{1−β} N^(−2/3) c^(−1/6) (1 + √c)^(4/3)].

    ``eigenvalues``: all M of WᵀW/N, in any order and in the unit of both results; ``c`` = M/N; ``n_rows`` = N.
    Raises InputError: eigenvalues empty, not 1-D or not finite; c outside (0, 1]; another argument out of its range.

    >>> sigma2, threshold = bema(4.0 * mp_quantile((np.arange(100) + 0.5) / 100, c=0.5), c=0.5, n_rows=200)
    >>> round(sigma2, 6), round(threshold, 4)
    (4.0, 11.7782)
    """
    lam, c = _numbers(eigenvalues, "eigenvalues"), _positive(c, "c")
    if lam.ndim != 1 or not lam.size or not np.isfinite(lam).all():
        raise InputError("eigenvalues must be a non-empty 1-D array of finite numbers")
    if c > 1 or n_rows < 1 or not 0 <= alpha < 0.5 or not 0 < beta < 1:
        found = f"c={c:g}, n_rows={n_rows}, alpha={alpha}, beta={beta}"
        raise InputError(f"bema needs c <= 1 (else transpose W), N >= 1, 0 <= alpha < 0.5, 0 < beta < 1; found {found}")
    window, p = _window(lam.size, alpha)
    q = mp_quantile(p[window], c)
    sigma2 = float(q @ np.sort(lam)[::-1][window] / (q @ q))
    return sigma2, _threshold(sigma2, c, n_rows, beta)


@dataclass(frozen=True)
class Fit:
    """What the MP law says about one weight.

    Attributes:
        sigma: σ̂, standard deviation of the noise entries.
        edge: σ₊ = σ̂(√N + √M), where the singular values of the noise end.
        edge_tw: √(N T₊), with a Tracy-Widom margin: Gaussian noise passes it with probability 0.1, long tails oftener.
        n_spikes: singular values above ``edge_tw``.
        fit_error: max |F_emp − F_MP| over the central 60 % of the bulk, F_emp(λ_k) = 1 − (k − ½)/M.
        noise_share: share of ‖W‖_F² that the noise explains, N M σ̂²/‖W‖_F², in [0, 1]; 0 if W is 0.
        verdict: ``"mp"``, ``"not_mp"`` (by rank or fit_error), ``"low_confidence"`` (M < 64 or c < 0.03).
        shape: (rows, columns) of the matrix that was fitted, before any transposition.
    """

    sigma: float
    edge: float
    edge_tw: float
    n_spikes: int
    fit_error: float
    noise_share: float
    verdict: Verdict
    shape: tuple[int, int]


def fit(W: Tensor) -> Fit:
    """Fit the MP law to a weight: σ̂ and T₊ by BEMA, and σ̂ once more on the bulk if there are spikes.

    Spikes move the bulk down in rank (40 of 768: σ̂ + 3.5 %). Without k spikes it is that of an (N − k, M − k) matrix: a
    second BEMA takes it so, but no third, which would peel a spectrum that isn't MP. Where W is too small to judge
    (low_confidence) or lacks rank, σ̂² = ‖bulk‖_F² / ((N − k)(M − k)). All in float64.

    ``W``: (rows, columns), or a convolution (C_out, C_in, kh, kw) that is unfolded to (C_out, C_in kh kw).
    Raises InputError: not a real 2-D or 4-D tensor that holds data; empty; not finite.

    >>> f = fit(torch.randn(512, 256, generator=torch.Generator().manual_seed(1)))
    >>> f.verdict, f.n_spikes, round(f.sigma, 2), round(f.edge / (512**0.5 + 256**0.5), 2)
    ('mp', 0, 1.0, 1.0)
    """
    if not isinstance(W, Tensor) or W.ndim not in (2, 4) or W.is_complex() or W.is_meta or W.numel() == 0:
        what = f"{W.dtype} of shape {tuple(W.shape)} on {W.device}" if isinstance(W, Tensor) else type(W).__name__
        raise InputError(f"expected a weight: a real, non-empty 2-D or 4-D tensor that holds data; found {what}")
    A = (W if W.device.type in ("cpu", "cuda") else W.cpu()).detach().flatten(1).to(torch.float64)  # MPS lacks float64
    if bad := int((~torch.isfinite(A)).sum()):
        raise InputError(f"weight is not finite: {bad} of {A.numel()} entries are NaN or inf")
    shape, scale = (A.shape[0], A.shape[1]), float(A.abs().max()) or 1.0
    A = (A if shape[0] >= shape[1] else A.T) / scale  # scaled so that no square overflows or underflows
    N, M, c = max(shape), min(shape), min(shape) / max(shape)
    lam = (torch.linalg.eigvalsh(A.T @ A).flip(0).clamp_min(0) / N).cpu().numpy()
    total = float(lam.sum())  # ‖A‖_F² / N
    # Zero is what rounding makes of zero: that of the Gram matrix, and that of the entries, of variance <= (eps w)²/12
    # (8 bits are too coarse to tell a rank).
    eps = torch.finfo(W.dtype).eps if W.is_floating_point() and W.itemsize > 1 else 0.0
    lam[lam < max(N * np.finfo(np.float64).eps * lam[0], eps**2 / 12 * total / M * (1 + math.sqrt(c)) ** 2)] = 0.0
    deficient, small = np.count_nonzero(lam) < MIN_RANK * M, M < MIN_M or c < MIN_C
    if deficient or small:
        sigma2, k = _frobenius(lam, N)
    else:
        k = int((lam > bema(lam, c, N)[1]).sum())
    bulk, bulk_c = lam[k:] * (N / (N - k)), (M - k) / (N - k)
    if not (deficient or small):
        sigma2, _ = bema(bulk, bulk_c, N - k)
    threshold = _threshold(sigma2, c, N)
    window, p = _window(M - k, ALPHA)
    error = float(np.abs(mp_cdf(bulk, bulk_c, sigma2 or 1.0) - p)[window].max())
    verdict: Verdict = "low_confidence" if small else "mp" if error <= _gamma(M) else "not_mp"
    verdict = "not_mp" if deficient else verdict
    sigma, edge_tw = scale * math.sqrt(sigma2), scale * math.sqrt(N * threshold)
    edge, share = sigma * (math.sqrt(N) + math.sqrt(M)), min(1.0, M * sigma2 / (total or 1.0))
    return Fit(sigma, edge, edge_tw, int((lam > threshold).sum()), error, share, verdict, shape)


def fit_qkv(W: Tensor, parts: int = 3) -> tuple[Fit, ...]:
    """Fit ``parts`` equal blocks of rows apart: queries, keys and values each have a scale, and a mixture isn't MP.

    Raises InputError: rows that don't divide into ``parts``, and as ``fit`` does.

    >>> {f.shape for f in fit_qkv(torch.randn(576, 192))}
    {(192, 192)}
    """
    if not isinstance(W, Tensor) or W.ndim == 0 or parts < 1 or W.shape[0] % parts:
        raise InputError(f"expected a weight whose rows divide into {parts} blocks; found {getattr(W, 'shape', W)}")
    return tuple(fit(block) for block in W.tensor_split(parts))


def _gamma(M: int) -> float:
    """Largest ``fit_error`` of noise: O(log M / M), as σ̂ is fitted and eigenvalues are rigid; no textbook KS bound."""
    # The 0.999 quantile of M fit_error for iid Gaussian W, simulated from the bidiagonal model of a Wishart matrix:
    # M = 64: 2.67, 96: 2.86, 128: 2.95, 192: 3.18, 384: 3.50, 768: 3.66 (mean over c = 1, 0.9, 0.5, 0.25, 0.03, which
    # hardly matter; 6000 to 250 draws each). Uniform, sign and 2:4-masked entries: the same; Laplace: up to 10 % more.
    return (1.2 + 0.385 * math.log(M)) / M


def _threshold(sigma2: float, c: float, N: int, beta: float = BETA) -> float:
    """T₊ of ``bema``. The width (Johnstone) has 1 + √c to the power 4/3, which ``(1 + √c)**4 / 3`` is not."""
    width = N ** (-2 / 3) * c ** (-1 / 6) * (1 + math.sqrt(c)) ** (4 / 3)
    return sigma2 * ((1 + math.sqrt(c)) ** 2 + tracy_widom_quantile(1 - beta) * width)


def _frobenius(lam: Array, N: int) -> tuple[float, int]:
    """σ̂² = ‖bulk‖_F² / ((N − k)(M − k)), and k, the eigenvalues (falling) above its T₊, repeated until k stays."""
    k, above = -1, 0
    while above > k:  # ends with k < M: the least of a bulk is at most its mean, and that is below T₊
        k = above
        sigma2 = float(lam[k:].sum()) * N / ((N - k) * (lam.size - k))
        above = int((lam > _threshold(sigma2, lam.size / N, N)).sum())
    return sigma2, k


def _cdf_of_angle(t: Array, c: float) -> Array:
    """``mp_cdf`` at x = 1 + c − 2√c cos t, for c <= 1."""
    s, r = np.sin(t), math.sqrt(c)
    return t / math.pi + (r * s - (1 - c) * np.arctan2(r * s, 1 - r * np.cos(t))) / (math.pi * c)


def _window(M: int, alpha: float) -> tuple[NDArray[np.bool_], Array]:
    """Which of M falling eigenvalues are central, αM <= k <= (1 − α)M (or else all); 1 − (k − ½)/M of each."""
    k = np.arange(1, M + 1)
    central = (k >= alpha * M) & (k <= (1 - alpha) * M)
    return central | ~central.any(), 1 - (k - 0.5) / M


def _numbers(x: ArrayLike, name: str) -> Array:
    x = np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)
    if np.isnan(x).any():
        raise InputError(f"{name} holds NaN")
    return x


def _positive(value: float, name: str) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be positive and finite; found {value}")
    return float(value)
