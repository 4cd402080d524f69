"""Fits of the Marchenko-Pastur law to weights: noise level, edge, spikes, goodness of fit, and a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.rmt.edges import ALPHA, bema, threshold, window
from mpcompile.rmt.law import Array, mp_cdf
from mpcompile.rmt.spikes import bbp_inverse

Verdict = Literal["mp", "not_mp", "low_confidence"]

MIN_M, MIN_C, MIN_RANK = 64, 0.03, 0.98  # M or c below: too noisy to judge; rank / M below: not MP
_SWEEPS = 6  # iterations that estimate the row x column scales
_ROUNDS = 3  # estimates of these scales; spikes are removed before each but the first
_MOST_SPIKES = 0.25  # share of the singular values; with more spikes there is no bulk to fit
_CAP = 9.0  # squared entries are capped at three standard deviations: spikes and outliers do not determine a scale


@dataclass(frozen=True)
class Fit:
    """The fit of the MP law to one weight.

    Attributes:
        sigma: σ̂, standard deviation of the noise entries.
        edge: σ₊ = σ̂(√N + √M), where the singular values of the noise end.
        edge_tw: √(N T₊), the edge with a Tracy-Widom margin: Gaussian noise exceeds it with probability 0.1, noise with
            long tails more often.
        n_spikes: singular values above ``edge_tw``.
        fit_error: max |F_emp − F_MP| over the central 60 % of the bulk, F_emp(λ_k) = 1 − (k − ½)/M.
        noise_share: share of ‖W‖_F² that the noise explains, N M σ̂²/‖W‖_F², in [0, 1]; 0 if W is 0.
        verdict: ``"mp"``, ``"not_mp"`` (by rank or fit_error), or ``"low_confidence"`` (M < 64 or c < 0.03).
        shape: (rows, columns) of the fitted matrix, before any transposition.
        separable: True if variances differ by row and column. All figures are then those of D_r^(−1/2) W D_c^(−1/2),
            D_r and D_c of mean 1, which follows the law; ``plain`` is the fit of W.
        spikes: singular values above ``edge_tw``, in descending order.
        signal: the singular values of the signal that explains the spikes, by the inverse BBP map.
        plain: the rejected fit of W itself, if ``separable``.
    """

    sigma: float
    edge: float
    edge_tw: float
    n_spikes: int
    fit_error: float
    noise_share: float
    verdict: Verdict
    shape: tuple[int, int]
    separable: bool = False
    spikes: tuple[float, ...] = ()
    signal: tuple[float, ...] = ()
    plain: Fit | None = None


def fit(W: Tensor, separable: bool = True) -> Fit:
    """Fit the MP law to a weight: σ̂ and T₊ by BEMA; if there are spikes, σ̂ is estimated again on the bulk.

    Spikes shift the ranks of the bulk (40 of 768: σ̂ + 3.5 %). Without its k spikes, the bulk is that of an
    (N − k, M − k) matrix, and a second BEMA fits it as such. A third would keep removing values from a spectrum that
    is not MP. If W is too small to judge (low_confidence) or rank-deficient, σ̂² = ‖bulk‖_F² / ((N − k)(M − k)). All
    computations are in float64.

    Args:
        W: (rows, columns), or a convolution (C_out, C_in, kh, kw), which is unfolded to (C_out, C_in kh kw).
        separable: if the law is rejected, try it on W with its row and column scales divided out.

    Raises:
        InputError: W is not a real 2-D or 4-D tensor that holds data, is empty, or is not finite.

    >>> f = fit(torch.randn(512, 256, generator=torch.Generator().manual_seed(1)))
    >>> f.verdict, f.n_spikes, round(f.sigma, 2), round(f.edge / (512**0.5 + 256**0.5), 2)
    ('mp', 0, 1.0, 1.0)
    """
    if not isinstance(W, Tensor) or W.ndim not in (2, 4) or W.is_complex() or W.is_meta or W.numel() == 0:
        found = f"{W.dtype} of shape {tuple(W.shape)} on {W.device}" if isinstance(W, Tensor) else type(W).__name__
        raise InputError(f"expected a weight: a real, non-empty 2-D or 4-D tensor that holds data; found {found}")
    return fit_batch(W.detach().flatten(1)[None], separable)[0]


def fit_batch(W: Tensor, separable: bool = True) -> tuple[Fit, ...]:
    """:func:`fit` for each matrix of a batch (B, rows, columns), with one call of the eigenvalue solver.

    Raises:
        InputError: as :func:`fit`.

    >>> [f.verdict for f in fit_batch(torch.randn(2, 128, 128, generator=torch.Generator().manual_seed(1)))]
    ['mp', 'mp']
    """
    return tuple(fitted for fitted, _ in fit_and_spectra(W, separable))


def fit_and_spectra(W: Tensor, separable: bool = True) -> list[tuple[Fit, Array]]:
    """Return each fit of :func:`fit_batch` with the singular values (M,) that it describes, in descending order.

    For a separable fit these are the singular values of the matrix with its row and column scales divided out.
    """
    if not isinstance(W, Tensor) or W.ndim != 3 or W.is_complex() or W.is_meta or W.numel() == 0:
        found = f"{W.dtype} of shape {tuple(W.shape)}" if isinstance(W, Tensor) else type(W).__name__
        raise InputError(f"expected real, non-empty matrices (B, rows, columns) that hold data; found {found}")
    A = (W if W.device.type in ("cpu", "cuda") else W.cpu()).detach().to(torch.float64)  # MPS lacks float64
    if bad := int((~torch.isfinite(A)).sum()):
        raise InputError(f"weight is not finite: {bad} of {A.numel()} entries are NaN or inf")
    shape = (A.shape[1], A.shape[2])
    A = A if shape[0] >= shape[1] else A.transpose(1, 2)
    scale = A.abs().amax((1, 2), keepdim=True)
    scale = torch.where(scale > 0, scale, 1.0)
    A = A / scale  # so that no square overflows or underflows
    # Eigenvalues within the rounding error of the entries, of variance <= (eps w)²/12, count as zero (not for 8 bits:
    # too coarse).
    eps = torch.finfo(W.dtype).eps if W.is_floating_point() and W.itemsize > 1 else 0.0
    fits: list[tuple[Fit, Array]] = []
    for a, lam, s in zip(A, _spectra(A), scale.flatten().tolist(), strict=True):
        plain, deficient = _judge(lam, a.shape[0], s, eps, shape)
        result, spectrum = plain, lam
        if separable and plain.verdict == "not_mp" and not deficient:
            other = _separable(a, s, eps, shape)
            if other is not None:
                white, spectrum = other
                share = min(1.0, a.numel() * (white.sigma / s) ** 2 / (float(a.square().sum()) or 1.0))
                result = replace(white, separable=True, plain=plain, noise_share=share)
        fits.append((result, s * np.sqrt(a.shape[0] * spectrum)))
    return fits


def fit_qkv(W: Tensor, parts: int = 3) -> tuple[Fit, ...]:
    """Fit ``parts`` equal blocks of rows separately: queries, keys and values differ in scale, and a mixture is not MP.

    Raises:
        InputError: the rows do not divide into ``parts`` blocks; otherwise as :func:`fit`.

    >>> {f.shape for f in fit_qkv(torch.randn(576, 192))}
    {(192, 192)}
    """
    if not isinstance(W, Tensor) or W.ndim == 0 or parts < 1 or W.shape[0] % parts:
        raise InputError(f"expected a weight whose rows divide into {parts} blocks; found {getattr(W, 'shape', W)}")
    if parts == 1 or W.ndim not in (2, 4) or W.numel() == 0:
        return tuple(fit(block) for block in W.tensor_split(parts))
    return fit_batch(W.detach().flatten(1).reshape(parts, W.shape[0] // parts, -1))


def fit_taps(W: Tensor) -> tuple[Fit, ...]:
    """Fit a convolution (C_out, C_in, kh, kw) tap by tap, each (C_out, C_in), in the order of ``W.flatten(2)``.

    Neighbouring taps are correlated, which the fit of the unfolded matrix does not model.

    Raises:
        InputError: W is not 4-D; otherwise as :func:`fit`.

    >>> len(fit_taps(torch.randn(64, 64, 3, 3)))
    9
    """
    if not isinstance(W, Tensor) or W.ndim != 4:
        raise InputError(f"expected a convolution's weight (C_out, C_in, kh, kw); found {getattr(W, 'shape', W)}")
    return fit_batch(W.detach().flatten(2).permute(2, 0, 1))


def row_column_scales(A: Tensor) -> tuple[Tensor, Tensor]:
    """Relative variances r_i c_j of the entries of A (N, M), float64: r (N,) and c (M,), both of mean 1.

    r and c are alternately set to equalise the mean squares of rows and of columns. Entries are capped at three
    standard deviations, so that single entries do not determine a scale. A row or column of zeros gets 0.
    """
    squares = A.square()
    r, c = squares.mean(1), squares.mean(0)
    level = r.mean().clamp(min=1e-300)
    r, c = r / level, c / level
    for _ in range(_SWEEPS):
        r = r * _capped(squares, r, c, level, 1)
        r = r / r.mean().clamp(min=1e-300)
        c = c * _capped(squares, r, c, level, 0)
        mean = c.mean().clamp(min=1e-300)
        c, level = c / mean, level * mean
    return r, c


def _capped(squares: Tensor, r: Tensor, c: Tensor, level: Tensor, axis: int) -> Tensor:
    """The mean along an axis of the squared entries divided by their variances, each at most the cap."""
    expected = torch.outer(r * level, c)
    return torch.where(expected > 0, squares / expected.clamp(min=1e-300), 0.0).clamp(max=_CAP).mean(axis)


def _separable(A: Tensor, scale: float, eps: float, shape: tuple[int, int]) -> tuple[Fit, Array] | None:
    """Return the fit of A (N, M) with its row and column scales divided out, and the eigenvalues of that matrix.

    None if it does not follow the law either. Spikes distort the scales, so the spikes of one estimate are removed
    from the matrix that the next one is based on.
    """
    rest = A
    for _ in range(_ROUNDS):
        spread = torch.outer(*row_column_scales(rest)).sqrt()
        white = torch.where(spread > 0, A / spread.clamp(min=1e-300), 0.0)
        lam = _spectra(white[None])[0]
        fitted, _ = _judge(lam, A.shape[0], scale, eps, shape)
        if fitted.verdict == "mp":
            return fitted, lam
        if not 0 < fitted.n_spikes <= min(A.shape) * _MOST_SPIKES:
            return None
        _, v = torch.linalg.eigh(white.T @ white)
        top = v[:, -fitted.n_spikes :]
        rest = (white - (white @ top) @ top.T) * spread
    return None


def _spectra(A: Tensor) -> Array:
    """Eigenvalues of AᵀA/N, in descending order: A (B, N, M), N >= M -> (B, M)."""
    lam = torch.linalg.eigvalsh(A.transpose(1, 2) @ A).flip(1).clamp_min(0) / A.shape[1]
    return lam.cpu().numpy()


def _judge(lam: Array, N: int, scale: float, eps: float, shape: tuple[int, int]) -> tuple[Fit, bool]:
    """Return the fit of a matrix whose eigenvalues are ``lam`` times ``scale``², and True if it is rank-deficient."""
    lam, M = lam.copy(), lam.size
    c, total = M / N, float(lam.sum())  # ‖A‖_F² / N
    lam[lam < max(N * np.finfo(np.float64).eps * lam[0], eps**2 / 12 * total / M * (1 + math.sqrt(c)) ** 2)] = 0.0
    deficient, small = bool(np.count_nonzero(lam) < MIN_RANK * M), M < MIN_M or c < MIN_C
    if deficient or small:
        sigma2, k = _frobenius(lam, N)
    else:
        k = int((lam > bema(lam, c, N)[1]).sum())
    bulk, bulk_c = lam[k:] * (N / (N - k)), (M - k) / (N - k)
    if not (deficient or small):
        sigma2, _ = bema(bulk, bulk_c, N - k)
    limit = threshold(sigma2, c, N)
    central, p = window(M - k, ALPHA)
    error = float(np.abs(mp_cdf(bulk, bulk_c, sigma2 or 1.0) - p)[central].max())
    verdict: Verdict = "low_confidence" if small else "mp" if error <= gamma(M) else "not_mp"
    verdict = "not_mp" if deficient else verdict
    sigma, edge_tw = scale * math.sqrt(sigma2), scale * math.sqrt(N * limit)
    edge, share = sigma * (math.sqrt(N) + math.sqrt(M)), min(1.0, M * sigma2 / (total or 1.0))
    spikes = scale * np.sqrt(N * lam[lam > limit])
    signal = bbp_inverse(spikes, sigma, (N, M)) if sigma > 0 else spikes
    fitted = Fit(sigma, edge, edge_tw, len(spikes), error, share, verdict, shape)
    return replace(fitted, spikes=tuple(spikes.tolist()), signal=tuple(signal.tolist())), deficient


def gamma(M: int) -> float:
    """Return the largest ``fit_error`` to expect of noise.

    It is O(log M / M), not a Kolmogorov-Smirnov bound: σ̂ is fitted, and eigenvalues are rigid.
    """
    # The 0.999 quantile of M fit_error for iid Gaussian W, simulated from the bidiagonal model of a Wishart matrix:
    # M = 64: 2.67, 96: 2.86, 128: 2.95, 192: 3.18, 384: 3.50, 768: 3.66 (mean over c = 1, 0.9, 0.5, 0.25, 0.03, which
    # hardly matter; 6000 to 250 draws each). Uniform, sign and 2:4-masked entries: the same; Laplace: up to 10 % more.
    return (1.2 + 0.385 * math.log(M)) / M


def _frobenius(lam: Array, N: int) -> tuple[float, int]:
    """σ̂² = ‖bulk‖_F² / ((N − k)(M − k)) and k, the number of eigenvalues above its T₊, iterated until k is stable."""
    k, above = -1, 0
    while above > k:  # ends with k < M: the smallest of a bulk is at most its mean, which is below T₊
        k = above
        sigma2 = float(lam[k:].sum()) * N / ((N - k) * (lam.size - k))
        above = int((lam > threshold(sigma2, lam.size / N, N)).sum())
    return sigma2, k
