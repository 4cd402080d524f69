"""Folding BatchNorm into masked convolutions: same values, same names, and the user's tensors are not written."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from mpcompile import Config, load, lower, save, transform
from mpcompile.capture.importers import import_model
from mpcompile.ir.parts import FOLDED
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from mpcompile.passes.base import Context
from mpcompile.passes.fold_norm import FoldNorm, norm_of
from mpcompile.passes.lower import Lower, Slots
from tests.support.helpers import capture, convolutional, images, relative

X = torch.randn(2, 8, 7, 7, generator=torch.Generator().manual_seed(1))


def shake(model):
    """Give every BatchNorm statistics and parameters that change values."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def net(**kwargs):
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
        nn.BatchNorm2d(16, **kwargs),
        nn.ReLU(),
        nn.Conv2d(16, 8, 1),
        nn.BatchNorm2d(8, **kwargs),
    )


def masked(model, x=X):
    return transform(model, x, Config(score="magnitude", exclude=()))


def brought(gm, x, bring):
    """Import a masked graph as it is, through dynamo, or through export."""
    if bring == "dynamo":
        return capture(gm, x)
    if bring == "export":
        return import_model(torch.export.export(gm, (x,)).module(), x)
    return import_model(copy.deepcopy(gm), x)


def fold(imported):
    """Run the pass; return its decision and the context."""
    ctx, step = Context(Config(engine="reference"), imported.inputs, imported.lifted), FoldNorm()
    propagate(imported.gm, imported.inputs)
    before = imported.gm.code
    decision = step.plan(imported.gm, ctx)
    assert imported.gm.code == before
    assert step.run(imported.gm, ctx).modified == bool(decision.folded)
    propagate(imported.gm, imported.inputs)
    return decision.record(), ctx


def value(imported, x=None):
    inputs = imported.inputs if x is None else [x]
    result = imported.gm(*inputs)
    return result[0] if isinstance(result, (tuple, list)) else result


def norms(imported):
    return [n for n in imported.gm.graph.nodes if norm_of(imported.gm, n, imported.lifted) is not None]


@pytest.mark.parametrize("bring", ["symbolic", "dynamo", "export"])
@pytest.mark.parametrize("affine", [True, False])
def test_folded_and_lowered_equal_the_original(bring, affine):
    gm = masked(shake(net(affine=affine)))
    state = copy.deepcopy(gm.state_dict())
    imported = brought(gm, X, bring)
    names = {layer.name: layer.mask.tensor for layer in layers(imported.gm, imported.lifted)}
    decision, ctx = fold(imported)
    assert decision == {"folded": ["0", "3"], "left": {}}
    assert ctx.plan.passes[-1].summary == "2 BatchNorms folded, 0 left"
    assert not norms(imported)
    assert relative(value(imported), gm(X)) < 1e-6
    convolutions = layers(imported.gm, imported.lifted)
    assert [(layer.name, str(layer.pattern)) for layer in convolutions] == [("0", "2:4"), ("3", "2:4")]
    for layer in convolutions:
        assert torch.equal(layer.mask.tensor, names[layer.name])
        assert layer.weight.node.op == "get_attr" and not layer.weight.tensor.requires_grad
    Lower().run(imported.gm, ctx)
    slots = ctx.results.get(Slots).slots
    assert [slot.name for slot in slots] == ["0", "3"]
    assert all(slot.weight.op == "get_attr" for slot in slots)  # the backend takes it for the graph's own
    assert not any(n.target in ops.MASKED for n in imported.gm.graph.nodes)
    assert not hasattr(imported.gm, FOLDED)  # the folded dense weights are gone
    assert relative(value(imported), gm(X)) < 1e-6
    for name, tensor in gm.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("name, folded", [("resnet18", 16), ("resnet26d", 24)])
def test_resnets(name, folded):
    x = images(2, 64)
    gm = transform(convolutional(name), x, Config(score="magnitude")).eval()
    imported = brought(gm, x, "symbolic")
    decision, _ = fold(imported)
    assert set(decision["folded"]) == {
        layer.name for layer in layers(gm) if layer.pattern is not None and layer.kind == "conv2d"
    }
    assert len(decision["folded"]) >= folded
    assert set(decision["left"].values()) <= {"not masked: Inductor folds it"}
    assert relative(value(imported, images(3, 64)), gm(images(3, 64))) < 1e-5


@pytest.mark.parametrize("bring", ["symbolic", "dynamo"])
@pytest.mark.parametrize("options", [{}, {"apply_act": False}, {"act_layer": nn.SiLU, "drop_layer": nn.Dropout}])
def test_timm_norms_keep_their_activation(bring, options):
    gm = masked(shake(nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8, **options))))
    imported = brought(gm, X, bring)
    decision, _ = fold(imported)
    assert decision["folded"] == ["0"] and not norms(imported)
    assert relative(value(imported), gm(X)) < 1e-6


