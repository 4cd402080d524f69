"""Token merging: equal to an independent eager reference on every graph level, and refused by name elsewhere."""

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn

from mpcompile import Config, transform
from mpcompile.errors import GraphError, NotEligibleError
from mpcompile.importers import import_model
from mpcompile.kernels import ops
from mpcompile.kernels.token_merge.reference import merged_count, token_merge
from mpcompile.passes.merge_tokens import MergeTokens
from mpcompile.pipeline import Pipeline, run_pipeline
from tests import merging_reference
from tests.helpers import convolutional, images, relative, tiny_vit


def merging(r: int, **kwargs) -> Config:
    return Config(pattern="dense", tome_r=r, **kwargs)


VARIANTS = {
    "class token": ({}, 1),
    "layer scale and qk-norm": ({"init_values": 0.5, "qk_norm": True}, 1),
    "registers": ({"reg_tokens": 3}, 4),
    "average pooling": ({"global_pool": "avg"}, 1),
    "no class token": ({"global_pool": "avg", "class_token": False}, 0),
}


def merge_record(gm):
    return next(record for record in gm.plan.passes if record.name == "merge_tokens")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("r", [1, 3, 25])
def test_equals_the_eager_reference(variant, r):
    kwargs, prefix = VARIANTS[variant]
    model, x = tiny_vit(**kwargs), images(3)
    gm = transform(model, x, merging(r))
    assert merge_record(gm).decision["prefix"] == prefix
    expected = merging_reference.forward(model, x, r, prefix)
    assert relative(gm(x), expected) < 1e-5
    assert relative(gm(x), model(x)) > 1e-3  # merging does change this model
    assert relative(gm(x[:1]), expected[:1]) < 1e-5  # another batch through the same graph


def test_distillation_token_stays_second():
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = VisionTransformerDistilled(**shape).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.3)
    gm = transform(model, images(), merging(3))
    assert merge_record(gm).decision["prefix"] == 2
    assert relative(gm(images()), merging_reference.forward(model, images(), 3, 2)) < 1e-5


def test_gradients_equal_the_reference():
    model, x = tiny_vit(init_values=0.5), images(2)
    gm = transform(model, x, merging(3))
    gm(x).square().sum().backward()
    merging_reference.forward(model, x, 3, 1).square().sum().backward()
    ours, theirs = dict(gm.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert bool(torch.isfinite(ours[name].grad).all())
        assert relative(ours[name].grad, parameter.grad) < 1e-4, name


def test_r_0_is_bit_identical():
    model, x = tiny_vit(), images()
    gm = transform(model, x, merging(0))
    assert torch.equal(gm(x), model(x))
    assert not any(n.target in ops.MERGING for n in gm.graph.nodes)


def test_burnt_in_token_counts_are_rewritten_in_export_graphs():
    model, x = tiny_vit(), images()
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    gm = transform(exported, config=merging(3))
    assert relative(gm(x), merging_reference.forward(model, x, 3, 1)) < 1e-5


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_dynamo_graphs_with_and_without_dynamic_batch(pool):
    model = tiny_vit(global_pool=pool)
    seen = []

    def backend(gm, inputs):
        imported = import_model(gm, inputs, share=True)
        ir = run_pipeline(imported, merging(3), Pipeline([MergeTokens()]), owned=False)
        seen.append(merge_record(ir).decision)
        return ir

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in (3, 1, 5, 4):
            x = images(batch)
            assert relative(compiled(x), merging_reference.forward(model, x, 3, 1)) < 1e-5
    assert 2 <= len(seen) <= 3  # static, dynamic, and perhaps batch 1
    assert all(decision["prefix"] == 1 for decision in seen)


def test_tokens_are_counted_and_clamping_is_reported():
    gm = transform(tiny_vit(), images(), merging(5))
    assert gm.plan.tokens == [17, 12, 7]
    gm = transform(tiny_vit(), images(), merging(25))
    assert gm.plan.tokens == [17, 9, 5]
    assert "clamped in 2 blocks" in merge_record(gm).summary


def test_prefix_can_be_overridden():
    gm = transform(tiny_vit(), images(), merging(3, prefix_tokens=3))
    assert merge_record(gm).decision["prefix"] == 3
    with pytest.raises(GraphError, match="more prefix tokens than tokens"):
        transform(tiny_vit(), images(), merging(3, prefix_tokens=18))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_preserves_the_size_weighted_sum(dtype):
    x, keys = torch.randn(2, 17, 8).to(dtype), torch.randn(2, 2, 17, 4).to(dtype)
    size = torch.randint(1, 5, (2, 17, 1)).to(dtype)
    merged, sizes = token_merge(x, keys, size, 4, 1)
    assert merged.shape == (2, 13, 8) and merged.dtype == dtype and sizes.dtype == dtype
    assert torch.equal(sizes.sum(1), size.sum(1))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative((merged.float() * sizes.float()).sum(1), (x.float() * size.float()).sum(1)) < tolerance
    assert torch.equal(merged[:, 0], x[:, 0])


def test_ties_go_to_the_lower_index():
    x = torch.arange(7.0)[None, :, None]
    merged, size = token_merge(x, torch.ones(1, 1, 7, 2), torch.ones(1, 7, 1), 1, 1)
    # tokens 2, 4, 6 all match 1, 3 and 5 equally well: 2 goes into 1
    assert merged.flatten().tolist() == [0, 4, 6, 1.5, 3, 5]
    assert size.flatten().tolist() == [1, 1, 1, 2, 1, 1]


def test_merged_count_is_clamped_to_half_of_what_may_merge():
    cases = [(17, 0, 1, 17), (17, 8, 1, 9), (17, 9, 1, 9), (2, 4, 1, 2)]
    assert [merged_count(tokens, r, prefix) for tokens, r, prefix, _ in cases] == [left for *_, left in cases]


def test_op_passes_opcheck():
    x = torch.randn(2, 9, 4, requires_grad=True)
    args = (x, torch.randn(2, 2, 9, 3), torch.ones(2, 9, 1), 2, 1)
    torch.library.opcheck(ops.token_merge, args, test_utils=("test_schema", "test_faketensor"))


def test_refuses_a_model_without_attention():
    with pytest.raises(NotEligibleError, match="no attention block"):
        transform(convolutional("resnet18"), images(), merging(4))


class Appended(nn.Module):
    """A class token behind the image's, as some models have it."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.cat([x, self.token.expand(x.shape[0], -1, -1)], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x[:, -1])


def test_refuses_tokens_from_parameters_behind_the_image():
    with pytest.raises(GraphError, match="stand behind the image's"):
        transform(Appended(), torch.randn(2, 6, 8), merging(2))


@pytest.mark.parametrize(
    ("name", "message"),
    [("eva02_tiny_patch14_224", "unmerged tokens"), ("beit_base_patch16_224", "attention mask or bias")],
)
def test_refuses_position_embeddings_that_stay_behind(name, message):
    model = timm.create_model(name, depth=2).eval()
    with pytest.raises(GraphError, match=message):
        transform(model, images(1, 224), merging(4))


def test_refusal_names_the_op():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.mix, self.head = nn.Linear(8, 24), nn.Linear(6, 6), nn.Linear(8, 2)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head((x + self.mix(x.transpose(1, 2)).transpose(1, 2)).mean(1))

    with pytest.raises(GraphError, match=r"'Linear': it mixes the tokens"):
        transform(Mixer(), torch.randn(2, 6, 8), merging(2))
