"""Edges of noise against closed forms and exact Wishart spectra.

Bounds of simulated quantities are about four standard errors at the number of draws used; every draw is seeded.
"""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mpcompile import rmt
from mpcompile.errors import InputError
from tests.support.spectra import wishart


def test_threshold_at_c_1_in_closed_form():
    """The wrong ``(1 + √c)**4 / 3`` for ``(1 + √c)**(4/3)`` would give 16/3 instead of 2^(4/3)."""
    N, sigma2 = 768, 1.7
    got, threshold = rmt.bema(sigma2 * rmt.mp_quantile((np.arange(N) + 0.5) / N, 1.0), 1.0, N)
    t = rmt.tracy_widom_quantile(0.9)
    assert got == pytest.approx(sigma2, rel=1e-12)
    assert threshold == pytest.approx(sigma2 * (4 + 2 ** (4 / 3) * t * N ** (-2 / 3)), rel=1e-12)


@pytest.mark.parametrize(("N", "M", "beta"), [(3072, 768, 0.1), (577, 64, 0.01), (200, 199, 0.5)])
def test_threshold_is_johnstones(N, M, beta):
    """Centre and width as in Johnstone (2001), for the largest eigenvalue of WᵀW."""
    centre = (math.sqrt(N) + math.sqrt(M)) ** 2
    width = (math.sqrt(N) + math.sqrt(M)) * (1 / math.sqrt(N) + 1 / math.sqrt(M)) ** (1 / 3)
    sigma2, threshold = rmt.bema(rmt.mp_quantile((np.arange(M) + 0.5) / M, M / N), M / N, N, beta=beta)
    assert sigma2 == pytest.approx(1, rel=1e-12)
    assert N * threshold == pytest.approx(centre + rmt.tracy_widom_quantile(1 - beta) * width, rel=1e-12)


def test_bema_ignores_both_ends_of_the_spectrum():
    lam = rmt.mp_quantile((np.arange(100) + 0.5) / 100, 0.5)
    assert rmt.bema(lam[::-1], 0.5, 200) == rmt.bema(torch.from_numpy(lam), 0.5, 200) == rmt.bema(lam, 0.5, 200)
    outer, inner = lam.copy(), lam.copy()
    outer[[0, 5, 18, -3, -1]] = [0, 0, 0, 50, 1e9]  # order kept: ranks 20 to 80 are untouched
    assert rmt.bema(outer, 0.5, 200) == rmt.bema(lam, 0.5, 200)
    inner[50] *= 1.01
    assert rmt.bema(inner, 0.5, 200)[0] > rmt.bema(lam, 0.5, 200)[0]
    assert rmt.bema(outer, 0.5, 200, alpha=0.0)[0] > 1e6


# N, M, draws here; mean and sd of σ₊ / true and rate of false spikes, from 6000 to 16000 other draws (M = 768: 600)
NULL = [
    (768, 768, 60, 1.0000, 0.0011, 0.098),
    (3072, 768, 60, 1.0000, 0.0005, 0.095),
    (192, 192, 1200, 0.9995, 0.0044, 0.100),
    (64, 64, 2000, 0.9986, 0.0131, 0.092),
    (576, 64, 2000, 0.9999, 0.0040, 0.086),
    (4096, 64, 2000, 1.0000, 0.0015, 0.086),
]


@pytest.mark.parametrize(("N", "M", "draws", "mean", "sd", "rate"), NULL)
def test_edge_and_false_spikes_of_pure_noise(N, M, draws, mean, sd, rate):
    rng = np.random.default_rng([N, M])
    edge, false = [], 0
    for _ in range(draws):
        lam = wishart(N, M, rng)
        sigma2, threshold = rmt.bema(lam, M / N, N)
        edge.append(math.sqrt(sigma2))  # σ₊ / (√N + √M)
        false += lam[0] > threshold
    assert np.mean(edge) == pytest.approx(mean, abs=4 * sd / math.sqrt(draws) + 1e-4)
    assert np.std(edge) == pytest.approx(sd, rel=4 / math.sqrt(2 * draws) + 0.05)
    assert binom.ppf(1e-4, draws, rate) <= false <= binom.ppf(1 - 1e-4, draws, rate)


def test_other_thresholds(randn):
    W = randn(400, 200).double()
    true = math.sqrt(400) + math.sqrt(200)
    lam = (torch.linalg.eigvalsh(W.T @ W) / 400).numpy()
    assert rmt.median_sigma(lam, 0.5) == pytest.approx(1, abs=0.02)
    assert rmt.shuffle_edge(W) == pytest.approx(true, rel=0.02)
    assert rmt.shuffle_edge(W + 5) > 2 * true  # a mean is not noise, in any order
    assert rmt.gavish_donoho(1.0) == pytest.approx(2.858, abs=1e-3)
    for c in (0.1, 0.3, 0.7):
        cubic = 0.56 * c**3 - 0.95 * c**2 + 1.82 * c + 1.43  # Gavish and Donoho's approximation, within 0.02
        assert rmt.gavish_donoho(c) == pytest.approx(cubic, abs=0.02)
        assert rmt.gavish_donoho(c, sigma=1.0, n_rows=100) > 10 * (1 + math.sqrt(c))
    heavy = torch.distributions.StudentT(3.0).sample((256, 256))
    assert rmt.shuffle_edge(heavy) > rmt.fit(heavy).edge_tw  # long tails exceed the edge of Gaussian noise


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmt.bema([], 0.5, 2), "non-empty"),
        (lambda: rmt.bema([[1.0, 2.0]], 0.5, 4), "1-D"),
        (lambda: rmt.bema([1.0, math.inf], 0.5, 4), "finite"),
        (lambda: rmt.bema([1.0, math.nan], 0.5, 4), "NaN"),
        (lambda: rmt.bema([1.0, 2.0], 1.5, 4), "transpose"),
        (lambda: rmt.bema([1.0, 2.0], 0.5, 4, alpha=0.5), "alpha=0.5"),
        (lambda: rmt.bema([1.0, 2.0], 0.5, 4, beta=0.0), "beta=0.0"),
    ],
)
def test_refuses_numbers(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_refuses_other_arguments(randn):
    for call in (lambda: rmt.shuffle_edge(randn(80, 70, 3, 1), 0), lambda: rmt.gavish_donoho(2.0)):
        with pytest.raises(InputError):
            call()
