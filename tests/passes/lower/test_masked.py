"""Lowering: packed graphs equal the masked dense ones, on every kind of model and engine."""

import copy

import pytest
import torch
from torch import nn

from mpcompile import Config, Pipeline, transform
from mpcompile.errors import GraphError
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from mpcompile.kernels.dispatch import Reference
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.base import Context
from mpcompile.passes.lower import Lower, Slots, unpacked
from tests.support.helpers import convolutional, images, mlp, relative, tiny_vit

MODELS = {
    "vit": (lambda: tiny_vit(init_values=0.5), images, {"tome_r": 3}),
    "resnet18": (lambda: convolutional("resnet18"), lambda batch: images(batch, 64), {}),
    "convnextv2_atto": (lambda: convolutional("convnextv2_atto"), lambda batch: images(batch, 64), {}),
    "mlp": (mlp, lambda batch: torch.randn(batch, 32), {}),
}


def lowered(gm, **options):
    """Lower a copy; return it and its slots."""
    gm, ctx = copy.deepcopy(gm), Context(Config(**options), [])
    Lower().run(gm, ctx)
    return gm, ctx.results.get(Slots).slots


@pytest.mark.parametrize("engine", ["reference", "dense"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pattern", ["2:4", "6:16"])
def test_lowered_equals_masked_dense(name, engine, pattern):
    make, data, options = MODELS[name]
    gm = transform(make(), data(2), Config(pattern, score="magnitude", **options)).eval()
    packed, slots = lowered(gm, engine=engine)
    masked = {layer.name: layer for layer in layers(gm) if layer.mask is not None}
    assert {slot.name for slot in slots} == masked.keys() and len(masked) >= len(gm.plan.masked)
    assert not any(n.target in ops.MASKED for n in packed.graph.nodes)
    for batch in (1, 3):
        x = data(batch)
        assert relative(packed(x), gm(x)) < 1e-5
    n, m = Pattern.parse(pattern)
    for slot in slots:
        layer = masked[slot.name]
        if engine == "reference":
            assert torch.equal(unpacked(slot), layer.weight.tensor * layer.mask.tensor)
            assert slot.nbytes < slot.dense_nbytes * (n / m + 1 / 16 + 1 / m)
        else:
            assert slot.nbytes == slot.dense_nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    gm = transform(mlp().to(dtype), torch.randn(2, 32, dtype=dtype), Config(score="magnitude"))
    packed, _ = lowered(gm, engine="reference")
    x = torch.randn(4, 32, dtype=dtype)
    assert torch.equal(packed(x), gm(x))


def test_packed_graph_drops_the_dense_weights():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    packed, slots = lowered(gm, engine="reference")
    names = set(packed.state_dict())
    assert not names & {"0.weight", "2.weight", "0.mask", "2.mask"}
    assert {"0.bias", "2.bias", "4.weight"} <= names
    stored = sum(b.numel() * b.element_size() for b in packed.get_submodule("packed").buffers())
    assert stored == sum(slot.nbytes for slot in slots)


def test_grouped_strided_dilated_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(16, 8, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1)),
        nn.Conv2d(8, 2, 1),
    ).eval()
    gm = transform(net, images(2, 16), Config(score="magnitude"))
    assert gm.plan.masked == ["1", "2", "3"]
    packed, _ = lowered(gm, engine="reference")
    assert relative(packed(images(3, 16)), gm(images(3, 16))) < 1e-6


def test_pipeline_can_end_in_lower():
    config = Config(score="magnitude", engine="reference")
    gm = transform(tiny_vit(), images(), config, pipeline=Pipeline([*Pipeline(), Lower()]))
    assert gm.plan.passes[-1].name == "lower"
    notes = gm.plan.layers["blocks.0.attn.qkv"].notes["lower"]
    assert notes["engine"] == "reference" and notes["why"] == "asked for"
    assert notes["tokens"] == 3 * 17 and notes["candidates"]["reference"] is None
    assert any(n.target is ops.nm_linear for n in gm.graph.nodes)


def test_refilling_packs_into_the_same_buffers():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    packed, slots = lowered(gm, engine="reference")
    x, slot = torch.randn(4, 32), slots[0]
    layer = gm.get_submodule(slot.name)
    with torch.no_grad():
        layer.weight.mul_(-2)
    assert relative(packed(x), gm(x)) > 0.1
    slot.fill(layer.weight, layer.mask)
    assert relative(packed(x), gm(x)) < 1e-6


def test_operators_pass_opcheck():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    packed, _ = lowered(gm, engine="reference")
    node = next(n for n in packed.graph.nodes if n.target is ops.nm_linear)
    values, words = (packed.get_submodule("packed.0").get_buffer(k) for k in ("values", "words"))
    args = (torch.randn(3, 32, requires_grad=True), values, words, torch.randn(48), *node.args[4:])
    torch.library.opcheck(ops.nm_linear, args, test_utils=("test_schema", "test_faketensor"))
    mask = gm.get_submodule("0").mask
    args = (torch.randn(3, 32), torch.randn(48, 32, requires_grad=True), mask, None, 2, 4)
    torch.library.opcheck(ops.masked_linear, args, test_utils=("test_schema", "test_faketensor"))


def test_weights_too_large_to_pack(monkeypatch):
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    monkeypatch.setattr(Reference, "pack", lambda *args: {"values": torch.empty(2**55)})
    with pytest.raises(GraphError, match="there is not enough memory to pack its weight") as caught:
        lowered(gm, engine="reference")
    assert "allocate" in caught.value.found and "exclude" in caught.value.hint
    monkeypatch.setattr(Reference, "pack", lambda *args: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):  # other errors pass through
        lowered(gm, engine="reference")
