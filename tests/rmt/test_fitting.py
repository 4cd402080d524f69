"""Fits of the Marchenko-Pastur law to noise, to planted structure, and to matrices that are neither.

Bounds of simulated quantities are about four standard errors at the number of draws used; every draw is seeded.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from mpcompile import rmt
from mpcompile.rmt.fitting import gamma
from tests.support.spectra import fit_error, planted, wishart


def keep_2_of_4(W: torch.Tensor) -> torch.Tensor:
    return (W.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1) >= 2).flatten(1)


@pytest.mark.parametrize(("M", "draws", "mean"), [(64, 1500, 1.42), (192, 600, 1.84), (768, 60, 2.38)])
@pytest.mark.parametrize("ratio", [1, 4])
def test_gamma_is_the_far_quantile_of_noise(M, draws, mean, ratio):
    """Derive the bound again: for any M and c, M fit_error has sd 0.34 and its 0.999 quantile near mean + 4 sd."""
    rng = np.random.default_rng([M, ratio])
    errors = M * np.array([fit_error(wishart(ratio * M, M, rng), ratio * M) for _ in range(draws)])
    assert errors.mean() == pytest.approx(mean, abs=4 * 0.34 / math.sqrt(draws) + 0.02)
    far, error = errors.mean() + 4 * errors.std(), 4 * 4 * 0.34 / math.sqrt(2 * draws)
    assert far == pytest.approx(M * gamma(M), rel=0.04, abs=0.12 + error)
    assert (errors > M * gamma(M)).sum() <= binom.ppf(1 - 1e-4, draws, 1e-3)


@pytest.mark.parametrize("shape", [(192, 192), (64, 1000)])
def test_without_spikes_the_fit_is_bema(randn, shape):
    (M, N), W = sorted(shape), 0.02 * randn(*shape)
    lam = torch.linalg.svdvals(W.double()).numpy() ** 2 / N
    f, (sigma2, threshold) = rmt.fit(W), rmt.bema(lam, M / N, N)
    assert f.n_spikes == 0
    assert (f.sigma**2, f.edge_tw**2 / N) == pytest.approx((sigma2, threshold), rel=1e-9)
    assert f.edge == pytest.approx(f.sigma * (math.sqrt(N) + math.sqrt(M)), rel=1e-12)
    assert f.fit_error == pytest.approx(fit_error(lam, N), abs=1e-9)
    assert f.noise_share == pytest.approx(min(1, N * M * sigma2 / float((W.double() ** 2).sum())), rel=1e-9)


@pytest.mark.parametrize("shape", [(768, 768), (256, 1024), (64, 1000), (320, 192)])
@pytest.mark.parametrize("kind", ["normal", "uniform", "sign"])
def test_accepts_iid_entries(randn, kind, shape):
    W = randn(*shape)
    W = {"normal": W, "uniform": torch.erf(W / 2**0.5) * 3**0.5, "sign": W.sign()}[kind]  # variance 1 each
    f = rmt.fit(0.02 * W)
    M = min(shape)
    assert f.verdict == "mp" and f.shape == shape and f.n_spikes <= 1
    assert f.sigma == pytest.approx(0.02, rel=4 * 0.9 / M)  # sd of σ̂: .85/M at c = 1 (NULL), less below
    assert f.noise_share == pytest.approx(1, abs=8 * 0.9 / M)


@pytest.mark.parametrize(("N", "least", "bias", "sd"), [(768, 60, 1.035, 0.0011), (3072, 90, 1.019, 0.0005)])
def test_finds_planted_spikes(randn, N, least, bias, sd):
    W = randn(N, 768) + planted(randn, N, 768, torch.linspace(least, 300, 40))
    f, lam = rmt.fit(W), torch.linalg.svdvals(W.double()) ** 2 / N
    assert (f.n_spikes, f.verdict) == (40, "mp")
    assert f.sigma == pytest.approx(1, abs=4 * sd)
    sigma2, threshold = rmt.bema(lam, 768 / N, N)
    assert math.sqrt(sigma2) == pytest.approx(bias, abs=4 * sd + 1e-3)  # the bias that the second BEMA removes
    second, _ = rmt.bema(lam[40:] * N / (N - 40), 728 / (N - 40), N - 40)
    assert (f.sigma**2, f.edge_tw**2 / N) == pytest.approx((second, second * threshold / sigma2), rel=1e-9)


def test_counts_spikes_above_the_second_edge(randn):
    W = randn(768, 768) + planted(randn, 768, 768, torch.cat([torch.linspace(60, 300, 40), torch.linspace(33, 37, 6)]))
    f, s = rmt.fit(W), torch.linalg.svdvals(W.double())
    first = math.sqrt(768 * rmt.bema(s**2 / 768, 1.0, 768)[1])
    assert (s > first).sum() < f.n_spikes == (s > f.edge_tw).sum()


def test_rejects_several_noise_levels(randn):
    f = rmt.fit(randn(768, 768) * torch.exp(0.5 * randn(768, 1)), separable=False)
    assert f.verdict == "not_mp" and f.fit_error > 8 * gamma(768)
    assert rmt.fit(randn(768, 768) * torch.exp(0.2 * randn(1, 768)), separable=False).verdict == "not_mp"
    assert rmt.fit(torch.eye(128)).verdict == "not_mp"
    assert rmt.fit(torch.linalg.qr(randn(256, 128))[0]).verdict == "not_mp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rejects_rank_deficiency(randn, dtype):
    f = rmt.fit((randn(768, 600) @ randn(600, 768) / 30).to(dtype))
    assert f.verdict == "not_mp" and f.fit_error > 0.2
    u, s, v = torch.linalg.svd(randn(512, 256).double())
    s[240:] = 0  # rank 240: only the tail that no quantile window sees
    f = rmt.fit(((u[:, :256] * s) @ v).to(dtype))
    assert f.verdict == "not_mp" and f.fit_error < gamma(256)
    assert (
        rmt.fit(randn(512, 512).to(dtype)).verdict == "mp"
    )  # the smallest eigenvalues of a square matrix are not zero


def test_eight_bits_are_not_rank_deficient(randn):
    W = randn(256, 256)
    assert rmt.fit(W.to(torch.float8_e4m3fn)).verdict == "mp"
    f = rmt.fit((W * 32).round().clamp(-128, 127).to(torch.int8))
    assert (f.verdict, f.sigma) == ("mp", pytest.approx(32, rel=4 * 0.9 / 256))


def test_removed_and_kept_parts_of_masked_noise_are_noise(randn):
    W = randn(768, 768)
    R = W * ~keep_2_of_4(W)
    for part, share in ((R, 0.1324), (W - R, 1 - 0.1324)):
        f, energy = rmt.fit(part), float((part**2).mean())
        assert f.verdict == "mp"
        assert energy == pytest.approx(share, rel=4 * 0.0026)  # zeros raise the kurtosis: sd √(κ − 1)/768, κ = 5
        assert f.sigma**2 == pytest.approx(energy, rel=4 * 0.0013 + 0.0025)  # and move the spectrum by O(1/M)
    largest = float(torch.linalg.matrix_norm(R, 2))
    assert math.sqrt(0.1324) * 2 * math.sqrt(768) == pytest.approx(largest, rel=0.01)  # its own width: 4 N^(-2/3) / 8


def test_queries_keys_and_values_are_fitted_separately(randn):
    W = torch.cat([s * randn(192, 192) for s in (1.0, 0.5, 2.0)])
    q, k, v = rmt.fit_qkv(W)
    assert [f.verdict for f in (q, k, v)] == ["mp"] * 3
    assert [f.sigma for f in (q, k, v)] == pytest.approx([1.0, 0.5, 2.0], rel=4 * 0.0044)
    assert k == rmt.fit(W[192:384])
    assert rmt.fit(W, separable=False).verdict == "not_mp"
    assert rmt.fit_qkv(W, parts=1) == (rmt.fit(W),)


def test_scales_of_rows_and_columns_are_divided_out(randn):
    r, c = torch.exp(0.5 * randn(256, 1)), torch.exp(0.4 * randn(1, 192))
    W = randn(256, 192) * (r * c).sqrt()
    f = rmt.fit(W)
    assert f.separable and f.verdict == "mp" and f.n_spikes <= 1
    assert f.plain is not None and f.plain.verdict == "not_mp" and f.plain.n_spikes > 3
    assert f.sigma == pytest.approx(math.sqrt(float(r.mean() * c.mean())), rel=0.06)
    assert rmt.fit(W, separable=False) == f.plain
    rows, columns = rmt.row_column_scales(W.double())
    assert np.corrcoef(rows.log(), r[:, 0].log())[0, 1] > 0.97
    assert np.corrcoef(columns.log(), c[0].log())[0, 1] > 0.97
    assert float(rows.mean()) == pytest.approx(1) and float(columns.mean()) == pytest.approx(1)
    zero = W.clone()
    zero[3], zero[:, 5] = 0, 0
    assert rmt.row_column_scales(zero.double())[0][3] == 0


def test_spikes_are_seen_through_scales(randn):
    W = randn(256, 256) * torch.exp(0.5 * randn(256, 1)) + planted(randn, 256, 256, torch.tensor([150.0, 250.0]))
    f = rmt.fit(W)
    assert f.separable and 2 <= f.n_spikes <= 3 and f.plain.n_spikes > 10  # one matrix in ten has a false spike
    assert f.spikes[1] > 1.5 * f.edge > 1.4 * (f.spikes[2] if f.n_spikes > 2 else 0)


def test_noise_is_not_called_separable(randn):
    found = rmt.fit_batch(torch.stack([randn(128, 96) for _ in range(40)]))
    assert not any(f.separable for f in found) and all(f.verdict == "mp" for f in found)


def test_fits_are_frozen(randn):
    with pytest.raises(dataclasses.FrozenInstanceError):
        rmt.fit(randn(4, 4)).sigma = 1.0
