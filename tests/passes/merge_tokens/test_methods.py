"""``tome_method``: every term of a pair's score equals the independent eager reference, in whole models."""

import pytest
import torch
import transformers
from timm.layers import set_fused_attn

from mpcompile.errors import GraphError
from mpcompile.kernels import ops, schema
from mpcompile.passes.merge_tokens import saliency
from mpcompile.passes.merge_tokens.saliency import Method
from tests.support import merging_reference
from tests.support.helpers import images, randomise, relative, tiny_vit, transformer
from tests.support.merging import decision, merged
from tests.support.merging_reference import Terms

R = [4, 2]
ALL = Method(tokens=True, saliency=0.2, size=0.5, keep_norm=True)
TERMS = [Method(tokens=True), Method(saliency=1.0), Method(size=0.5), Method(keep_norm=True), ALL]
FAMILIES = {  # name, image size, prefix, tokens that the output reads by themselves
    "distilled": ("deit_tiny_distilled_patch16_224", 64, 2, (0, 1)),
    "registers": ("vit_small_patch14_reg4_dinov2", 56, 5, (0,)),
    "map pooling": ("vit_base_patch16_siglip_224", 64, 0, ()),
    "class token that the pooling leaves out": ("eva02_tiny_patch14_224", 56, 1, ()),
    "parallel attentions": ("vit_small_patch16_18x2_224", 64, 1, (0,)),
}


def terms_of(pairs, rows):
    return Terms(pairs.tokens, pairs.saliency, rows if pairs.saliency else (), pairs.size, pairs.keep_norm)


def by(monkeypatch, model, x, pairs, r=R, **options):
    monkeypatch.setitem(saliency.METHODS, "saliency", pairs)
    return merged(model, x, r, tome_method="saliency", **options)


def rows_read(gm):
    rows = {tuple(schema.bind(n).rows) for n in gm.graph.nodes if n.target is ops.token_saliency}
    return rows.pop() if rows else ()


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_each_term_equals_the_eager_reference(pool, monkeypatch):
    model, x, rows = tiny_vit(global_pool=pool, depth=3), images(2), (0,) if pool == "token" else ()
    with torch.no_grad():
        tome = merged(model, x, [4, 3, 2], tome_method="tome")(x)
        for pairs in TERMS:
            gm = by(monkeypatch, model, x, pairs, [4, 3, 2])
            assert rows_read(gm) == (rows if pairs.saliency else ())
            expected = merging_reference.forward(model, x, [4, 3, 2], 1, terms=terms_of(pairs, rows))
            assert relative(gm(x), expected) < 1e-5, pairs
            matters = pairs == ALL or not pairs.saliency or pool == "token"
            assert (relative(gm(x), tome) > 1e-3) == matters, pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_the_eager_reference(family, monkeypatch):
    name, size, prefix, rows = FAMILIES[family]
    model, x = transformer(name, size), images(2, size, seed=2)
    gm = by(monkeypatch, model, x, ALL)
    assert rows_read(gm) == rows
    with torch.no_grad():
        expected = merging_reference.forward(model, x, R, prefix, terms=terms_of(ALL, rows))
        assert relative(gm(x), expected) < 1e-5


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_the_saliency_is_that_of_the_attention(fused, proportional, monkeypatch):
    """With fused attention it is computed beside it, else read from its weights."""
    set_fused_attn(fused)
    try:
        model = tiny_vit(depth=3)
    finally:
        set_fused_attn(True)
    x = images()
    gm = by(monkeypatch, model, x, ALL, 3, tome_proportional=proportional)
    (first, *_) = (schema.bind(n) for n in gm.graph.nodes if n.target is ops.token_saliency)
    assert (first.key is not None) == fused
    terms = terms_of(ALL, (0,))
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 3, 1, proportional=proportional, terms=terms)
        assert relative(gm(x), expected) < 1e-5


