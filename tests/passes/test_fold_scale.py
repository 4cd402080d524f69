"""Folding LayerScale into masked layers: same values, and Fuse can take in the residual additions."""

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile import Config, transform
from mpcompile.capture.importers import import_model
from mpcompile.ir.parts import FOLDED
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from mpcompile.passes.base import Context
from mpcompile.passes.fold_scale import FoldScale
from mpcompile.passes.fuse import Fuse
from tests.passes.test_fold_norm import brought, value
from tests.passes.test_fuse import lower_natively
from tests.support.helpers import images, relative, tiny_vit


def masked(model, x):
    return transform(model, x, Config(score="magnitude", exclude=())).eval()


def fold(imported):
    ctx, step = Context(Config(), imported.inputs, imported.lifted), FoldScale()
    propagate(imported.gm, imported.inputs)
    before = imported.gm.code
    decision = step.plan(imported.gm, ctx)
    assert imported.gm.code == before
    assert step.run(imported.gm, ctx).modified == bool(decision.folded)
    propagate(imported.gm, imported.inputs)
    return decision.record(), ctx


@pytest.mark.parametrize("bring", ["symbolic", "dynamo", "export"])
def test_layer_scale_of_a_transformer(bring):
    x = images()
    gm = masked(tiny_vit(init_values=1e-2), x)
    imported = brought(gm, x, bring)
    masks = {layer.name: layer.mask.tensor for layer in layers(imported.gm, imported.lifted) if layer.mask}
    decision, ctx = fold(imported)
    assert decision["folded"] == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.proj", "mlp.fc2")]
    assert decision["left"] == {} and ctx.plan.passes[-1].summary == "4 scales folded, 0 left"
    assert relative(value(imported), gm(x)) < 1e-6
    for layer in layers(imported.gm, imported.lifted):
        assert layer.mask is None or torch.equal(layer.mask.tensor, masks[layer.name])
    lower_natively(imported.gm, imported.lifted)
    propagate(imported.gm, imported.inputs)
    fuse = Fuse()
    fuse.run(imported.gm, ctx)
    assert len(ctx.plan.passes[-1].decision["residuals"]) == 4  # all of them: no scale is left in between
    assert relative(value(imported), gm(x)) < 1e-6


def test_lowered_modules_hold_no_scale():
    x = images()
    gm = masked(tiny_vit(init_values=1e-2), x)
    lowered = mpcompile.lower(gm, x, Config(engine="reference"))
    assert not any("gamma" in name for name, _ in lowered.named_parameters())
    assert not hasattr(lowered, FOLDED)
    assert relative(lowered(x), gm(x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = images().to(dtype)
    gm = masked(tiny_vit(init_values=1e-2).to(dtype), x)
    imported = import_model(gm, x)
    assert len(fold(imported)[0]["folded"]) == 4
    exact = gm.float()(x.float())
    assert relative(value(imported), exact) < {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]


class Scaled(nn.Module):
    """A layer, a factor, and a forward pass that the test supplies."""

    def __init__(self, layer, factor, body):
        super().__init__()
        self.layer, self.gamma, self.body = layer, nn.Parameter(factor), body

    def forward(self, x):
        return self.body(self, x)


def linear(**kwargs):
    torch.manual_seed(0)
    return nn.Linear(8, 12, **kwargs)


X, G = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)), torch.rand(12) + 0.5
IMAGE = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))
FORMS = {
    "after": (linear(), G, lambda s, x: s.layer(x) * s.gamma, X),
    "in front": (linear(), G, lambda s, x: s.gamma * s.layer(x), X),
    "method": (linear(bias=False), G, lambda s, x: s.layer(x).mul(s.gamma), X),
    "in place": (linear(), G, lambda s, x: s.layer(x).mul_(s.gamma), X),
    "one number": (linear(), G[:1], lambda s, x: torch.mul(s.layer(x), s.gamma), X),
    "more axes": (linear(), G.reshape(1, 1, 12), lambda s, x: s.layer(x) * s.gamma, X),
    "convolution": (nn.Conv2d(8, 12, 3, groups=2), G.reshape(12, 1, 1), lambda s, x: s.layer(x) * s.gamma, IMAGE),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    layer, factor, body, x = FORMS[form]
    gm = masked(Scaled(layer, factor, body), x)
    imported = import_model(gm, x)
    assert fold(imported)[0] == {"folded": ["layer"], "left": {}}
    assert relative(value(imported), gm(x)) < 1e-6
    assert not any("mul" in str(node.target) for node in imported.gm.graph.nodes)


LEFT = {
    "a factor per token": (torch.rand(5, 1), lambda s, x: s.layer(x) * s.gamma, "is not one per channel"),
    "another dtype": (G.double(), lambda s, x: s.layer(x) * s.gamma, "torch.float64"),
    "used twice": (G, lambda s, x: s.layer(x) * s.gamma + s.layer(x), "used 2 times"),
    "two users": (G, lambda s, x: (y := s.layer(x)) * s.gamma + y, None),
    "into the factor": (G, lambda s, x: s.gamma.clone().mul_(s.layer(x)[0, 0]), None),
    "no parameter": (G, lambda s, x: s.layer(x) * x.mean(), None),
}


@pytest.mark.parametrize("kind", LEFT)
def test_leaves(kind):
    factor, body, why = LEFT[kind]
    gm = masked(Scaled(linear(), factor, body), X)
    imported = import_model(gm, X)
    decision, _ = fold(imported)
    assert decision["folded"] == [] and [reason for reason in decision["left"].values() if why not in reason] == []
    assert bool(decision["left"]) == (why is not None)
    assert torch.equal(value(imported), gm(X))


@pytest.mark.parametrize("form", FORMS)
def test_dense_linear_layers_are_folded_into_and_convolutions_left_to_inductor(form):
    layer, factor, body, x = FORMS[form]
    gm = transform(Scaled(layer, factor, body), x, Config(pattern="dense"))
    imported = import_model(gm, x)
    folded = [] if form == "convolution" else ["layer"]
    assert fold(imported)[0] == {"folded": folded, "left": {}}
    assert relative(value(imported), gm(x)) < 1e-6
    assert any("mul" in str(node.target) for node in imported.gm.graph.nodes) == (not folded)
    assert not any(node.target in ops.MASKED for node in imported.gm.graph.nodes)
    assert folded == [] or "layer" in {found.name for found in layers(imported.gm, imported.lifted)}


@pytest.mark.parametrize("kind", LEFT)
def test_leaves_of_dense_layers(kind):
    factor, body, why = LEFT[kind]
    gm = transform(Scaled(linear(), factor, body), X, Config(pattern="dense"))
    imported = import_model(gm, X)
    decision, _ = fold(imported)
    assert decision["folded"] == [] and bool(decision["left"]) == (why is not None)
    assert torch.equal(value(imported), gm(X))
