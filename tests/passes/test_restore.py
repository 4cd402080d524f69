"""Scores, refits and the streamed calibration: optimality, guards, determinism, and refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpcompile import Config, Pipeline, transform
from mpcompile.calibration.moments import Moments
from mpcompile.calibration.stream import Stream
from mpcompile.config import SCORES
from mpcompile.data.labels import draw
from mpcompile.errors import InputError
from mpcompile.kernels.nm_format import Pattern, to_rows
from mpcompile.passes.mask import Mask, verify
from mpcompile.pruning import scores
from mpcompile.pruning.project import choose, project
from mpcompile.pruning.refit import error, exchange_sweep, least_squares, refit
from tests.support.helpers import images, mlp, relative, tiny_vit


def problem(rows: int = 12, k: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, correlated inputs and their second moments."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * 0.3 + torch.eye(k)
    x = torch.randn(500, k, generator=generator) @ mix
    return torch.randn(rows, k, generator=generator), x, x.T @ x / len(x)


SCORE, KIND = st.sampled_from(SCORES), st.sampled_from(["full", "block", "diagonal"])
patterns = st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(4, 8), Pattern(6, 12), Pattern(8, 16), Pattern(3, 3)])


@settings(max_examples=25, deadline=None)
@given(patterns, st.integers(1, 5), st.sampled_from(["wanda", "covariance", "sweep", "obs"]), st.integers(0, 99))
def test_every_score_keeps_exactly_n(pattern, rows, score, seed):
    weight, _, a = problem(rows, seed=seed)
    if score == "wanda":
        kept = scores.wanda_rows(weight, a.diagonal(), pattern)
    elif score == "obs":
        kept = scores.obs_rows(weight, a, pattern)[1]
    else:
        blocks = torch.stack([a[i : i + pattern.m, i : i + pattern.m] for i in range(0, 48, pattern.m)])
        kept = scores.covariance_rows(weight, blocks, pattern)
        if score == "sweep":
            before = error(weight * kept, weight, a)
            kept = scores.sweep_rows(weight, a, kept, pattern)
            assert bool((error(weight * kept, weight, a) <= before * (1 + 1e-5)).all())
    assert bool((kept.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@settings(max_examples=20, deadline=None)
@given(patterns, st.sampled_from([(), (1, 1), (3, 3), (1, 2)]), st.integers(1, 2), SCORE, KIND, st.integers(0, 99))
def test_every_legal_shape_is_masked_exactly(device, pattern, taps, groups, score, kind, seed):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    generator = torch.Generator().manual_seed(seed)
    groups = groups if taps else 1
    weight = torch.randn(2 * groups, 2 * pattern.m, *taps, generator=generator).to(device)
    k = weight[0].numel()
    x = torch.randn(groups, 3 * k, k, generator=generator, dtype=torch.double)
    moments = Moments(3 * k, "full", x.transpose(1, 2) @ x / (3 * k), x.mean(1))
    if kind == "block":
        moments = replace(moments, kind=kind, xx=moments.block(pattern.m))
    elif kind == "diagonal":
        moments = replace(moments, kind=kind, xx=moments.power)
    found = project(weight, moments, pattern, score, True)
    assert found.mask.shape == weight.shape and found.mask.device == weight.device
    counts = to_rows(found.mask).unflatten(-1, (-1, pattern.m)).sum(-1)
    assert bool((counts == pattern.n).all())
    values = weight * found.mask if found.weight is None else found.weight
    assert bool((values[~found.mask] == 0).all()) and bool(torch.isfinite(values).all())


def test_each_rung_costs_less_than_the_one_before():
    weight, _, a = problem(64)
    pattern = Pattern(2, 4)
    blocks = torch.stack([a[i : i + 4, i : i + 4] for i in range(0, 48, 4)])
    ladder = [scores.magnitude_mask(weight, pattern), scores.wanda_rows(weight, a.diagonal(), pattern)]
    ladder.append(scores.covariance_rows(weight, blocks, pattern))
    ladder.append(scores.sweep_rows(weight, a, ladder[-1], pattern))
    costs = [float(error(weight * kept, weight, a).sum()) for kept in ladder]
    values, kept = scores.obs_rows(weight, a, pattern, 1e-4)
    costs.append(float(error(values, weight, a).sum()))
    values, kept = refit(values, weight, a, kept, pattern)
    costs.append(float(error(values, weight, a).sum()))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.7 * costs[3]


def test_covariance_is_close_to_enumeration_at_8_of_16():
    m, spent, least = 16, 0.0, 0.0
    masks = scores.all_masks(Pattern(8, m), torch.device("cpu"))
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.randn(m, generator=generator).mul(0.7).exp()
        c = scale[:, None] * 0.7 ** (torch.arange(m)[:, None] - torch.arange(m)).abs() * scale
        u = torch.randn(30, m, generator=generator)
        removed = u[:, None] * ~masks
        least += float(torch.einsum("rsi,ij,rsj->rs", removed, c, removed).amin(1).sum())
        found = u * ~scores.covariance_rows(u, c[None], Pattern(8, m))
        spent += float((found @ c * found).sum())
    assert 1 - 1e-5 <= spent / least <= 1.02


def test_least_squares_is_the_exact_minimum():
    weight, _, a = problem()
    kept = scores.magnitude_mask(weight, Pattern(2, 4))
    found = least_squares(weight * kept, weight, a, kept, steps=200, tol=1e-12)
    assert bool((found[~kept] == 0).all())
    for row in range(len(weight)):
        k = kept[row]
        exact = torch.linalg.solve(a[k][:, k].double(), (a @ weight[row])[k].double())
        assert relative(found[row][k], exact) < 1e-3


def test_an_exchange_sweep_of_one_group_finds_the_optimum():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    a, weight = x.T @ x / 200, torch.randn(30, 6, generator=generator)
    kept = scores.magnitude_mask(weight, Pattern(3, 6))
    values, _ = exchange_sweep(weight * kept, weight, a, kept, Pattern(3, 6))
    best = torch.full((30,), torch.inf, dtype=torch.double)
    for places in itertools.combinations(range(6), 3):
        mask = torch.zeros(30, 6, dtype=torch.bool)
        mask[:, list(places)] = True
        best = torch.minimum(best, error(least_squares(weight * mask, weight, a, mask, 50), weight, a))
    ours = error(values, weight, a)
    assert bool((ours >= best * (1 - 1e-3) - 1e-6).all())
    assert float(ours.sum() / best.sum()) < 1.1
    assert float(ours.sum()) < float(error(weight * kept, weight, a).sum())


@settings(max_examples=15, deadline=None)
@given(patterns, st.integers(0, 99))
def test_refit_never_makes_a_row_worse(pattern, seed):
    weight, _, a = problem(seed=seed)
    kept = scores.magnitude_mask(weight, pattern)
    values, mask = refit(weight * kept, weight, a, kept, pattern, steps=8)
    assert bool((error(values, weight, a) <= error(weight * kept, weight, a) + 1e-4).all())
    assert bool((mask.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all())
    assert bool((values[~mask] == 0).all())


def test_zero_slots_are_refilled():
    weight, _, a = problem()
    source = weight * scores.magnitude_mask(weight, Pattern(1, 4))
    kept = scores.magnitude_mask(source, Pattern(2, 4))
    values, mask = refit(source * kept, weight, a, kept, Pattern(2, 4))
    assert bool((values[mask] != 0).all())


def test_prior_draws_the_mask_to_its_source():
    weight, _, a = problem(40)
    source = scores.magnitude_mask(torch.randn(40, 48, generator=torch.Generator().manual_seed(9)), Pattern(2, 4))
    blocks = torch.stack([a[i : i + 4, i : i + 4] for i in range(0, 48, 4)])
    agree = []
    for alpha in (0.0, 0.3, 1e6):
        price = scores.prior_price(weight, blocks, source, alpha, 4)
        agree.append(float((scores.covariance_rows(weight, blocks, Pattern(2, 4), price) == source).float().mean()))
    assert agree[0] < agree[1] < agree[2] == 1.0
    gm = transform(
        mlp(),
        torch.randn(64, 32),
        Config(score="covariance", restore=False, permute=False),
        [torch.randn(64, 32)],
        prior={"0": source[:1, :32].repeat(48, 1)},
        prior_weight=1e6,
    )
    assert torch.equal(gm.get_submodule("0").mask, source[:1, :32].repeat(48, 1))


@pytest.mark.parametrize("kind", ["name", "shape"])
def test_a_prior_that_does_not_fit(kind):
    prior = {"nowhere": torch.ones(2, 2).bool()} if kind == "name" else {"0": torch.ones(2, 2).bool()}
    with pytest.raises(InputError, match=r"nowhere|does not fit"):
        transform(mlp(), torch.randn(2, 32), prior=prior)


@pytest.mark.parametrize("calibrate", ["pruned", "pruned_to_dense", "dense"])
@pytest.mark.parametrize("score", ["covariance", "obs"])
def test_restore_brings_the_output_closer(score, calibrate):
    torch.manual_seed(0)
    x = torch.randn(400, 8) @ torch.randn(8, 32) + 0.1 * torch.randn(400, 32)
    model = mlp()
    errors = {}
    for name, options in {
        "magnitude": {"score": "magnitude", "restore": False},
        "score": {"score": score, "restore": False},
        "restore": {"score": score},
    }.items():
        gm = transform(model, x[:2], Config("2:4", permute=False, **options), [x[:200], x[200:]], calibrate=calibrate)
        errors[name] = relative(gm(x), model(x))
        assert not any(verify(gm).values())
    assert errors["restore"] < errors["score"] < errors["magnitude"]
    notes = gm.plan.layers["0"].notes["restore"]
    assert notes["error_refitted"] <= notes["error_masked"]


def test_the_pruned_prefix_is_what_later_layers_see():
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    seen = {}
    for calibrate in ("pruned", "dense"):
        config = Config("1:4", score="wanda", restore=False, permute=False)
        gm = transform(mlp(), x, config, [x], calibrate=calibrate)
        hidden = torch.nn.functional.gelu(gm.get_submodule("0")(x)) if calibrate == "pruned" else mlp()[:2](x)
        power = hidden.detach().square().mean(0)
        expected = scores.wanda_rows(mlp()[2].weight.detach(), power, Pattern(1, 4))
        seen[calibrate] = gm.get_submodule("2").mask
        assert float((seen[calibrate] == expected).float().mean()) > 0.999
    assert not torch.equal(seen["pruned"], seen["dense"])


def test_vit_with_merging_is_calibrated_on_the_merged_graph():
    gm = transform(tiny_vit(), images(8), Config("2:4", tome_r=2, score="obs"), [images(8, seed=s) for s in (1, 2)])
    record = next(r for r in gm.plan.passes if r.name == "restore")
    assert len(record.decision["restored"]) == 8
    assert record.decision["error_refitted"] <= record.decision["error_masked"]
    assert not any(verify(gm).values())


@pytest.mark.parametrize("calibrate", ["pruned_to_dense", "adapted", "pruned", "dense"])
@pytest.mark.parametrize("options", [{}, {"restore": False}, {"restore": False, "score": "magnitude"}], ids=str)
def test_batch_norms_are_re_estimated(calibrate, options):
    torch.manual_seed(0)
    blocks = [
        (nn.Conv2d(c, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=1.0), nn.ReLU()) for c in (3, 16, 16)
    ]
    model = nn.Sequential(*(part for block in blocks for part in block), nn.Flatten(), nn.Linear(16 * 64, 4))
    model.train()(images(64, 8))  # statistics of its own
    model.eval()
    x = images(64, 8, seed=2)
    config = Config("1:4", **{"score": "covariance", "permute": False, **options})
    gm = transform(model, x[:2], config, [x[:32], x[32:]], calibrate=calibrate)
    seen: list[torch.Tensor] = []
    for side in (gm, model):
        side.get_submodule("7").register_forward_hook(lambda module, args, out: seen.extend((args[0], out.clone())))
    with torch.no_grad():
        gm(x), model(x)
    read, ours, _, theirs = (value.transpose(0, 1).flatten(1) for value in seen)
    alone = calibrate != "pruned_to_dense" or options.get("score") == "magnitude"  # without the dense model
    if alone:  # the plain statistics of what the BatchNorm reads
        assert relative(gm.get_submodule("7").running_mean, read.mean(1)) < 1e-3
        assert relative(gm.get_submodule("7").running_var, read.var(1)) < 1e-3
    else:  # its outputs have the dense outputs' statistics
        assert relative(ours.mean(1), theirs.mean(1)) < 1e-3
        assert relative(ours.var(1), theirs.var(1)) < 1e-3
    assert relative(gm.get_submodule("7").running_var, model[7].running_var) > 1e-2
    assert "BatchNorms re-estimated" in next(r for r in gm.plan.passes if r.name == "restore").summary
    unasked = transform(model, x[:2], config, [x], pipeline=Pipeline([Mask()])).get_submodule("7")
    assert torch.equal(unasked.running_var, model[7].running_var)  # nothing requested other statistics


def test_a_constant_before_batch_norm_costs_nothing():
    """Before a BatchNorm, a constant channel is removed first, however large it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval()
    x = torch.randn(64, 4, 4, 4)
    x[:, 1] = 9.0
    config = Config("3:4", score="wanda", permute=False, restore=False, exclude=())
    masks = [transform(model[:end], x[:2], config, [x]).get_submodule("0").mask for end in (1, 2)]
    assert masks[0][:, 1].all() and not masks[1][:, 1].any()


