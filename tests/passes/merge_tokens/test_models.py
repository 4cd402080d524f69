"""Token merging in whole models equals an independent eager reference, on every graph level."""

import pytest
import torch
from timm.layers import Attention, set_fused_attn
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock

from mpcompile import Config
from mpcompile.capture.importers import import_model
from mpcompile.errors import GraphError
from mpcompile.kernels import ops
from mpcompile.passes.merge_tokens.insert import MergeTokens
from mpcompile.pipeline import Pipeline, run_pipeline
from tests.support import merging_reference
from tests.support.helpers import images, relative, tiny_vit, transformer
from tests.support.merging import decision, merged

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 128, {}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", 128, {}, 2),
    "layer scale": ("deit3_small_patch16_224", 128, {}, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", 112, {}, 5),
    "map pooling": ("vit_base_patch16_siglip_224", 128, {}, 0),
    "rotary and swiglu": ("eva02_tiny_patch14_224", 112, {}, 1),
    "rotary and registers": ("vit_small_patch16_dinov3", 128, {}, 5),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_eager_reference(family):
    name, size, kwargs, prefix = FAMILIES[family]
    model, x = transformer(name, size, **kwargs), images(8, size, seed=2)
    with torch.no_grad():
        dense = model(x)
        for r in (1, 8, 13, 16, 25):
            gm = merged(model, x[:3], r)
            assert decision(gm)["prefix"] == prefix
            expected = merging_reference.forward(model, x, r, prefix)
            for batch in (1, 3, 8):
                assert relative(gm(x[:batch]), expected[:batch]) < 1e-5
            assert relative(expected, dense) > 1e-3  # merging does change this model


class Gated(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "gated": True})


BLOCKS = {
    "gated attention": {"attn_layer": Gated},
    "average pooling": {"global_pool": "avg"},
    "average and maximum": {"global_pool": "avgmax"},
    "no class token": {"global_pool": "avg", "class_token": False},
    "qk-norm and scaled norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "attention and mlp side by side": {"block_fn": ParallelScalingBlock},
    "post-norm": {"block_fn": ResPostBlock},
    "no position embedding in the class token": {"no_embed_class": True, "reg_tokens": 3},
    "norm before the blocks": {"pre_norm": True},
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_kinds_of_blocks(kind):
    model, x = tiny_vit(**BLOCKS[kind]), images()
    gm = merged(model, x, 3)
    assert decision(gm)["prefix"] == model.num_prefix_tokens
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 3, model.num_prefix_tokens)) < 1e-5


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cait_xxs24_224", {}),  # talking heads, class attention
        ("vit_small_patch16_18x2_224", {}),  # two attentions a block
        ("vit_small_patch16_dinov3", {"qk_norm": True}),
        ("vit_dlittle_patch16_reg1_gap_256", {}),  # differential attention
    ],
)
def test_kinds_of_attention(name, kwargs):
    model, x = transformer(name, **kwargs), images(2, 128)
    gm = merged(model, x, 8)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 8, decision(gm)["prefix"])) < 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
def test_written_out_attention(name):
    set_fused_attn(False)
    try:
        model = transformer(name, 112)
    finally:
        set_fused_attn(True)
    x = images(2, 112)
    gm = merged(model, x, 8)
    assert not any(n.target is ops.token_attention for n in gm.graph.nodes)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 8, decision(gm)["prefix"])) < 1e-5


def test_a_mask_over_keys_hides_tokens_that_merge():
    model, x = tiny_vit(), images(2)
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[0, ..., 9:] = False
    mask[1, ..., 4] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    gm = merged(model, {"x": x, "attn_mask": mask}, 4)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 4, 1, attn_mask=mask)
        assert relative(gm(x, mask), expected) < 1e-5
        assert relative(gm(x, added), expected) < 1e-5
        assert relative(gm(x, torch.ones_like(mask)), merged(model, x, 4)(x)) < 1e-6


