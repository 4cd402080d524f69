"""Random-matrix analysis of a weight: the Marchenko-Pastur (MP) law, its edge σ₊, the spikes above it, and the fit.

Let W (N, M), N >= M, have iid entries of mean 0 and variance σ²; X = WᵀW/N; c = M/N in (0, 1]. As N grows, the
eigenvalues of X fill [λ₋, λ₊] = σ²(1 ∓ √c)², and the singular values of W end at σ₊ = √(N λ₊) = σ(√N + √M). Singular
values above this edge ("spikes") are structure. Eigenvalues are in the units of squared weights, σ and
edges in those of the weights.
"""

from mpcompile.rmt.edges import bema, gavish_donoho, median_sigma, shuffle_edge
from mpcompile.rmt.fitting import Fit, fit, fit_batch, fit_qkv, fit_taps, row_column_scales
from mpcompile.rmt.law import mp_cdf, mp_density, mp_quantile, tracy_widom_quantile
from mpcompile.rmt.spikes import bbp, bbp_inverse

__all__ = [
    "Fit",
    "bbp",
    "bbp_inverse",
    "bema",
    "fit",
    "fit_batch",
    "fit_qkv",
    "fit_taps",
    "gavish_donoho",
    "median_sigma",
    "mp_cdf",
    "mp_density",
    "mp_quantile",
    "row_column_scales",
    "shuffle_edge",
    "tracy_widom_quantile",
]
