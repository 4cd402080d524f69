"""Permutation: what may be reordered is found on every family, reordering changes nothing, and masks keep more."""

import pytest
import timm
import torch
from torch import nn

from mpcompile import Config, transform
from mpcompile.capture.importers import import_model
from mpcompile.ir.view import layers
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.channels.axes import analyse
from mpcompile.passes.permute import classes, fold
from mpcompile.pruning.column_order import efficacy, retained, search
from tests.support.helpers import convolutional, images, mlp, tiny_vit


def shuffled(model: nn.Module, x: torch.Tensor) -> tuple[float, list, set]:
    """Shuffle every class of channels that any layer reads: largest relative change, the classes, unknown operators."""
    gm = import_model(model, x).gm.eval()
    analysis = analyse(gm, [x])
    found = classes(analysis, {u.name: u for u in layers(gm)})
    orders = {}
    generator = torch.Generator().manual_seed(0)
    for item in found:
        size = analysis.atoms.size[item.atom]
        owners = 1 if item.owner is None else analysis.atoms.size[item.owner]
        orders[item.atom] = (item.owner, torch.rand(owners, size, generator=generator).argsort(1))
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    with torch.no_grad():
        expected = gm(x)
        fold(gm, analysis, orders)
        assert any(not torch.equal(v, before[k]) for k, v in gm.state_dict().items()) or not found
        return float((gm(x) - expected).abs().max() / expected.abs().max()), found, analysis.unknown


def vit(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, num_classes=10, **kwargs)
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    return model.eval()


FAMILIES = {
    "vit": lambda: (vit("vit_tiny_patch16_224", img_size=64), images(2, 64)),
    "deit-distilled": lambda: (vit("deit_tiny_distilled_patch16_224", img_size=64), images(2, 64)),
    "convnextv2": lambda: (vit_like_convnext(), images(2, 64)),
    "resnet": lambda: (convolutional("resnet26"), images(2, 64)),
    "resnet-d": lambda: (convolutional("resnet26d"), images(2, 64)),
    "resnext": lambda: (convolutional("resnext26ts"), images(2, 64)),
    "mobilenetv3": lambda: (convolutional("mobilenetv3_small_050"), images(2, 64)),
}


def vit_like_convnext() -> nn.Module:
    model = convolutional("convnextv2_atto")
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.05
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_channels_leave_the_network_as_it_was(family):
    model, x = FAMILIES[family]()
    difference, found, unknown = shuffled(model, x)
    assert not unknown
    assert len(found) >= 4
    assert difference <= 1e-5


def test_channel_groups_of_a_vit():
    gm = import_model(tiny_vit(), images()).gm.eval()
    found = classes(analysis := analyse(gm, [images()]), {u.name: u for u in layers(gm)})
    sizes = {tuple(sorted(c.readers)): (analysis.atoms.size[c.atom], c.owner is not None) for c in found}
    assert sizes[("blocks.0.mlp.fc2",)] == (128, False)
    assert sizes[("blocks.1.attn.proj",)] == (16, True)  # a separate order for each of two heads
    stream = next(names for names in sizes if "head" in names)
    assert sizes[stream] == (32, False) and "blocks.1.attn.qkv" in stream and "blocks.0.mlp.fc1" in stream


def test_grouped_convolution_has_an_order_per_group():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, groups=2), nn.ReLU(), nn.Conv2d(24, 4, 1))
    difference, found, _ = shuffled(net.eval(), images(2, 8))
    assert difference <= 1e-5
    assert {name: c.owner is not None for c in found for name in c.readers} == {"2": True, "4": True}


def test_unknown_operators_are_named_and_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 8)

        def forward(self, x):
            return self.c(self.b(torch.cumsum(self.a(x), -1)).relu())

    net = Net().eval()
    difference, found, unknown = shuffled(net, torch.randn(2, 16))
    assert unknown == {"cumsum"} and difference <= 1e-5
    assert [list(c.readers) for c in found] == [["c"]]
    gm = transform(net, torch.randn(2, 16), Config(exclude=(), permute=True))
    record = next(r for r in gm.plan.passes if r.name == "permute")
    assert "left alone around cumsum" in record.summary


def test_the_search_beats_the_floor():
    pattern = Pattern(2, 4)
    scores = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).abs()
    order = search(scores[None], pattern, 1000)[0]
    assert sorted(order.tolist()) == list(range(128))
    found = efficacy(float(retained(scores, pattern)), float(retained(scores[:, order], pattern)), scores, pattern)
    assert found > 36.6


@pytest.mark.parametrize(("n", "m"), [(1, 4), (6, 12), (8, 16), (4, 4)])
def test_the_search_is_a_permutation_that_never_loses(n, m):
    scores = torch.rand(3, 20, 4 * m, generator=torch.Generator().manual_seed(1))
    order = search(scores, Pattern(n, m), 60)
    assert torch.equal(order.sort(1).values, torch.arange(4 * m).expand(3, -1))
    arranged = scores.gather(2, order[:, None].expand_as(scores))
    assert bool((retained(arranged, Pattern(n, m)) >= retained(scores, Pattern(n, m))).all())
    assert torch.equal(order, search(scores, Pattern(n, m), 60))


def test_permuted_model_keeps_more_and_its_dense_output():
    model, x = mlp(), torch.randn(64, 32)
    kept = {}
    for permute in (True, False):
        gm = transform(model, x, Config(score="magnitude", permute=permute))
        kept[permute] = gm.plan.layers["2"].notes["mask"]["kept_energy"]
        assert set(gm.state_dict()) >= set(model.state_dict())
    assert kept[True] > kept[False] + 0.005
    dense = transform(model, x, Config(pattern="1:1", exclude=()))
    assert torch.allclose(dense(x), model(x), atol=1e-5)
