"""Fusion into native operators in whole models: the same values, from the expected number of nodes."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn

from mpcompile import Config, transform
from mpcompile.capture.importers import import_model
from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import argument
from mpcompile.ir.parts import keep
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from mpcompile.kernels.nm_linear.layouts import ROWS, pack
from mpcompile.passes.base import Context
from mpcompile.passes.fold_norm import FoldNorm, norm_of
from mpcompile.passes.fuse import Fuse, activation_of
from mpcompile.passes.lower import PACKED
from mpcompile.plan import LayerPlan
from tests.support.helpers import capture, convolutional, images, mlp, relative, tiny_vit


@torch.no_grad()
def lower_natively(gm, lifted=None):
    """Replace masked layers by nm_gemm and nm_conv, whichever engines this machine has."""
    for layer in layers(gm, lifted):
        if layer.mask is None or (layer.geometry is not None and layer.geometry.groups > 1):
            continue
        node, shape = layer.node, list(layer.weight.tensor.shape)
        packed = pack(layer.weight.tensor.detach(), layer.mask.tensor, *layer.pattern, ROWS)
        path = f"{PACKED}.{layer.name}"
        keep(gm, path, dict(zip(("values", "index"), packed, strict=True)))
        with gm.graph.inserting_before(node):
            values, index = (gm.graph.get_attr(f"{path}.{key}") for key in ("values", "index"))
            module = node.op == "call_module" and layer.bias is not None
            bias = gm.graph.get_attr(f"{layer.name}.bias") if module else layer.bias
            head = (argument(node, 0, "input"), values, index, bias, None)
            if layer.geometry is None:
                new = gm.graph.call_function(ops.nm_gemm, (*head, shape[0], *layer.pattern, ROWS, "none"))
            else:
                axes = (layer.geometry.stride, layer.geometry.padding, layer.geometry.dilation)
                new = gm.graph.call_function(ops.nm_conv, (*head, *axes, *layer.pattern, shape, ROWS, "none"))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    gm.recompile()


def fuse(gm, inputs, lifted=None):
    """Run the pass on a copy; return the copy, the decision and the context."""
    ctx = Context(Config(), list(inputs), lifted or Lifted())
    ctx.plan.layers = {name: LayerPlan("linear", (1, 1)) for name in ("fc1", "fc2", "blocks.0.mlp.fc1", "conv3")}
    fused, step = copy.deepcopy(gm), Fuse()
    propagate(fused, inputs)
    before = [str(n) for n in fused.graph.nodes], fused.code
    decision = step.plan(fused, ctx)
    assert ([str(n) for n in fused.graph.nodes], fused.code) == before  # plan() changes nothing
    assert step.run(fused, ctx).modified == bool(decision.activations or decision.residuals or decision.mlps)
    propagate(fused, inputs)
    again = Fuse().run(copy.deepcopy(fused), Context(Config(), list(inputs), lifted or Lifted()))
    assert not again.modified  # nothing is left for a second run
    return fused, decision, ctx


def counts(decision):
    return len(decision.activations) + len(decision.behind), len(decision.residuals), len(decision.mlps)


def native_nodes(gm):
    return Counter(n.target for n in gm.graph.nodes if n.target in ops.NATIVE)


@pytest.mark.parametrize("tome_r", [0, 3])
def test_vit_by_symbolic_trace(tome_r):
    gm = transform(tiny_vit(), images(), Config(score="magnitude", tome_r=tome_r)).eval()
    native = copy.deepcopy(gm)
    lower_natively(native)
    fused, decision, ctx = fuse(native, [images()])
    assert counts(decision) == (2, 4, 2)
    assert native_nodes(fused) == {ops.nm_gemm: 5, ops.nm_mlp: 2}  # qkv and proj, twice; q of the last block is apart
    assert not any(activation_of(fused, n) for n in fused.graph.nodes)
    assert set(decision.left.values()) == {"followed by reshape"}
    assert len(decision.left) == 3  # qkv, and both parts of the last block's
    assert ctx.plan.passes[-1].summary == "2 activations, 4 residual additions, 2 mlps"
    assert ctx.plan.layers["blocks.0.mlp.fc1"].notes["fuse"] == {"activation": "gelu", "mlp": True}
    for batch in (1, 2, 5):
        assert relative(fused(images(batch)), gm(images(batch))) < 1e-6


def test_an_example_batch_of_one_fuses_too():
    gm = transform(tiny_vit(), images(1), Config(score="magnitude")).eval()
    lower_natively(gm)
    fused, decision, _ = fuse(gm, [images(1)])
    assert counts(decision) == (2, 4, 2)
    assert relative(fused(images(4)), gm(images(4))) < 1e-6


@pytest.mark.parametrize("options, expected", [({}, (2, 4, 2)), ({"init_values": 0.5}, (2, 0, 2))])
def test_vit_by_dynamo(options, expected):
    model = tiny_vit(**options)
    masked = transform(model, images(), Config(score="magnitude")).eval()
    imported = capture(masked, images())
    lower_natively(imported.gm, imported.lifted)
    fused, decision, _ = fuse(imported.gm, imported.inputs, imported.lifted)
    assert counts(decision) == expected
    assert relative(fused(*imported.inputs)[0], masked(images())) < 1e-6
    if options:  # the layer scale is in between
        assert set(decision.left.values()) == {"followed by mul", "followed by reshape"}


def test_no_mlp_if_the_second_layer_has_an_activation():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude")).eval()
    lower_natively(gm)
    fused, decision, _ = fuse(gm, [torch.randn(2, 32)])
    assert counts(decision) == (2, 0, 0)
    x = torch.randn(7, 32)
    assert relative(fused(x), gm(x)) < 1e-6


class Bottleneck(nn.Module):
    """conv, norm, relu, conv, norm, + identity or downsample, relu, as timm and torchvision write it."""

    def __init__(self, downsample):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)) if downsample else nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn3(self.conv3(self.act(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.act(y)


@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("bring", ["symbolic", "dynamo"])
def test_bottleneck(downsample, bring):
    torch.manual_seed(0)
    model = Bottleneck(downsample)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    x = torch.randn(2, 8, 7, 7)
    masked = transform(model.eval(), x, Config(score="magnitude", exclude=()))
    expected = masked(x)
    imported = capture(masked, x) if bring == "dynamo" else import_model(copy.deepcopy(masked), x)
    gm, lifted, inputs = imported.gm, imported.lifted, imported.inputs
    propagate(gm, inputs)
    FoldNorm().run(gm, Context(Config(), inputs, lifted))
    assert not any(norm_of(gm, n, lifted) for n in gm.graph.nodes)
    lower_natively(gm, lifted)
    fused, decision, ctx = fuse(gm, inputs, lifted)
    assert counts(decision) == (2, 1, 0)
    assert not any(activation_of(fused, n) for n in fused.graph.nodes)
    assert ("fuse" in ctx.plan.layers["conv3"].notes) != downsample  # of two operands, the later one takes in the sum
    result = fused(*inputs)
    assert relative(result[0] if bring == "dynamo" else result, expected) < 1e-6


def test_resnet():
    model = convolutional("resnet18")
    gm = transform(model, images(2, 64), Config(score="magnitude")).eval()
    native = copy.deepcopy(gm)
    ctx = Context(Config(), [images(2, 64)])
    propagate(native, ctx.inputs)
    FoldNorm().run(native, ctx)
    lower_natively(native)
    fused, decision, _ = fuse(native, ctx.inputs)
    assert counts(decision) == (16, 8, 0)
    assert relative(fused(images(3, 64)), gm(images(3, 64))) < 1e-6


def test_nothing_to_fuse():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude")).eval()
    ctx = Context(Config(), [torch.randn(2, 32)])
    assert not Fuse().run(gm, ctx).modified
    assert ctx.plan.passes[-1].summary == "nothing to fuse"