def test_the_plan_says_when_the_output_reads_no_class_token():
    pooled, x = tiny_vit(global_pool="avg"), images()
    gm = merged(pooled, x, 3, tome_method="saliency")
    assert any("reads no class token" in note for note in gm.plan.notes)
    assert decision(gm)["prefix"] == 1
    for quiet in (merged(pooled, x, 3, tome_method="tome"), merged(tiny_vit(), x, 3, tome_method="saliency")):
        assert not any("class token" in note for note in quiet.plan.notes)


def test_hidden_tokens_have_no_saliency(monkeypatch):
    model, x = tiny_vit(), images(2)
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[0, ..., 9:] = False
    gm = by(monkeypatch, model, {"x": x, "attn_mask": mask}, ALL, 4)
    with torch.no_grad():
        terms = terms_of(ALL, (0,))
        assert relative(gm(x, mask), merging_reference.forward(model, x, 4, 1, terms=terms, attn_mask=mask)) < 1e-5


def test_export_with_a_dynamic_batch():
    model, x = tiny_vit(), images(4)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,)).module(check_guards=False)
    gm = merged(exported, None, 3, tome_method="saliency")
    terms = terms_of(saliency.METHODS["saliency"], (0,))
    with torch.no_grad():
        for size in (1, 6):
            assert relative(gm(images(size)), merging_reference.forward(model, images(size), 3, 1, terms=terms)) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_exported_model_of_transformers(attention, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = transformers.ViTConfig(**sizes, intermediate_size=64)
    model = transformers.ViTForImageClassification._from_config(config, attn_implementation=attention).eval()
    randomise(model)
    x = images(2)
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    gm = by(monkeypatch, exported, None, ALL)
    assert rows_read(gm) == (0,)
    with torch.no_grad():
        blocks = model.vit.get_submodule("layers")
        expected = merging_reference.forward(model, x, R, 1, blocks, terms=terms_of(ALL, (0,))).logits
        assert relative(gm(x)[0], expected) < 1e-5


def test_merges_already_made_keep_their_method():
    model, x = tiny_vit(), images()
    gm = merged(model, x, 3, tome_method="saliency")
    again = merged(gm, x, 3, tome_method="saliency")
    assert again.plan.config["tome_method"] == "saliency"
    with pytest.raises(GraphError, match="found tome_method='tome'"):
        merged(gm, x, 3, tome_method="tome")


def test_fixed_biases_are_part_of_the_attention(monkeypatch):
    """Fused attention has them as a mask, of which one row is read; written-out attention has them in its weights."""
    x, outputs = images(2, 64), []
    for fused in (True, False):
        set_fused_attn(fused)
        try:
            model = transformer("beit_base_patch16_224", 64, global_pool="token", use_rel_pos_bias=True)
        finally:
            set_fused_attn(True)
        gm = by(monkeypatch, model, x, ALL)
        saliencies = [schema.bind(n) for n in gm.graph.nodes if n.target is ops.token_saliency]
        assert len(saliencies) == 2 and all((s.bias is not None) == fused for s in saliencies)
        with torch.no_grad():
            outputs.append(gm(x))
    assert relative(*outputs) < 1e-5


def test_gradients_equal_the_reference(monkeypatch):
    model, x = tiny_vit(), images(2)
    gm = by(monkeypatch, model, x, ALL)
    gm.train()
    output = gm(x)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (merging_reference.forward(model, x, R, 1, terms=terms_of(ALL, (0,))) * direction).sum().backward()
    for path, parameter in gm.named_parameters():
        wanted = model.get_parameter(path).grad
        assert float((parameter.grad - wanted).norm()) < 1e-4 * max(float(wanted.norm()), 1.0), path


def test_half_precision(monkeypatch):
    model, x = tiny_vit().bfloat16(), images().bfloat16()
    gm = by(monkeypatch, model, x, ALL, 3)
    with torch.no_grad():
        output = gm(x)
        assert output.dtype is torch.bfloat16
        expected = merging_reference.forward(model, x, 3, 1, terms=terms_of(ALL, (0,)))
    assert relative(output, expected) < 2e-2
