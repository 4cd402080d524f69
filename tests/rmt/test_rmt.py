"""The Marchenko-Pastur module against closed forms, quadrature, exact Wishart spectra, and planted structure.

Bounds of simulated quantities are about four standard errors at the number of draws used; every draw is seeded.
"""

import dataclasses
import doctest
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from scipy.integrate import quad
from scipy.linalg import eigvalsh_tridiagonal
from scipy.stats import binom

from mpcompile import rmt
from mpcompile.errors import InputError, MPCompileError
from mpcompile.rmt import edges, fitting, law
from mpcompile.rmt import spikes as spikes_module
from mpcompile.rmt.fitting import gamma


def wishart(N: int, M: int, rng: np.random.Generator) -> np.ndarray:
    """Falling eigenvalues of WᵀW/N for a Gaussian (N, M) W, exactly, by its bidiagonal form (math-ph/0206043)."""
    a = np.sqrt(rng.chisquare(N - np.arange(M)))
    b = np.sqrt(rng.chisquare(np.arange(M - 1, 0, -1)))
    diagonal = a**2
    diagonal[1:] += b**2
    return eigvalsh_tridiagonal(diagonal, a[:-1] * b)[::-1] / N


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On a busy machine the threads of an eigenvalue solver wait for one another: 5 s in place of 1 ms were seen."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator)


