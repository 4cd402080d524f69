"""Biases for every pair of tokens: relative positions, as fused attention reads them or written out."""

import pytest
import timm
import torch
import transformers
from timm.layers import set_fused_attn
from torch import nn

from mpcompile import MPCompileError
from mpcompile.kernels import ops
from tests.support.helpers import images, randomise, relative
from tests.support.merging import merged
from tests.support.tokens import full_size_reference

SMALL = {"img_size": 64, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 7}
FAMILIES = {
    "a table per block": ("beit_base_patch16_224", {}, 1),
    "two tables, one of which blocks share": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}, 1),
    "computed by a network": ("vit_relpos_small_patch16_224", {}, 0),
}


def tiny(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs}).eval()
    randomise(model)
    for key, value in model.named_parameters():
        if "bias_table" in key:
            nn.init.normal_(value)
    return model


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_reference_that_keeps_all_tokens(family, fused):
    name, kwargs, prefix = FAMILIES[family]
    set_fused_attn(fused)
    try:
        model, x = tiny(name, **kwargs), images(3, 64, seed=1)
    finally:
        set_fused_attn(True)
    gm = merged(model, x, 3)
    with torch.no_grad():
        expected = full_size_reference.forward(model, x, 3, [0, 0], [prefix], model.blocks)
        assert relative(gm(x), expected) < 1e-5
        assert relative(model(x), expected) > 1e-3
    pairs = [node for node in gm.graph.nodes if node.target is ops.token_pairs]
    assert len(pairs) == 1  # the first block attends before anything merges
    assert tuple(pairs[0].meta["val"].shape) == (3, 2, 13 + prefix, 13 + prefix)


def test_an_exported_beit_of_transformers():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BeitConfig(image_size=32, patch_size=8, use_relative_position_bias=True, **sizes)
    torch.manual_seed(0)
    model, x = transformers.BeitForImageClassification(config).eval(), images(2, 32, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    gm = merged(torch.export.export(model, (x,), strict=False).module(check_guards=False), None, 2)
    with torch.no_grad():
        expected = full_size_reference.forward(Logits(model), x, 2, [0, 0], [1], model.beit.layers)
        assert relative(gm(x)["logits"], expected) < 1e-5
        assert relative(model(x)["logits"], expected) > 1e-3
    assert any(node.target is ops.token_pairs for node in gm.graph.nodes)


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)["logits"]


class Masked(nn.Module):
    """Two blocks whose attention has a mask for every query."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


@pytest.mark.parametrize("mask", [torch.ones(6, 6).tril().bool(), torch.full((6, 6), -torch.inf).triu(1)])
def test_masks_for_every_query_are_refused(mask):
    with pytest.raises(MPCompileError, match="a mask for every query cannot follow merged tokens"):
        merged(Masked(mask), torch.randn(2, 6, 8), 2)
