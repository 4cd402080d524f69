"""The map of Baik, Ben Arous and Péché against its inverse and against noise."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies

from mpcompile import rmt
from mpcompile.errors import InputError
from tests.support.spectra import planted


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    strength=strategies.floats(0, 1e3),
    sigma=strategies.floats(1e-3, 10),
    c=strategies.floats(0.01, 1),
    n=strategies.just(500),
)
def test_bbp_map_is_inverted_above_the_edge(strength, sigma, c, n):
    shape = (n, max(1, round(c * n)))
    edge = sigma * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    seen = float(rmt.bbp(strength, sigma, shape))
    assert seen >= edge * (1 - 1e-12)
    back = float(rmt.bbp_inverse(seen, sigma, shape))
    if strength > 1.001 * sigma * (shape[0] * shape[1]) ** 0.25:
        assert back == pytest.approx(strength, rel=1e-4)
    elif strength <= sigma * (shape[0] * shape[1]) ** 0.25:
        assert seen == pytest.approx(edge, rel=1e-9)


def test_noise_moves_spikes_by_the_bbp_map(randn):
    strengths = torch.tensor([30.0, 45.0, 70.0])
    seen = torch.linalg.svdvals(randn(400, 200) + planted(randn, 400, 200, strengths))[:3]
    assert rmt.bbp(strengths, 1.0, (400, 200))[::-1] == pytest.approx(seen.numpy(), abs=3)  # sd about 1
    f = rmt.fit(randn(400, 200) + planted(randn, 400, 200, strengths))
    assert f.n_spikes == 3 and f.signal == pytest.approx([70, 45, 30], rel=0.04) and f.spikes[0] > 70


def test_40_planted_spikes_are_found(randn):
    strengths = torch.linspace(60, 300, 40)
    f = rmt.fit(randn(768, 768) + planted(randn, 768, 768, strengths))
    assert (f.verdict, f.separable, f.n_spikes) == ("mp", False, 40)
    assert f.edge == pytest.approx(2 * math.sqrt(768), rel=0.01)
    assert f.signal == pytest.approx(strengths.flip(0).tolist(), rel=0.05)


def test_refuses_negative_strengths_and_no_noise():
    for call in (lambda: rmt.bbp(-1.0, 1.0, (4, 4)), lambda: rmt.bbp(1.0, 0.0, (4, 4))):
        with pytest.raises(InputError):
            call()
