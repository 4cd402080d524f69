"""BatchNorms as modules and as calls of functions: found, re-estimated, gathered and folded alike."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import mpcompile
from mpcompile import Config
from mpcompile.calibration.norms import Sums, batch_norms, gathering, matched
from mpcompile.errors import ConfigError
from mpcompile.layers import ByMode
from tests.support.helpers import Branching, images


def network(kind=nn.Sequential):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(c, 16, 3, padding=1, bias=False) for c in (3, 16, 16)]
    parts = [part for conv in convolutions for part in (conv, nn.BatchNorm2d(16), nn.ReLU(inplace=True))]
    model = kind(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        model.train()(images(64, 8))
    return model.eval()


def masked(kind, **options):
    config = Config(pattern="1:4", permute=False, **options)
    return mpcompile.transform(network(kind), config=config, calibration=[images(32, 8, seed=s) for s in (1, 2)])


def running(gm):
    return {name: tensor for name, tensor in gm.state_dict().items() if "running" in name}


def norm_counts(gm):
    return [record.decision["norm_count"] for record in gm.plan.passes if record.name == "restore"]


@pytest.mark.parametrize("options", [{}, {"restore": False, "score": "magnitude"}], ids=str)
def test_captured_graphs_are_re_estimated_like_traced_ones(options):
    traced, captured = masked(nn.Sequential, **options), masked(Branching, **options)
    assert "export" in str(captured.plan.captured)
    dense, theirs = running(network()), running(captured)
    assert len(theirs) == 6
    for name, value in running(traced).items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(theirs["4.running_var"], dense["4.running_var"], rtol=0.05)
    counts = [count for gm in (traced, captured) for count in norm_counts(gm)]
    assert counts[0] >= 2 and counts[1:] == counts[:1]


def test_captured_graphs_fold_and_leave_no_flag_behind():
    gm = masked(Branching)
    lowered = mpcompile.lower(gm)
    record = next(record for record in lowered.plan.passes if record.name == "fold_norm")
    layers = len(record.decision["folded"])
    assert layers >= 2 and not [why for why in record.decision["left"].values() if "training" in why]
    flags = [n for n in lowered.graph.nodes if n.op == "call_module" and isinstance(module_of(lowered, n), ByMode)]
    assert len(flags) == 3 - layers
    torch.testing.assert_close(lowered(images(4, 8)), gm(images(4, 8)), atol=1e-5, rtol=1e-4)


def module_of(gm, node):
    return gm.get_submodule(str(node.target))


def test_distillation_re_estimates_a_captured_graph():
    model, gm, x = network(Branching), masked(Branching), images(16, 8, seed=7)
    training = mpcompile.Training(epochs=1, lr=1e-9, bn_batches=1)
    mpcompile.distill(gm, model, [(x, torch.zeros(16).long())], training=training, progress=False)
    first = next(norm for norm in batch_norms(gm) if norm.mean == "1.running_mean")
    seen = F.conv2d(x, gm.get_parameter("0.weight"), padding=1)
    torch.testing.assert_close(gm.get_buffer(first.mean), seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gm.get_buffer(first.variance), seen.var((0, 2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [nn.Sequential, Branching])
def test_distillation_with_frozen_statistics(kind):
    """Training computes what evaluation will: the statistics stay, and small batches do not matter."""
    model, gm = network(kind), masked(kind)
    before, weight = copy.deepcopy(running(gm)), gm.get_parameter("1.weight").clone()
    batches = [(images(2, 8, seed=s), torch.zeros(2).long()) for s in range(3)]
    options = {"epochs": 1, "lr": 1e-2, "alpha": 1.0, "progress": False}
    flags = [module.training for module in gm.modules()]
    mpcompile.distill(gm, model, batches, freeze_bn=True, **options)
    for name, value in running(gm).items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)
    assert not torch.equal(gm.get_parameter("1.weight"), weight)
    assert [module.training for module in gm.modules()] == flags
    mpcompile.distill(gm, model, batches, **options)
    assert not torch.allclose(running(gm)["1.running_mean"], before["1.running_mean"], rtol=0.05)


@pytest.mark.parametrize("bn_batches", [0, 1])
def test_distillation_behind_a_reconstruction_keeps_its_statistics(bn_batches):
    """Unless it is asked to replace them."""
    model, batches = network(), [(images(2, 8, seed=s), torch.zeros(2).long()) for s in range(3)]
    length = mpcompile.Reconstruction(views=1, epochs=1)
    gm = mpcompile.transform(model, [images(8, 8)], Config(pattern="1:4"), reconstruction=length)
    before = copy.deepcopy(running(gm))
    mpcompile.distill(gm, model, batches, epochs=1, lr=1e-4, alpha=1.0, bn_batches=bn_batches, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in running(gm).items()) is not bool(bn_batches)


def test_frozen_statistics_cannot_be_re_estimated():
    with pytest.raises(ConfigError, match="bn_batches=0 with freeze_bn=True, found bn_batches=2"):
        mpcompile.Training(freeze_bn=True, bn_batches=2)


def test_gathering_averages_batches_and_restores_the_graph():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.randn(3))
            self.register_buffer("variance", torch.rand(3) + 0.5)

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.variance, eps=1e-3)

    gm = fx.symbolic_trace(Called())
    code, batches = gm.code, [torch.randn(8, 3, 5, 5) for _ in range(3)]
    norms = batch_norms(gm)
    assert [(norm.mean, norm.variance) for norm in norms] == [("mean", "variance")]
    with torch.no_grad(), gathering(gm, norms) as start:
        for place, batch in enumerate(batches):
            start(place)
            torch.testing.assert_close(gm(batch).mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert gm.code == code
    torch.testing.assert_close(gm.mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(gm.variance, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))


def test_statistics_that_something_else_reads_are_left_alone():
    class Shared(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.norm, self.twice = nn.BatchNorm2d(3), twice

        def forward(self, x):
            x = F.batch_norm(x, self.norm.running_mean, self.norm.running_var)
            return F.batch_norm(x, self.norm.running_mean, self.norm.running_var) if self.twice else x

    assert len(batch_norms(fx.symbolic_trace(Shared(False)))) == 1
    assert not batch_norms(fx.symbolic_trace(Shared(True)))
    trained = fx.symbolic_trace(Shared(False))
    node = next(n for n in trained.graph.nodes if n.target is F.batch_norm)
    node.update_kwarg("training", True)
    assert not batch_norms(trained)  # it normalises by batch: nothing reads its statistics


def test_sums_are_mean_and_unbiased_variance():
    (norm,) = batch_norms(fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(4))))
    parts, sums = [torch.randn(n, 4, 3, 3) + 5 for n in (2, 1, 7)], Sums()
    for part in copy.deepcopy(parts):
        sums.add(part)
    values = torch.cat(parts).transpose(0, 1).flatten(1)
    mean, variance = sums.statistics(norm).values()
    torch.testing.assert_close(mean, values.mean(1))
    torch.testing.assert_close(variance, values.var(1))


@given(st.integers(0, 10**6), st.integers(1, 3))
def test_matched_statistics_undo_any_scale_and_shift(seed, parts):
    """Of x * a + b a BatchNorm yields what the dense one yields of x; of x itself its statistics are the dense ones."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(4, 5, 3, 3, generator=generator) * 2 + 1 for _ in range(parts)]
    x = [part.index_fill(1, torch.tensor([4]), 0.5) for part in x]  # a constant channel
    a, b = (torch.rand(1, 5, 1, 1, generator=generator) + 0.5 for _ in range(2))
    running = torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5
    (norm,) = batch_norms(fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(5, eps=1e-3))))
    dense, same, moved = Sums(), Sums(), Sums()
    for part in x:
        dense.add(part), same.add(part), moved.add(part * a + b)
    for value, wanted in zip(matched(norm, same, dense, running).values(), running, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    mean, variance = matched(norm, moved, dense, running).values()
    for part in x:
        ours, theirs = part * a + b, F.batch_norm(part, *running, eps=1e-3)
        torch.testing.assert_close(F.batch_norm(ours, mean, variance, eps=1e-3), theirs, atol=1e-4, rtol=1e-4)