def spikes(randn, N: int, M: int, values: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values and random singular vectors."""
    u, v = torch.linalg.qr(randn(N, len(values)))[0], torch.linalg.qr(randn(M, len(values)))[0]
    return (u * values) @ v.T


def keep_2_of_4(W: torch.Tensor) -> torch.Tensor:
    return (W.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1) >= 2).flatten(1)


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
    for p, value in {0.9: 0.4501, 0.95: 0.9793, 0.99: 2.0234, 0.999: 3.272}.items():  # of the law itself
        assert rmt.tracy_widom_quantile(p) == pytest.approx(value, abs=0.03)


# BEMA


def test_threshold_at_c_1_in_closed_form():
    """``(1 + √c)**4 / 3`` for ``(1 + √c)**(4/3)`` would give 16/3 in place of 2^(4/3)."""
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


def test_bema_sees_only_the_middle():
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


def fit_error(lam: np.ndarray, N: int) -> float:
    M = lam.size
    k = np.arange(math.ceil(0.2 * M), math.floor(0.8 * M) + 1)
    F = rmt.mp_cdf(lam[k - 1], M / N, rmt.bema(lam, M / N, N)[0])
    return float(np.abs(F - 1 + (k - 0.5) / M).max())


@pytest.mark.parametrize(("M", "draws", "mean"), [(64, 1500, 1.42), (192, 600, 1.84), (768, 60, 2.38)])
@pytest.mark.parametrize("ratio", [1, 4])
def test_gamma_is_the_far_quantile_of_noise(M, draws, mean, ratio):
    """Derives the bound again: M fit_error has sd 0.34 and its 0.999 quantile near mean + 4 sd, for any M and c."""
    rng = np.random.default_rng([M, ratio])
    errors = M * np.array([fit_error(wishart(ratio * M, M, rng), ratio * M) for _ in range(draws)])
    assert errors.mean() == pytest.approx(mean, abs=4 * 0.34 / math.sqrt(draws) + 0.02)
    far, error = errors.mean() + 4 * errors.std(), 4 * 4 * 0.34 / math.sqrt(2 * draws)
    assert far == pytest.approx(M * gamma(M), rel=0.04, abs=0.12 + error)
    assert (errors > M * gamma(M)).sum() <= binom.ppf(1 - 1e-4, draws, 1e-3)


@pytest.mark.parametrize("shape", [(192, 192), (64, 1000)])
def test_fit_is_bema_where_there_are_no_spikes(randn, shape):
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
    W = randn(N, 768) + spikes(randn, N, 768, torch.linspace(least, 300, 40))
    f, lam = rmt.fit(W), torch.linalg.svdvals(W.double()) ** 2 / N
    assert (f.n_spikes, f.verdict) == (40, "mp")
    assert f.sigma == pytest.approx(1, abs=4 * sd)
    sigma2, threshold = rmt.bema(lam, 768 / N, N)
    assert math.sqrt(sigma2) == pytest.approx(bias, abs=4 * sd + 1e-3)  # what the second BEMA is for
    second, _ = rmt.bema(lam[40:] * N / (N - 40), 728 / (N - 40), N - 40)
    assert (f.sigma**2, f.edge_tw**2 / N) == pytest.approx((second, second * threshold / sigma2), rel=1e-9)


def test_counts_spikes_above_the_second_edge(randn):
    W = randn(768, 768) + spikes(randn, 768, 768, torch.cat([torch.linspace(60, 300, 40), torch.linspace(33, 37, 6)]))
    f, s = rmt.fit(W), torch.linalg.svdvals(W.double())
    first = math.sqrt(768 * rmt.bema(s**2 / 768, 1.0, 768)[1])
    assert (s > first).sum() < f.n_spikes == (s > f.edge_tw).sum()


def test_rejects_what_is_not_one_noise_level(randn):
    f = rmt.fit(randn(768, 768) * torch.exp(0.5 * randn(768, 1)), separable=False)
    assert f.verdict == "not_mp" and f.fit_error > 8 * gamma(768)
    assert rmt.fit(randn(768, 768) * torch.exp(0.2 * randn(1, 768)), separable=False).verdict == "not_mp"
    assert rmt.fit(torch.eye(128)).verdict == "not_mp"
    assert rmt.fit(torch.linalg.qr(randn(256, 128))[0]).verdict == "not_mp"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rejects_a_lack_of_rank(randn, dtype):
    f = rmt.fit((randn(768, 600) @ randn(600, 768) / 30).to(dtype))
    assert f.verdict == "not_mp" and f.fit_error > 0.2
    u, s, v = torch.linalg.svd(randn(512, 256).double())
    s[240:] = 0  # rank 240: only the tail that no quantile window sees
    f = rmt.fit(((u[:, :256] * s) @ v).to(dtype))
    assert f.verdict == "not_mp" and f.fit_error < gamma(256)
    assert rmt.fit(randn(512, 512).to(dtype)).verdict == "mp"  # the smallest eigenvalues of a square matrix aren't zero


def test_eight_bits_are_no_lack_of_rank(randn):
    W = randn(256, 256)
    assert rmt.fit(W.to(torch.float8_e4m3fn)).verdict == "mp"
    f = rmt.fit((W * 32).round().clamp(-128, 127).to(torch.int8))
    assert (f.verdict, f.sigma) == ("mp", pytest.approx(32, rel=4 * 0.9 / 256))


def test_what_a_2_of_4_mask_removes_is_noise_of_its_own(randn):
    W = randn(768, 768)
    R = W * ~keep_2_of_4(W)
    for part, share in ((R, 0.1324), (W - R, 1 - 0.1324)):
        f, energy = rmt.fit(part), float((part**2).mean())
        assert f.verdict == "mp"
        assert energy == pytest.approx(share, rel=4 * 0.0026)  # zeros raise the kurtosis: sd √(κ − 1)/768, κ = 5
        assert f.sigma**2 == pytest.approx(energy, rel=4 * 0.0013 + 0.0025)  # and move the spectrum by O(1/M)
    largest = float(torch.linalg.matrix_norm(R, 2))
    assert math.sqrt(0.1324) * 2 * math.sqrt(768) == pytest.approx(largest, rel=0.01)  # its own width: 4 N^(-2/3) / 8


def test_queries_keys_and_values_apart(randn):
    W = torch.cat([s * randn(192, 192) for s in (1.0, 0.5, 2.0)])
    q, k, v = rmt.fit_qkv(W)
    assert [f.verdict for f in (q, k, v)] == ["mp"] * 3
    assert [f.sigma for f in (q, k, v)] == pytest.approx([1.0, 0.5, 2.0], rel=4 * 0.0044)
    assert k == rmt.fit(W[192:384])
    assert rmt.fit(W, separable=False).verdict == "not_mp"
    assert rmt.fit_qkv(W, parts=1) == (rmt.fit(W),)


# Shapes, scales, and small or degenerate matrices


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
    W = randn(96, 64).double() + spikes(randn, 96, 64, torch.tensor([40.0, 90.0]))
    close(rmt.fit(W * scale), rmt.fit(W), abs(scale))


@pytest.mark.parametrize("shape", [(63, 63), (32, 100), (8, 512), (64, 3000), (2500, 70)])
def test_low_confidence_falls_back_on_the_frobenius_norm(randn, shape):
    W = randn(*shape)
    f = rmt.fit(W)
    (M, N), mean_square = sorted(shape), float((W.double() ** 2).mean())
    assert (f.verdict, f.n_spikes, f.sigma**2) == ("low_confidence", 0, pytest.approx(mean_square, rel=1e-9))
    spiked = rmt.fit(W + spikes(randn, *shape, torch.tensor([6.0, 9.0, 12.0]) * math.sqrt(N)))
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
    ("weight", "says"),
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
def test_refuses_a_weight(weight, says):
    with pytest.raises(InputError, match=says) as error:
        rmt.fit(weight)
    assert isinstance(error.value, MPCompileError)


@pytest.mark.parametrize(("weight", "parts"), [(torch.ones(10, 4), 3), (torch.ones(9, 4), 0), (torch.tensor(1.0), 1)])
def test_refuses_parts(weight, parts):
    with pytest.raises(InputError, match=f"divide into {parts} blocks"):
        rmt.fit_qkv(weight, parts)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rmt.mp_density(1.0, c=0.0), "c must be positive"),
        (lambda: rmt.mp_cdf(1.0, c=math.nan), "c must be positive"),
        (lambda: rmt.mp_cdf(1.0, c=0.5, sigma2=-1.0), "sigma2 must be positive"),
        (lambda: rmt.mp_cdf([1.0, math.nan], c=0.5), "x holds NaN"),
        (lambda: rmt.mp_quantile([0.5, 1.01], c=0.5), "0.5 to 1.01"),
        (lambda: rmt.mp_quantile(0.5, c=math.inf), "c must be positive"),
        (lambda: rmt.tracy_widom_quantile(1.0), "between 0 and 1"),
        (lambda: rmt.bema([], 0.5, 2), "non-empty"),
        (lambda: rmt.bema([[1.0, 2.0]], 0.5, 4), "1-D"),
        (lambda: rmt.bema([1.0, math.inf], 0.5, 4), "finite"),
        (lambda: rmt.bema([1.0, math.nan], 0.5, 4), "NaN"),
        (lambda: rmt.bema([1.0, 2.0], 1.5, 4), "transpose"),
        (lambda: rmt.bema([1.0, 2.0], 0.5, 4, alpha=0.5), "alpha=0.5"),
        (lambda: rmt.bema([1.0, 2.0], 0.5, 4, beta=0.0), "beta=0.0"),
    ],
)
def test_refuses_numbers(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_fit_is_frozen_and_the_examples_are_true(randn):
    with pytest.raises(dataclasses.FrozenInstanceError):
        rmt.fit(randn(4, 4)).sigma = 1.0
    for module in (law, edges, spikes_module, fitting):
        results = doctest.testmod(module)
        assert (results.failed, results.attempted > 0) == (0, True)


# Other thresholds, the BBP map, and variances of rows and columns


def test_thresholds_that_know_less(randn):
    W = randn(400, 200).double()
    true = math.sqrt(400) + math.sqrt(200)
    lam = (torch.linalg.eigvalsh(W.T @ W) / 400).numpy()
    assert rmt.median_sigma(lam, 0.5) == pytest.approx(1, abs=0.02)
    assert rmt.shuffle_edge(W) == pytest.approx(true, rel=0.02)
    assert rmt.shuffle_edge(W + 5) > 2 * true  # a mean is no noise, whatever the order
    assert rmt.gavish_donoho(1.0) == pytest.approx(2.858, abs=1e-3)
    for c in (0.1, 0.3, 0.7):
        cubic = 0.56 * c**3 - 0.95 * c**2 + 1.82 * c + 1.43  # Gavish and Donoho's own, good to 0.02
        assert rmt.gavish_donoho(c) == pytest.approx(cubic, abs=0.02)
        assert rmt.gavish_donoho(c, sigma=1.0, n_rows=100) > 10 * (1 + math.sqrt(c))
    heavy = torch.distributions.StudentT(3.0).sample((256, 256))
    assert rmt.shuffle_edge(heavy) > rmt.fit(heavy).edge_tw  # long tails pass the edge of Gaussian noise


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


def test_bbp_map_is_what_noise_does(randn):
    planted = torch.tensor([30.0, 45.0, 70.0])
    seen = torch.linalg.svdvals(randn(400, 200) + spikes(randn, 400, 200, planted))[:3]
    assert rmt.bbp(planted, 1.0, (400, 200))[::-1] == pytest.approx(seen.numpy(), abs=3)  # sd about 1
    f = rmt.fit(randn(400, 200) + spikes(randn, 400, 200, planted))
    assert f.n_spikes == 3 and f.signal == pytest.approx([70, 45, 30], rel=0.04) and f.spikes[0] > 70


def test_40_planted_spikes_are_found(randn):
    planted = torch.linspace(60, 300, 40)
    f = rmt.fit(randn(768, 768) + spikes(randn, 768, 768, planted))
    assert (f.verdict, f.separable, f.n_spikes) == ("mp", False, 40)
    assert f.edge == pytest.approx(2 * math.sqrt(768), rel=0.01)
    assert f.signal == pytest.approx(planted.flip(0).tolist(), rel=0.05)


def test_scales_of_rows_and_columns_are_taken_out(randn):
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
    W = randn(256, 256) * torch.exp(0.5 * randn(256, 1)) + spikes(randn, 256, 256, torch.tensor([150.0, 250.0]))
    f = rmt.fit(W)
    assert f.separable and 2 <= f.n_spikes <= 3 and f.plain.n_spikes > 10  # one in ten has a false one
    assert f.spikes[1] > 1.5 * f.edge > 1.4 * (f.spikes[2] if f.n_spikes > 2 else 0)


def test_noise_is_not_called_separable(randn):
    found = rmt.fit_batch(torch.stack([randn(128, 96) for _ in range(40)]))
    assert not any(f.separable for f in found) and all(f.verdict == "mp" for f in found)


def test_taps_and_batches(randn):
    W = randn(80, 70, 3, 1)
    assert rmt.fit_taps(W)[1] == rmt.fit(W[:, :, 1, 0])
    assert rmt.fit_batch(W.flatten(2).permute(2, 0, 1)) == rmt.fit_taps(W)
    for call in (lambda: rmt.fit_taps(randn(4, 4)), lambda: rmt.fit_batch(randn(4, 4)), lambda: rmt.shuffle_edge(W, 0)):
        with pytest.raises(InputError):
            call()
    for call in (lambda: rmt.bbp(-1.0, 1.0, (4, 4)), lambda: rmt.bbp(1.0, 0.0, (4, 4)), lambda: rmt.gavish_donoho(2.0)):
        with pytest.raises(InputError):
            call()