@pytest.mark.parametrize("permute", [False, True])
def test_masks_are_the_same_every_run_and_with_another_thread_count(permute):
    data, config = [images(16, seed=s) for s in range(2)], Config("8:16", score="obs", permute=permute)
    states = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            gm = transform(tiny_vit(depth=1), data[0][:2], config, data)
            states.append(torch.cat([gm.get_submodule(name).mask.flatten() for name in gm.plan.masked]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(states[0], states[1])
    assert float((states[0] != states[2]).double().mean()) <= 1e-5


def test_statistics_on_disk_are_used_again(tmp_path, monkeypatch):
    data, config = [images(4)], Config("2:4", score="obs", permute=False)
    first = transform(tiny_vit(), images(2), config, data, statistics=tmp_path / "moments")
    assert len(list((tmp_path / "moments").glob("*.safetensors"))) == 8
    assert not list((tmp_path / "moments").glob("*.tmp"))
    torn = tmp_path / "moments" / "blocks.1.mlp.fc2.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    gathered = []
    real = Stream.moments
    monkeypatch.setattr(Stream, "moments", lambda self, layer, *a: gathered.append(layer.name) or real(self, layer, *a))
    again = transform(tiny_vit(), images(2), config, data, statistics=tmp_path / "moments")
    assert gathered == ["blocks.1.mlp.fc2"]
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    gathered.clear()
    transform(tiny_vit(), images(2), config, [images(4, seed=5)], statistics=tmp_path / "moments")
    assert len(gathered) == 8


def test_a_small_memory_budget_spills_and_keeps_less():
    data = [images(4, seed=s) for s in range(2)]
    gm = transform(tiny_vit(), images(2), Config("2:4", score="obs", permute=False), data, memory=20000)
    rows = {name: gm.plan.layers[name].notes for name in gm.plan.masked}
    assert {notes["mask"]["score"] for notes in rows.values()} == {"obs", "covariance"}
    assert any("memory budget" in str(notes["restore"].get("skipped")) for notes in rows.values())


@pytest.mark.parametrize("data", ["one sample", "zeros"])
def test_singular_covariances(data):
    x = torch.randn(1, 32) if data == "one sample" else torch.zeros(4, 32)
    gm = transform(mlp(), x, Config("2:4", score="obs"), [x])
    assert bool(torch.isfinite(gm(torch.randn(3, 32))).all())
    assert not any(verify(gm).values())


def test_tied_weights_share_one_mask():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(self.a(x).relu()).relu())

    x = torch.randn(64, 16)
    gm = transform(Tied().eval(), x, Config("2:4", score="obs"), [x])
    assert gm.get_submodule("a").weight is gm.get_submodule("b").weight
    assert torch.equal(gm.get_submodule("a").mask, gm.get_submodule("b").mask)
    assert not any(verify(gm).values())


def test_activations_that_overflow_are_named():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(InputError, match=r"the inputs of this layer .* are not finite"):
        transform(model, torch.ones(2, 8), Config(score="covariance", permute=False), [torch.ones(2, 8)])


def test_without_the_restore_pass_values_stay():
    x = torch.randn(64, 32)
    model = mlp()
    gm = transform(model, x, Config("2:4", score="covariance"), [x], pipeline=Pipeline([Mask()]))
    layer = gm.get_submodule("0")
    assert torch.equal(layer.weight, model[0].weight * layer.mask)


def test_scores_fall_back_where_moments_are_poor():
    weight = torch.randn(4, 8)
    moments = Moments(3, "diagonal", torch.ones(1, 8).double(), torch.zeros(1, 8).double())
    assert choose(weight, moments, Pattern(2, 4), "obs")[2] == "wanda"
    assert choose(weight, None, Pattern(2, 4), "obs")[2] == "magnitude"


def test_draw_is_balanced_shuffled_and_repeatable():
    labels = [0] * 50 + [1] * 30 + [2] * 3
    chosen = draw(labels, 33, seed=1)
    counts = torch.bincount(torch.tensor([labels[i] for i in chosen]))
    assert counts.tolist() == [15, 15, 3] and len(set(chosen)) == 33
    assert chosen == draw(labels, 33, seed=1) != draw(labels, 33, seed=2)
    assert [labels[i] for i in chosen] != sorted(labels[i] for i in chosen)
    with pytest.raises(InputError, match="1 to 83"):
        draw(labels, 84)
