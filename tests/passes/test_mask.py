"""Masks: exactly N of M, the best of them where that can be enumerated, and every layer accounted for."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mpcompile import Config, transform
from mpcompile.calibration.data import batches
from mpcompile.calibration.moments import collect
from mpcompile.capture.importers import import_model
from mpcompile.errors import InputError, NotEligibleError
from mpcompile.ir.shapes import propagate
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.passes.mask import covariance_mask, magnitude_mask, verify
from tests.support.helpers import convolutional, images, mlp, relative, tiny_vit

patterns = st.integers(1, 32).flatmap(lambda m: st.builds(Pattern, st.integers(1, m), st.just(m)))


@settings(max_examples=100, deadline=None)
@given(patterns, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_magnitude_keeps_exactly_n_and_the_largest(pattern, rows, groups, ties, seed):
    weight = torch.randn(rows, groups * pattern.m, generator=torch.Generator().manual_seed(seed))
    weight = weight.round() if ties else weight
    mask = magnitude_mask(weight, pattern).unflatten(-1, (-1, pattern.m))
    size = weight.abs().unflatten(-1, (-1, pattern.m))
    assert bool((mask.sum(-1) == pattern.n).all())
    kept = size.masked_fill(~mask, torch.inf).amin(-1)
    dropped = size.masked_fill(mask, -torch.inf).amax(-1)
    assert bool((kept >= dropped).all())


def test_ties_go_to_the_lower_index():
    assert magnitude_mask(torch.ones(1, 4), Pattern(2, 4)).tolist() == [[True, True, False, False]]


def correlated(groups: int, m: int, seed: int) -> torch.Tensor:
    """Neighbouring channels correlate by 0.7, scales are lognormal."""
    scale = torch.randn(groups, m, generator=torch.Generator().manual_seed(seed)).mul(0.7).exp()
    distance = (torch.arange(m)[:, None] - torch.arange(m)).abs()
    return scale[:, :, None] * 0.7**distance * scale[:, None, :]


def cost(weight, mask, moments):
    removed = (weight * ~mask).unflatten(-1, (-1, moments.shape[-1]))
    return torch.einsum("ogi,gij,ogj->og", removed, moments, removed).double()


@pytest.mark.parametrize(("n", "m", "excess"), [(2, 4, 0.005), (6, 12, 0.01), (4, 8, 0.01)])
def test_covariance_is_close_to_enumeration(n, m, excess):
    groups, rows = 16, 24
    weight = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(0))
    moments = correlated(groups, m, 1)
    best = torch.full((rows, groups), torch.inf, dtype=torch.double)
    for kept in itertools.combinations(range(m), n):
        mask = torch.zeros(m, dtype=torch.bool)
        mask[list(kept)] = True
        best = torch.minimum(best, cost(weight, mask.repeat(rows, groups), moments))
    found = covariance_mask(weight, moments[None], Pattern(n, m))
    assert bool((found.unflatten(-1, (-1, m)).sum(-1) == n).all())
    ours = cost(weight, found, moments)
    assert bool((ours >= best * (1 - 1e-5)).all())
    assert float(ours.sum() / best.sum()) <= 1 + excess
    magnitude = cost(weight, magnitude_mask(weight, Pattern(n, m)), moments)
    assert float(magnitude.sum() / best.sum()) > 1 + 10 * excess  # the bound would catch a score that ignores C


@pytest.mark.parametrize("kwargs", [{}, {"groups": 2}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}])
def test_conv_moments_equal_those_of_the_unfolded_input(kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, **kwargs), nn.Conv2d(8, 2, 1)).eval()
    data = [images(3, 9, seed=s) for s in (1, 2)]
    imported = import_model(net, images(2, 9))
    propagate(imported.gm, imported.inputs)
    full = collect(imported, batches(imported, data), {"2": 4})["2"]
    found = full.block(4)
    groups = kwargs.get("groups", 1)
    hidden = net[:2](torch.cat(data))
    geometry = {k: v for k, v in kwargs.items() if k != "groups"}
    columns = nn.functional.unfold(hidden, 3, **geometry).transpose(1, 2).reshape(-1, 8, 9)  # rows, channels, taps
    for group, part in enumerate(columns.chunk(groups, 1)):
        h = part.permute(0, 2, 1).reshape(len(part), -1, 4)  # channels fastest
        assert relative(found[group], torch.einsum("rgi,rgj->gij", h, h) / len(h)) < 1e-6
        h = h.flatten(1)
        assert relative(full.xx[group], h.T @ h / len(h)) < 1e-6


def test_linear_moments():
    x = torch.randn(50, 7, 32)
    imported = import_model(mlp(), x[:2])
    propagate(imported.gm, imported.inputs)
    h = x.reshape(-1, 4, 8)
    wanted = torch.einsum("rgi,rgj->gij", h, h) / len(h)
    for budget, kind in ((math.inf, "full"), (32 * 8 * 8, "block"), (32 * 8, "diagonal")):
        found = collect(imported, batches(imported, [x]), {"0": 8}, budget)["0"]
        assert found.kind == kind
        assert relative(found.power[0], x.reshape(-1, 32).square().mean(0)) < 1e-6
        if kind != "diagonal":
            assert relative(found.block(8)[0], wanted) < 1e-6


@pytest.mark.parametrize("pattern", ["2:4", "6:12", "8:16", "12:16", "1:3", "4:4"])
def test_every_layer_is_masked_or_has_a_reason(pattern):
    gm = transform(tiny_vit(embed_dim=48), images(), Config(pattern=pattern, score="magnitude"))
    n, m = Pattern.parse(pattern)
    for name, layer in gm.plan.layers.items():
        module = gm.get_submodule(name)
        if layer.pattern == "dense":
            assert layer.reason and layer.density == 1
            assert not isinstance(module, MaskedLinear)
        else:
            assert layer.pattern == pattern and layer.reason is None and layer.density == n / m
            assert bool((module.mask.unflatten(-1, (-1, m)).sum(-1) == n).all())
            assert bool((module.weight[~module.mask] == 0).all())
    assert gm.plan.layers["patch_embed.proj"].reason == "stem"
    assert gm.plan.layers["head"].reason == "head"
    assert all(count == 0 for count in verify(gm).values())


def test_convnext_keeps_depthwise_and_stem_dense():
    gm = transform(convolutional("convnextv2_atto"), images(size=64), Config(pattern="2:4", score="magnitude"))
    reasons = {layer.reason for layer in gm.plan.layers.values()}
    assert reasons == {None, "stem", "head", "depthwise"}
    assert isinstance(gm.get_submodule("stages.1.downsample.1"), MaskedConv2d)


def test_no_data_falls_back_with_a_note():
    gm = transform(mlp(), torch.randn(2, 32))
    assert any("fell back to magnitude" in note for note in gm.plan.notes)
    assert {layer.notes["mask"]["score"] for layer in gm.plan.layers.values() if layer.pattern != "dense"} == {
        "magnitude"
    }
    with_data = transform(mlp(), torch.randn(2, 32), calibration=[torch.randn(64, 32)])
    assert not any("fell back" in note for note in with_data.plan.notes)
    assert with_data.plan.layers["0"].notes["mask"]["score"] == "obs"


def test_kept_energy_is_the_share_of_the_dense_weight():
    model = mlp()
    gm = transform(model, torch.randn(2, 32), Config(score="magnitude"))
    energy = model[0].weight.square()
    share = float(energy[gm.get_submodule("0").mask].sum() / energy.sum())
    assert gm.plan.layers["0"].notes["mask"]["kept_energy"] == pytest.approx(share, rel=1e-5)
    assert 0.5 < share < 0.95


def test_k_not_divisible_is_dense_with_the_reason():
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    gm = transform(model, torch.randn(2, 10))
    assert gm.plan.layers["0"].reason == "K % 4 (K = 10)"
    assert gm.plan.layers["2"].pattern == "2:4"


def test_error_when_nothing_is_eligible():
    with pytest.raises(NotEligibleError, match="no layer can be masked 2:4"):
        transform(nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 10))


def test_error_when_the_user_named_the_layer():
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(NotEligibleError, match=r"0: this layer cannot be masked 2:4.*K % 4"):
        transform(model, torch.randn(2, 10), Config(include=("0",)))
    with pytest.raises(NotEligibleError, match="is not in the graph"):
        transform(model, torch.randn(2, 10), Config(include=("fc9",)))


def test_include_and_exclude():
    model = tiny_vit()
    gm = transform(model, images(), Config(include=("head",), exclude=("stem", "head", "*.attn.*"), score="magnitude"))
    assert gm.plan.layers["head"].pattern == "2:4"
    assert gm.plan.layers["blocks.0.attn.qkv"].reason == "excluded"
    assert gm.plan.layers["blocks.0.mlp.fc1"].pattern == "2:4"


def test_shared_layer_gets_one_mask():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.fc(self.fc(x).relu()).relu())

    gm = transform(Shared(), torch.randn(2, 16))
    assert gm.plan.masked == ["fc"]
    assert gm.plan.layers["fc"].macs_dense == 2 * 16 * 16


def test_opaque_layers_are_reported():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.attention.register_forward_hook(lambda module, inputs, output: None)
            self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.fc(self.attention(x, x, x, need_weights=False)[0]).relu())

    gm = transform(Net(), torch.randn(2, 5, 16))
    assert gm.plan.layers["attention.out_proj"].reason == "inside MultiheadAttention: it has hooks"
    assert gm.plan.layers["attention.in_proj_weight"].shape == (48, 16)


@pytest.mark.parametrize("kind", ["parametrized", "hooked", "circular", "even 'same'"])
def test_layers_that_cannot_be_rewritten_stay_dense(kind):
    conv: nn.Module = nn.Conv2d(8, 8, 3, padding=1)
    if kind == "parametrized":
        conv = torch.nn.utils.parametrizations.weight_norm(conv)
    elif kind == "hooked":
        conv.register_forward_pre_hook(lambda module, args: None)
    elif kind == "circular":
        conv = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    else:
        conv = nn.Conv2d(8, 8, 2, padding="same")
    net = nn.Sequential(nn.Conv2d(3, 8, 1), conv, nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    x = images(2, 8)
    gm = transform(net, x)
    assert gm.plan.layers["1"].pattern == "dense"
    assert gm.plan.layers["1"].reason not in (None, "stem")
    assert gm.plan.layers["2"].pattern == "2:4"
    dense = transform(net, x, Config(pattern="dense"))
    assert torch.equal(dense(x), net(x))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.randn(4, 31)], "wrong shape"),
        ([], "empty"),
        ([torch.full((4, 32), torch.nan)], "not finite"),
        (["text"], "wrong type"),
        ([{"y": torch.randn(4, 32)}], "wrong keys"),
        (3, "wrong type"),
        ([()], "empty"),
    ],
)
def test_bad_calibration(data, message):
    with pytest.raises(InputError, match=message):
        transform(mlp(), torch.randn(2, 32), calibration=data)


def test_calibration_accepts_every_kind_of_batch():
    x = torch.randn(8, 32)
    masks = []
    for data in ([x], x, [(x, torch.zeros(8))], [{"input": x}], iter([x[:4], x[4:]])):
        gm = transform(mlp(), torch.randn(2, 32), calibration=data)
        masks.append(gm.get_submodule("0").mask)
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])


def test_shapes_may_come_from_calibration():
    assert transform(mlp(), calibration=[(torch.randn(4, 32), torch.zeros(4))]).plan.masked == ["0", "2"]


def test_auto_takes_the_widest_pattern_that_divides_the_inputs():
    model = nn.Sequential(
        nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 8)
    )
    config = Config("auto", exclude=())
    data = torch.randn(64, 32)
    for calibration, score in ((None, "magnitude"), ([data], "obs")):
        gm = transform(model, data[:2], config, calibration)
        rows = gm.plan.layers
        assert [rows[name].pattern for name in "0246"] == ["8:16", "4:8", "2:4", "dense"]
        assert rows["6"].reason == "K % 4 (K = 6)"
        assert {rows[name].notes["mask"]["score"] for name in "024"} == {score}
        assert gm.get_submodule("0").pattern == (8, 16)
        assert not any(verify(gm).values())
        summary = next(record.summary for record in gm.plan.passes if record.name == "mask")
        assert summary.startswith("1 layers 8:16, 1 layers 4:8, 1 layers 2:4, 1 dense")


def test_auto_refuses_where_nothing_divides():
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(NotEligibleError, match=r"no layer can be masked auto; expected .* divide by 4"):
        transform(model, torch.randn(2, 10), Config("auto"))
    with pytest.raises(NotEligibleError, match=r"0: this layer cannot be masked auto.*K % 4"):
        transform(model, torch.randn(2, 10), Config("auto", include=("0",)))
