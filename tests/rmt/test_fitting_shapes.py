"""Fits of the Marchenko-Pastur law: shapes, scales, small or degenerate matrices, and refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from mpcompile import rmt
from mpcompile.errors import InputError, MPCompileError
from tests.support.spectra import planted


def close(a: rmt.Fit, b: rmt.Fit, scale: float = 1.0) -> None:
    for name in ("sigma", "edge", "edge_tw"):
        assert getattr(a, name) == pytest.approx(scale * getattr(b, name), rel=1e-9, abs=0)
    assert (a.fit_error, a.noise_share) == pytest.approx((b.fit_error, b.noise_share), abs=1e-8)
    assert (a.n_spikes, a.verdict) == (b.n_spikes, b.verdict)


def test_unfolds_transposes_and_leaves_the_weight_alone(randn):
    W = randn(128, 32, 3, 3).requires_grad_()
    before = W.detach().clone()
    f = rmt.fit(W)
    assert f.shape == (128, 288)
    assert f == rmt.fit(W.reshape(128, 288))
    assert torch.equal(W, before) and W.requires_grad and W.grad is None
    transposed = rmt.fit(W.reshape(128, 288).T)
    assert transposed.shape == (288, 128)
    close(transposed, f)
    close(rmt.fit(W[torch.randperm(128)].to(memory_format=torch.channels_last)), f)


@pytest.mark.parametrize("scale", [-3.0, 1e-300, 1e300])
def test_scale(randn, scale):
    W = randn(96, 64).double() + planted(randn, 96, 64, torch.tensor([40.0, 90.0]))
    close(rmt.fit(W * scale), rmt.fit(W), abs(scale))


@pytest.mark.parametrize("shape", [(63, 63), (32, 100), (8, 512), (64, 3000), (2500, 70)])
def test_low_confidence_falls_back_on_the_frobenius_norm(randn, shape):
    W = randn(*shape)
    f = rmt.fit(W)
    (M, N), mean_square = sorted(shape), float((W.double() ** 2).mean())
    assert (f.verdict, f.n_spikes, f.sigma**2) == ("low_confidence", 0, pytest.approx(mean_square, rel=1e-9))
    spiked = rmt.fit(W + planted(randn, *shape, torch.tensor([6.0, 9.0, 12.0]) * math.sqrt(N)))
    assert (spiked.n_spikes, spiked.verdict) == (3, "low_confidence")
    assert spiked.sigma**2 == pytest.approx(1, abs=4 * math.sqrt(2 / ((M - 3) * (N - 3))))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (768, 1), (2, 2), (3, 5), (64, 1, 3, 3)])
def test_narrow(randn, shape):
    f = rmt.fit(randn(*shape))
    assert f.verdict == "low_confidence" and f.n_spikes == 0 and 0 < f.sigma < f.edge <= f.edge_tw
    assert f.noise_share == pytest.approx(1)
    json.dumps(dataclasses.asdict(f), allow_nan=False)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (8, 8), (128, 128), (64, 3, 3, 3)])
def test_zero(shape):
    f = rmt.fit(torch.zeros(shape))
    assert (f.sigma, f.edge, f.edge_tw, f.n_spikes, f.noise_share, f.verdict) == (0, 0, 0, 0, 0, "not_mp")
    json.dumps(dataclasses.asdict(f), allow_nan=False)


@pytest.mark.parametrize("shape", [(8, 8), (768, 256), (100, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_is_one_spike_and_no_noise(shape, dtype):
    f = rmt.fit(torch.full(shape, 0.02, dtype=dtype))
    assert (f.sigma, f.n_spikes, f.noise_share, f.verdict) == (0, 1, 0, "not_mp")
    json.dumps(dataclasses.asdict(f), allow_nan=False)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, math.nan], [2.0, 3.0]]), "1 of 4 entries"),
        (torch.full((3, 2), -math.inf), "6 of 6 entries"),
        (torch.empty(0, 5), "non-empty"),
        (torch.empty(5, 0, 3, 3), "non-empty"),
        (torch.ones(5), r"2-D or 4-D.*\(5,\)"),
        (torch.ones(2, 3, 4), r"2-D or 4-D.*\(2, 3, 4\)"),
        (torch.ones(2, 3, dtype=torch.complex64), "real.*complex64"),
        (torch.ones(2, 3, device="meta"), "holds data.*meta"),
        (np.ones((2, 3)), "tensor.*ndarray"),
    ],
)
def test_refuses_a_weight(weight, message):
    with pytest.raises(InputError, match=message) as error:
        rmt.fit(weight)
    assert isinstance(error.value, MPCompileError)


@pytest.mark.parametrize(("weight", "parts"), [(torch.ones(10, 4), 3), (torch.ones(9, 4), 0), (torch.tensor(1.0), 1)])
def test_refuses_parts(weight, parts):
    with pytest.raises(InputError, match=f"divide into {parts} blocks"):
        rmt.fit_qkv(weight, parts)


def test_taps_and_batches(randn):
    W = randn(80, 70, 3, 1)
    assert rmt.fit_taps(W)[1] == rmt.fit(W[:, :, 1, 0])
    assert rmt.fit_batch(W.flatten(2).permute(2, 0, 1)) == rmt.fit_taps(W)
    for call in (lambda: rmt.fit_taps(randn(4, 4)), lambda: rmt.fit_batch(randn(4, 4))):
        with pytest.raises(InputError):
            call()
