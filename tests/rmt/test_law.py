"""The Marchenko-Pastur law against closed forms and quadrature; the Tracy-Widom law against tables."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from scipy.integrate import quad

from mpcompile import rmt
from mpcompile.errors import InputError


@pytest.mark.parametrize("sigma2", [1.0, 0.3])
@pytest.mark.parametrize("c", [0.01, 0.3, 0.97, 1.0, 1.5, 4.0])
def test_cdf_is_the_integral_of_the_density_and_of_the_atom(c, sigma2):
    low, high = sigma2 * (1 - math.sqrt(c)) ** 2, sigma2 * (1 + math.sqrt(c)) ** 2
    atom = max(0.0, 1 - 1 / c)
    for x in np.linspace(low, high, 8)[1:]:
        mass = quad(lambda y: float(rmt.mp_density(y, c, sigma2)), low, x, epsabs=1e-12, limit=200)[0]
        assert float(rmt.mp_cdf(x, c, sigma2)) == pytest.approx(atom + mass, abs=2e-9)
    moments = [quad(lambda y, k=k: y**k * float(rmt.mp_density(y, c, sigma2)), low, high, limit=200)[0] for k in (1, 2)]
    assert moments == pytest.approx([sigma2, sigma2**2 * (1 + c)], rel=1e-7)


@pytest.mark.parametrize("c", [0.2, 1.0, 3.0])
def test_outside_the_bulk(c):
    low, high = (1 - math.sqrt(c)) ** 2, (1 + math.sqrt(c)) ** 2
    assert rmt.mp_cdf([-np.inf, -1e-9, high, high + 1e-9, 1e300, np.inf], c) == pytest.approx([0, 0, 1, 1, 1, 1], abs=0)
    assert rmt.mp_density([-1.0, high + 1e-9, np.inf], c).tolist() == [0, 0, 0]
    if c != 1:
        assert rmt.mp_cdf([0.0, low], c) == pytest.approx([max(0, 1 - 1 / c)] * 2, abs=1e-15)
        assert rmt.mp_density([0.0, low / 2], c).tolist() == [0, 0]


def test_known_points():
    assert float(rmt.mp_cdf(2.0, 1.0)) == pytest.approx(0.5 + 1 / math.pi, abs=1e-15)  # quarter circle
    assert float(rmt.mp_density(0.0, 1.0)) == math.inf
    assert rmt.mp_quantile([0, 0.2, 1 - 1 / 4.0], 4.0).tolist() == [0, 0, 0]  # in the atom
    assert rmt.mp_quantile(torch.tensor([0.0, 1.0]), 0.25).tolist() == [0.25, 2.25]
    assert rmt.mp_cdf(np.ones((2, 3)), 0.5).shape == (2, 3)
    assert rmt.mp_quantile([], 0.5).shape == (0,)


def test_tiny_ratio_is_a_semicircle():
    y = np.linspace(-1, 1, 9)  # x = 1 + 2√c y
    semicircle = 0.5 + (y * np.sqrt(1 - y**2) + np.arcsin(y)) / math.pi
    assert rmt.mp_cdf(1 + 2e-6 * y, 1e-12) == pytest.approx(semicircle, abs=2e-6)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    p=strategies.lists(strategies.floats(0, 1), min_size=1), c=strategies.floats(1e-4, 1), dual=strategies.booleans()
)
def test_quantile_inverts_the_cdf(p, c, dual):
    c, p = 1 / c if dual else c, sorted(p)
    q = rmt.mp_quantile(p, c)
    assert rmt.mp_cdf(q, c) == pytest.approx(np.maximum(p, 1 - 1 / c), abs=1e-11)
    assert (np.diff(q) >= -1e-7 * q[:-1]).all()  # at an edge F is flat to rounding


def test_tracy_widom():
    for p, value in {0.5: -1.2685, 0.9: 0.4531, 0.95: 0.9794, 0.99: 2.0135}.items():
        assert rmt.tracy_widom_quantile(p) == pytest.approx(value, abs=6e-5)
    assert rmt.tracy_widom_quantile(0.999) == pytest.approx(3.247, abs=6e-4)
    for p, value in {0.9: 0.4501, 0.95: 0.9793, 0.99: 2.0234, 0.999: 3.272}.items():  # quantiles of the law itself
        assert rmt.tracy_widom_quantile(p) == pytest.approx(value, abs=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rmt.mp_density(1.0, c=0.0), "c must be positive"),
        (lambda: rmt.mp_cdf(1.0, c=math.nan), "c must be positive"),
        (lambda: rmt.mp_cdf(1.0, c=0.5, sigma2=-1.0), "sigma2 must be positive"),
        (lambda: rmt.mp_cdf([1.0, math.nan], c=0.5), "x holds NaN"),
        (lambda: rmt.mp_quantile([0.5, 1.01], c=0.5), "0.5 to 1.01"),
        (lambda: rmt.mp_quantile(0.5, c=math.inf), "c must be positive"),
        (lambda: rmt.tracy_widom_quantile(1.0), "between 0 and 1"),
    ],
)
def test_refuses_numbers(call, message):
    with pytest.raises(InputError, match=message):
        call()