def test_refuses_other_masks():
    model, x = tiny_vit(), images(2)
    with pytest.raises(GraphError, match="a mask for every query"):
        merged(model, {"x": x, "attn_mask": torch.zeros(2, 1, 17, 17)}, 4)
    with pytest.raises(GraphError, match="tome_proportional=True"):
        merged(model, {"x": x, "attn_mask": torch.zeros(2, 1, 1, 17)}, 4, tome_proportional=False)
    pooled = tiny_vit(global_pool="avg")
    with pytest.raises(GraphError, match="hidden ones included"):
        merged(pooled, {"x": x, "attn_mask": torch.zeros(2, 1, 1, 17)}, 4)


def test_without_proportional_attention():
    model, x = tiny_vit(global_pool="avg"), images()
    gm = merged(model, x, 3, tome_proportional=False)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 3, 1, proportional=False)
        assert relative(gm(x), expected) < 1e-5
        assert relative(merged(model, x, 3)(x), expected) > 1e-4


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_gradients_equal_the_reference(name):
    model, x = transformer(name, 112), images(2, 112)
    gm = merged(model, x, 8)
    output = gm(x)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (merging_reference.forward(model, x, 8, 1) * direction).sum().backward()
    ours, theirs = dict(gm.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for path, parameter in theirs.items():
        if parameter.grad is not None:
            assert bool(torch.isfinite(ours[path].grad).all())
            error = float((ours[path].grad - parameter.grad).norm())
            assert error < 1e-4 * max(float(parameter.grad.norm()), 1.0), (
                path
            )  # a bias of keys has only rounding errors for a gradient


@pytest.mark.parametrize("r", [0, [0, 0]])
def test_r_0_is_bit_identical(r):
    model, x = tiny_vit(), images()
    gm = merged(model, x, r)
    assert torch.equal(gm(x), model(x))
    assert not any(n.target in ops.MERGING for n in gm.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = tiny_vit().to(dtype), images().to(dtype)
    gm = merged(model, x, 3)
    output = gm(x)
    assert output.dtype is dtype
    sizes = [n for n in gm.graph.nodes if n.target is ops.token_size]
    assert all(n.meta["val"].dtype is torch.float32 for n in sizes)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 3, 1)
    assert relative(output, expected) < {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2"])
def test_constant_token_counts_are_rewritten_in_export_graphs(name):
    model, x = transformer(name, 112), images(2, 112)
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    gm = merged(exported, None, 8)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 8, decision(gm)["prefix"])) < 1e-5


def test_export_with_a_dynamic_batch():
    model, x = tiny_vit(), images(4)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,)).module(check_guards=False)
    gm = merged(exported, None, 3)
    with torch.no_grad():
        for size in (1, 4, 6):
            assert relative(gm(images(size)), merging_reference.forward(model, images(size), 3, 1)) < 1e-5


def test_export_with_a_dynamic_image_size():
    """The number of tokens is a symbol, and reshapes may not keep its value for unmerged tokens."""
    model = transformer("eva02_tiny_patch14_224", 112, dynamic_img_size=True)
    side = torch.export.Dim("side", min=2, max=20)
    shapes = ({2: 14 * side, 3: 14 * side},)
    exported = torch.export.export(model, (images(2, 112),), dynamic_shapes=shapes).module(check_guards=False)
    gm = merged(exported, None, 8)
    with torch.no_grad():
        for size in (112, 140, 84):
            x = images(2, size)
            assert relative(gm(x), merging_reference.forward(model, x, 8, 1)) < 1e-5


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_dynamo_graphs_with_and_without_dynamic_batch(pool):
    model = tiny_vit(global_pool=pool)
    seen = []

    def backend(gm, inputs):
        imported = import_model(gm, inputs, share=True)
        config = Config(pattern="dense", tome_r=3, tome_method="tome")
        ir = run_pipeline(imported, config, Pipeline([MergeTokens()]), owned=False)
        seen.append(decision(ir))
        return ir

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in (3, 1, 5, 4):
            x = images(batch)
            assert relative(compiled(x), merging_reference.forward(model, x, 3, 1)) < 1e-5
    assert 2 <= len(seen) <= 3  # static, dynamic, and perhaps batch 1
    assert all(entry["prefix"] == 1 for entry in seen)
