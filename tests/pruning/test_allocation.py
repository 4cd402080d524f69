"""Layer budgets: the knapsack against enumeration, damages against the losses they predict, the pass on real graphs."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from torch import nn

from mpcompile import Config, MPCompileError, Pipeline, Plan, backend, transform
from mpcompile.calibration import sensitivity
from mpcompile.calibration.moments import FULL, Moments
from mpcompile.capture.importers import import_model
from mpcompile.errors import ConfigError, InputError, NotEligibleError
from mpcompile.ir.view import layers
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.allocate import Allocate, decide
from mpcompile.passes.analyze import Analyze
from mpcompile.passes.mask import Mask, verify
from mpcompile.pipeline import run_pipeline
from mpcompile.pruning import damage, knapsack
from mpcompile.pruning.scores import magnitude_mask
from tests.support.helpers import capture, convolutional, images, mlp, tiny_vit

# The knapsack


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    options=strategies.lists(
        strategies.lists(
            strategies.tuples(strategies.floats(0, 10), strategies.integers(0, 40)), min_size=1, max_size=4
        ),
        min_size=1,
        max_size=5,
    ),
    share=strategies.floats(0, 1),
)
def test_no_choice_that_meets_the_target_costs_less(options, share):
    costs, saved = [[c for c, _ in row] for row in options], [[s for _, s in row] for row in options]
    target = share * knapsack.reachable(saved)[1]
    chosen, price = knapsack.solve(costs, saved, target)
    total = lambda table, choice: sum(row[i] for row, i in zip(table, choice, strict=True))  # noqa: E731
    meeting = [c for c in itertools.product(*(range(len(r)) for r in costs)) if total(saved, c) >= target * (1 - 1e-9)]
    assert total(saved, chosen) >= target * (1 - 1e-6)
    assert total(costs, chosen) <= min(total(costs, c) for c in meeting) + 1e-6
    assert price >= 0


@pytest.mark.parametrize("spread", [0.0, 1e-6, 0.5])
def test_156_layers_with_6_patterns_take_a_second(spread):
    rng = np.random.default_rng(0)
    density = np.array([1, 0.75, 0.625, 0.5, 0.375, 0.25])
    loss = np.array([0, 0.0135, 0.0391, 0.0876, 0.16, 0.27])
    size = np.array([3, 1, 4, 4] * 39) * rng.choice([1.0, 2.0, 4.0], 156)
    costs, saved = [loss * rng.lognormal(0, spread) for _ in size], [s * (1 - density) for s in size]
    start = time.thread_time()
    chosen, _ = knapsack.solve(costs, saved, 0.5 * size.sum())
    assert time.thread_time() - start < 3  # 1 s is measured by bench.law.analysis; a test must hold on a busy machine
    got = sum(s[i] for s, i in zip(saved, chosen, strict=True)) / size.sum()
    assert 0.5 * (1 - 1e-6) <= got < 0.502
    even = knapsack.even_mix([density] * 156, saved, 0.5 * size.sum())
    assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= sum(c[i] for c, i in zip(costs, even, strict=True))


def test_the_even_mix_is_spread_over_the_depth():
    density, saved = [[1.0, 0.5]] * 12, [[0.0, 1.0]] * 12
    assert knapsack.even_mix(density, saved, 4) == [0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert knapsack.even_mix(density, saved, 12) == [1] * 12
    assert knapsack.even_mix(density, saved, 0) == [0] * 12
    assert sum(knapsack.even_mix(density, saved, 4.2)) == 5  # never below the target


@pytest.mark.parametrize(
    ("costs", "saved", "target", "error", "message"),
    [
        ([[0.0, 1.0]], [[0, 5]], 6, NotEligibleError, "0 to 5"),
        ([[0.0, float("nan")]], [[0, 5]], 1, InputError, "not finite"),
        ([[]], [[]], 1, InputError, "at least one option"),
        ([[1.0]], [], 1, InputError, "at least one option"),
    ],
)
def test_refusals_of_the_knapsack(costs, saved, target, error, message):
    with pytest.raises(error, match=message):
        knapsack.solve(costs, saved, target)


# Damages


@pytest.mark.parametrize(
    ("n", "m", "rho"), [(1, 4, 0.3825), (3, 4, 0.0302), (6, 12, 0.0930), (8, 16, 0.0876), (12, 16, 0.0135)]
)
def test_lost_energy_is_what_magnitude_masks_of_gaussian_weights_lose(n, m, rho):
    assert damage.lost_energy(Pattern(n, m)) == pytest.approx(rho, abs=2e-4)
    w = torch.randn(512, 960 // m * m, generator=torch.Generator().manual_seed(0))
    removed = damage.removed_energy(w, [Pattern(n, m)])[0]
    assert removed == pytest.approx(float((w * ~magnitude_mask(w, Pattern(n, m))).square().sum()), rel=1e-6)
    assert removed / float(w.square().sum()) == pytest.approx(rho, rel=0.03)


def test_the_energy_of_outputs_is_the_fisher_information():
    """The Fisher information of a linear softmax model is E[diag(p) - p p'] in closed form."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 5)), torch.randn(6000, 12)
    imported = import_model(model, x[:8])
    uses = {layer.name: [layer] for layer in layers(imported.gm)}
    found = sensitivity.output_energy(imported, uses, list([part] for part in x.split(1000)), size=1000)
    p = model(x).softmax(-1).detach()
    assert found["0"] == pytest.approx((p * (1 - p)).mean(0).double(), rel=0.1)


def test_calibrated_damage_is_the_loss_that_it_predicts():
    """A small change of one layer: ½ Σ G d'Cd against the KL divergence of the outputs."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 6)), torch.randn(4000, 32)
    imported = import_model(model, x[:8])
    uses = {layer.name: [layer] for layer in layers(imported.gm)}
    energy = sensitivity.output_energy(imported, uses, [[x]], size=4000)["0"]
    moments = Moments(4000, FULL, (x.T @ x / 4000).double()[None], x.mean(0)[None].double())
    predicted = damage.calibrated(model[0].weight, moments, [Pattern(15, 16), Pattern(8, 16)], energy)
    pruned = import_model(model, x[:8])
    for pattern, value in zip([Pattern(15, 16), Pattern(8, 16)], predicted, strict=True):
        new = damage.projected(model[0].weight, moments, pattern)
        assert int(((new != 0).unflatten(1, (-1, 16)).sum(-1) > pattern.n).sum()) == 0
        pruned.gm.get_submodule("0").weight.data.copy_(new)
        assert sensitivity.divergence(imported.gm, pruned.gm, [[x]]) == pytest.approx(value, rel=0.35)
    assert sensitivity.divergence(imported.gm, imported.gm, [[x]]) == 0


def test_structure_is_not_removed_as_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(256, 256, generator=generator)
    fit = {"verdict": "mp", "edge": 32.0, "spikes": 0}
    menu = [Pattern(12, 16), Pattern(2, 4), Pattern(1, 4)]
    assert damage.inadmissible(noise, fit, menu) == {}
    u, v = torch.ones(256, 1) / 16, torch.ones(1, 256) / 16
    hidden = 0.3 * noise + 30 * u @ v  # many small entries that magnitude removes, and that add up
    assert Pattern(1, 4) in damage.inadmissible(hidden, {"verdict": "mp", "edge": 9.6, "spikes": 1}, menu)
    assert damage.inadmissible(hidden, {"verdict": "not_mp", "edge": 9.6, "spikes": 1}, menu) == {}


# The pass


def data(batch=8, size=32):
    return [images(batch, size, seed=s) for s in range(4)]


@pytest.mark.parametrize("kind", [None, "mp", "magnitude", "seb", "uniform"])
def test_without_data_every_damage_meets_the_target_exactly_where_it_can(kind):
    steps = [Analyze(), Allocate(kind), Mask()]
    gm = transform(tiny_vit(), images(), Config(mac_reduction=0.3), pipeline=Pipeline(steps))
    record = next(r for r in gm.plan.passes if r.name == "allocate")
    assert record.decision["damage"] == (kind or "mp") and record.decision["held_out"] is None
    assert gm.plan.macs.reduction >= 0.3 - 1e-6
    assert gm.plan.macs.reduction == pytest.approx(record.decision["saved"], abs=1e-4)
    assert not any(verify(gm).values())
    for name, layer in gm.plan.layers.items():
        if name in record.decision["layers"]:
            assert layer.notes["allocate"]["why"] and layer.notes["allocate"]["pattern"] == layer.pattern
    assert {"patch_embed.proj", "head"}.isdisjoint(gm.plan.masked)
    assert Plan.from_json(gm.plan.to_json()) == gm.plan


def test_with_data_choices_are_compared_on_held_out_samples():
    gm = transform(tiny_vit(), images(), Config(mac_reduction=0.3, permute=False), data())
    record = next(r for r in gm.plan.passes if r.name == "allocate")
    held_out = record.decision["held_out"]
    assert held_out["samples"] == 8 and set(held_out["tried"]) == {"calibrated", "mp"}
    assert record.decision["damage"] == min(held_out["tried"], key=held_out["tried"].__getitem__)
    assert held_out["allocation"] == min(held_out["tried"].values())
    better = min(("allocation", "uniform"), key=held_out.__getitem__)
    assert record.decision["kept"] == better and better in record.summary
    assert min(held_out["allocation"], held_out["uniform"]) > 0
    assert not any(verify(gm).values()) and gm.plan.macs.reduction >= 0.3 - 1e-6


def test_a_worse_allocation_is_dropped_for_the_uniform_pattern(monkeypatch):
    losses = iter([3.0, 2.0, 1.0])  # losses of the two allocations, and of uniform
    monkeypatch.setattr(decide, "held_out_loss", lambda *_: next(losses))
    gm = transform(tiny_vit(), images(), Config(mac_reduction=0.3, permute=False, restore=False), data(2))
    record = next(r for r in gm.plan.passes if r.name == "allocate")
    assert record.decision["kept"] == "uniform" and "uniform kept" in record.summary
    assert record.decision["damage"] == "mp" and "calibrated 3" in record.summary
    assert "better than allocation" in gm.plan.layers["blocks.0.mlp.fc1"].notes["allocate"]["why"]


def test_dense_or_2_of_4_is_a_plan_for_hardware():
    gm = transform(tiny_vit(), images(), Config(mac_reduction=0.2, patterns=("2:4", "dense")))
    found = {layer.pattern for layer in gm.plan.layers.values()}
    assert found == {"2:4", "dense"} and gm.plan.macs.reduction >= 0.2 - 1e-6
    assert any(layer.reason == "allocated dense" for layer in gm.plan.layers.values())


@pytest.mark.parametrize("name", ["resnet10t", "convnextv2_atto"])
def test_convolutional_models(name):
    model, x = convolutional(name), images(2, 64)
    gm = transform(model, x, Config(mac_reduction=0.35))
    assert gm.plan.macs.reduction >= 0.35 - 1e-6 and not any(verify(gm).values())
    assert len({gm.plan.layers[n].pattern for n in gm.plan.masked}) > 1
    assert not any(layer.reason is None and layer.pattern == "dense" for layer in gm.plan.layers.values())


def test_batch_norms_and_convolutions_are_compared_with_data(monkeypatch):
    sparsest = lambda costs, saved, target: ([len(row) - 1 for row in costs], 1.0)  # noqa: E731
    monkeypatch.setattr(knapsack, "solve", sparsest)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).train()  # fmt: skip
    for _ in range(60):
        model(torch.cat(data(size=16)))  # statistics of its own
    model.eval()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    gm = transform(model, images(2, 16), Config(mac_reduction=0.3, permute=False), data(size=16))
    held_out = next(r for r in gm.plan.passes if r.name == "allocate").decision["held_out"]
    assert held_out["samples"] == 8 and held_out["allocation"] > held_out["uniform"] > 0
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert gm.plan.macs.reduction >= 0.3 - 1e-6


def test_layers_that_share_a_weight_share_its_pattern():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))))

    gm = transform(Twice().eval(), torch.randn(2, 32), Config(mac_reduction=0.4))
    assert gm.plan.layers["a"].pattern == gm.plan.layers["b"].pattern != "dense"


def test_bytes_are_another_target():
    steps = [Allocate(bytes_reduction=0.3), Mask()]
    gm = transform(tiny_vit(), images(), Config(), pipeline=Pipeline(steps))
    decision = gm.plan.passes[0].decision
    assert decision["unit"] == "bytes" and decision["saved"] >= 0.3 - 1e-6 and gm.plan.masked


@pytest.mark.usefixtures("no_inductor")
def test_graphs_of_one_model_share_one_allocation():
    options = {"mac_reduction": 0.3}
    fast = torch.compile(tiny_vit(), backend=backend.mpsparse, options=options, dynamic=False)
    with torch.no_grad():
        assert (fast(images(1)).shape[0], fast(images(2)).shape[0]) == (1, 2)
    plans = [g.plan for g in backend.compiled_graphs() if g.plan.config.get("mac_reduction") == 0.3]
    assert len(plans) == 2
    assert len({tuple((n, p.layers[n].pattern) for n in sorted(p.layers)) for p in plans}) == 1
    assert any("patterns of another graph" in r.summary for p in plans for r in p.passes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mac_reduction": 1.5}, "not a share"),
        ({"mac_reduction": 0.5, "pattern": "dense"}, "masks nothing"),
        ({"patterns": ("2:4",)}, "is only for mac_reduction"),
        ({"mac_reduction": 0.5, "patterns": ("dense",)}, "only dense layers"),
        ({"mac_reduction": 0.5, "patterns": ("5:4",)}, "1 <= N <= M"),
        ({"mac_reduction": 1}, "wrong type"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_options(options)


def test_an_infeasible_target_reports_the_reachable_range():
    with pytest.raises(
        NotEligibleError, match=r"MACs cannot be reduced by 90.00%; expected 0.00% to \d+\.\d+%, with dense"
    ):
        transform(tiny_vit(), images(), Config(mac_reduction=0.9))
    with pytest.raises(NotEligibleError, match=r"expected \d\d\.\d+% to \d\d\.\d+%, with 8:16 on 8 layers"):
        transform(tiny_vit(), images(), Config(mac_reduction=0.1, patterns=("8:16",)))
    with pytest.raises(NotEligibleError, match="no layer can be masked"):
        transform(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(2, 6), Config(mac_reduction=0.1))


def test_refusals_of_the_pass():
    with pytest.raises(ConfigError, match="no such damage"):
        Allocate("guess")
    with pytest.raises(ConfigError, match="not a share"):
        Allocate(bytes_reduction=2.0)
    with pytest.raises(MPCompileError, match="needs calibration data"):
        transform(
            mlp(), torch.randn(2, 32), Config(mac_reduction=0.2), pipeline=Pipeline([Allocate("calibrated"), Mask()])
        )
    with pytest.raises(ConfigError, match="needs the pass Allocate"):
        transform(mlp(), torch.randn(2, 32), Config(mac_reduction=0.2), pipeline=Pipeline([Mask()]))
    with pytest.raises(ConfigError, match="two targets"):
        steps = [Allocate(bytes_reduction=0.2), Mask()]
        transform(mlp(), torch.randn(2, 32), Config(mac_reduction=0.2), pipeline=Pipeline(steps))


def test_a_dynamo_graph_keeps_its_weights_while_choices_are_compared():
    model = tiny_vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    imported = capture(model, images(8))
    gm = run_pipeline(imported, Config(mac_reduction=0.3, permute=False), Pipeline(), calibration=data(), owned=False)
    assert gm.plan.passes[1].decision["held_out"]["samples"] == 8
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