def test_the_parts_of_a_folded_timm_norm_can_be_saved(tmp_path):
    gm = transform(shake(nn.Sequential(nn.Conv2d(8, 8, 1), BatchNormAct2d(8))), X, Config(include=("*",)))
    lowered = lower(gm, X, Config(engine="reference"))
    save(lowered, tmp_path / "lowered.mpc")
    assert torch.equal(load(tmp_path / "lowered.mpc")(X), lowered(X))


def test_half_precision_is_folded_in_double():
    model = shake(net())
    gm = masked(model.bfloat16(), X.bfloat16())
    imported = brought(gm, X.bfloat16(), "symbolic")
    fold(imported)
    layer = layers(imported.gm)[0]
    conv, norm = gm.get_submodule("0"), gm.get_submodule("1")
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert torch.equal(layer.weight.tensor, (conv.weight.double() * scale[:, None, None, None]).bfloat16())
    assert relative(value(imported), gm(X.bfloat16())) < 2e-2


class Functional(nn.Module):
    """A convolution, a BatchNorm, and a forward pass that the test supplies."""

    def __init__(self, after):
        super().__init__()
        self.conv, self.norm, self.after = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), after

    def forward(self, x):
        return self.after(self.conv(x), self.norm)


def torch_norm(y, norm):
    return torch.batch_norm(y, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, norm.eps, False)


def aten_norm(y, norm):
    head = (y, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return torch.ops.aten.batch_norm.default(*head, False, 0.1, norm.eps, False)


def functional_norm(y, norm):
    return F.batch_norm(y, norm.running_mean, norm.running_var, weight=norm.weight, bias=norm.bias, eps=0.25)


@pytest.mark.parametrize("after", [torch_norm, aten_norm, functional_norm])
def test_functions(after):
    gm = masked(shake(Functional(after)))
    imported = brought(gm, X, "symbolic")
    assert fold(imported)[0] == {"folded": ["conv"], "left": {}}
    assert relative(value(imported), gm(X)) < 1e-6


def training_norm(y, norm):
    return F.batch_norm(y, norm.running_mean, norm.running_var, training=True)


REFUSALS = {
    "two users": (lambda y, norm: norm(y) + y, "2 users of its output"),
    "training": (training_norm, "its BatchNorm is in training mode"),
    "computed": (
        lambda y, norm: F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight * 2),
        "its BatchNorm's parameters are computed",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    after, why = REFUSALS[name]
    imported = brought(masked(shake(Functional(after))), X, "symbolic")
    assert fold(imported)[0] == {"folded": [], "left": {"conv": why}}


def test_a_norm_in_training_mode_is_left():
    gm = masked(shake(net()))
    gm.get_submodule("1").train()
    imported = brought(gm, X, "symbolic")
    assert fold(imported)[0] == {"folded": ["3"], "left": {"0": "its BatchNorm is in training mode"}}


@pytest.mark.parametrize("bring", ["symbolic", "dynamo"])
def test_a_norm_without_statistics_is_left(bring):
    imported = brought(masked(shake(net(track_running_stats=False))), X, bring)
    decision, _ = fold(imported)
    assert decision["folded"] == [] and set(decision["left"]) == {"0", "3"}
    # for the function, training means using the batch's statistics
    word = "no running statistics" if bring == "symbolic" else "training mode"
    assert all(word in why for why in decision["left"].values())


def test_hooked_norms_and_dense_convolutions_are_left():
    gm = transform(shake(net()), X, Config(score="magnitude", exclude=(), include=()))
    gm.get_submodule("1").register_forward_hook(lambda module, args, out: out + 1)
    imported = brought(gm, X, "symbolic")
    assert fold(imported)[0]["left"] == {"0": "its BatchNorm has hooks"}
    imported = import_model(shake(net()), X)
    assert set(fold(imported)[0]["left"].values()) == {"not masked: Inductor folds it"}


@pytest.mark.parametrize("bring", ["symbolic", "dynamo"])
def test_a_shared_convolution_is_left(bring):
    conv = nn.Conv2d(8, 8, 1)
    gm = masked(shake(nn.Sequential(conv, nn.BatchNorm2d(8), conv, nn.BatchNorm2d(8))))
    assert fold(brought(gm, X, bring))[0] == {"folded": [], "left": {"0": "its weight is used 2 times"}}


def test_a_shared_norm_is_folded_twice():
    norm = nn.BatchNorm2d(8)
    gm = masked(shake(nn.Sequential(nn.Conv2d(8, 8, 1), norm, nn.Conv2d(8, 8, 1), norm)))
    imported = brought(gm, X, "symbolic")
    assert fold(imported)[0]["folded"] == ["0", "2"]
    assert relative(value(imported), gm(X)) < 1e-6
