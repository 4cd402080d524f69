"""Whole models: the same outputs and gradients as without the pass, and fewer multiply-accumulates, counted by hand."""

import pytest
import timm
import torch
import transformers

import mpcompile
from mpcompile import Config, transform
from mpcompile.passes.dead_tokens import SkipDeadTokens
from tests.support.helpers import images, randomise, tiny_vit, transformer

# name of a timm architecture -> its options, and the queries of the last block that the head reads, of how many
READ = {
    "vit_tiny_patch16_224": ({"size": 64}, (1, 17)),
    "deit_tiny_distilled_patch16_224": ({"size": 64}, (2, 18)),
    "deit3_small_patch16_224": ({"size": 64}, (1, 17)),
    "vit_small_patch14_reg4_dinov2": ({"size": 56, "num_classes": 10}, (1, 21)),
    "eva02_tiny_patch14_224": ({"size": 56, "global_pool": "token"}, (1, 17)),
    "vit_small_patch16_dinov3": ({"size": 64, "num_classes": 10, "global_pool": "token"}, (1, 21)),
    "beit_base_patch16_224": ({"size": 64, "global_pool": "token"}, (1, 17)),
}
WHOLE = {  # architectures of which all tokens are read -> their options, and what the Plan says
    "vit_base_patch16_224": ({"size": 64, "global_pool": "avg"}, "all tokens are read by mean"),
    "vit_base_patch16_siglip_224": ({"size": 64, "num_classes": 10}, "read by scaled_dot_product_attention"),
    "cait_xxs24_224": ({"size": 64, "num_heads": 4}, "all tokens are read by"),
}


def both(model, x, **options):
    """A model transformed without the pass and with it, and the pass's record in the Plan."""
    plain = transform(model, x, Config(**options, skip_dead_tokens=False))
    skipping = transform(model, x, Config(**options))
    record = skipping.plan.passes[-1]
    assert record.name == SkipDeadTokens.name and plain.plan.passes[-1].summary == "off"
    return plain, skipping, record


def tensors(value):
    """All tensors in what a model returns."""
    return [value] if isinstance(value, torch.Tensor) else [t for t in value.values() if t is not None]


def relative(a, b):
    return float(((a - b).double().norm() / a.double().norm()).detach())


def assert_same(plain, skipping, x, atol=1e-6):
    """Outputs within 1e-6, also for another batch, and gradients of every parameter within 1e-5."""
    for batch in (x, torch.cat([x, x.flip(-1)])[: len(x) + 1]):
        for a, b in zip(tensors(plain(batch)), tensors(skipping(batch)), strict=True):
            assert relative(a, b) < atol
    gradients = []
    for module in (plain, skipping):
        module.zero_grad()
        sum((t.float() * torch.arange(t.numel()).reshape(t.shape).cos()).sum() for t in tensors(module(x))).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert plain.state_dict().keys() == skipping.state_dict().keys() and gradients[0].keys() == gradients[1].keys()
    largest = max(float(g.norm()) for g in gradients[0].values() if g is not None)
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        if gradient is not None and gradient.abs().sum():
            assert (gradient - other).norm() < 1e-5 * gradient.norm() + 1e-7 * largest, name
        else:
            assert other is None or not other.abs().sum()


@pytest.mark.parametrize("name", READ)
def test_only_the_tokens_that_the_head_reads_are_computed(name):
    kwargs, queries = READ[name]
    model = transformer(name, **kwargs)
    x = images(2, kwargs["size"])
    plain, skipping, record = both(model, x, pattern="dense")
    assert list(record.decision["queries"].values()) == [list(queries)]
    assert_same(plain.train(), skipping.train(), x)
    assert_same(plain.eval(), skipping.eval(), x)
    read, tokens = queries
    width, blocks = 96, dict(model.blocks.named_parameters())
    mlp = sum(p.numel() for name, p in blocks.items() if name.startswith("1.mlp") and p.dim() == 2)
    saved = (tokens - read) * (2 * width * width + mlp + 2 * tokens * width)
    assert plain.plan.macs.executed - skipping.plan.macs.executed == saved


@pytest.mark.parametrize("name", WHOLE)
def test_models_that_read_all_tokens_are_left_alone(name):
    kwargs, why = WHOLE[name]
    if name == "cait_xxs24_224":
        torch.manual_seed(0)
        model = timm.create_model(name, depth=2, img_size=64).eval()
        randomise(model)
    else:
        model = transformer(name, **kwargs)
    plain, skipping, record = both(model, images(2, kwargs["size"]), pattern="dense")
    assert why in record.summary
    assert str(skipping.graph) == str(plain.graph)


@pytest.mark.parametrize("merge", [8, (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_and_merged(merge, dtype):
    model, x = transformer("vit_tiny_patch16_224", 128).to(dtype), images(2, 128).to(dtype)
    plain, skipping, record = both(model, x, pattern="2:4", tome_r=merge)
    first = 8 if merge == 8 else 3
    assert plain.plan.tokens == skipping.plan.tokens == [65, 65 - first, 65 - 2 * first if merge == 8 else 60]
    assert len(record.decision["merges"]) == 1 and list(record.decision["queries"].values()) == [[1, 65 - first]]
    if dtype is torch.float32:
        assert_same(plain, skipping, x)
    else:
        exact = plain.float()(x.float())
        errors = [relative(exact, module(x)) for module in (plain.to(dtype), skipping)]
        assert errors[1] < 1.5 * errors[0]


HUGGING_FACE = {
    "ViTForImageClassification": ({}, (1, 17)),
    "DeiTForImageClassificationWithTeacher": ({}, (2, 18)),
    "CLIPVisionModelWithProjection": ({}, (1, 17)),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_exported_models(name):
    kwargs, queries = HUGGING_FACE[name]
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**shape, image_size=64, patch_size=16, projection_dim=16, **kwargs)).eval()
    randomise(model)
    outputs = ("image_embeds",) if "CLIP" in name else ("logits",)
    plain, skipping, record = both(model, images(2, 64), pattern="2:4", tome_r=2, outputs=outputs)
    assert list(record.decision["queries"].values()) == [[queries[0], queries[1] - 2]]
    assert_same(plain, skipping, images(2, 64))


def test_all_tokens_returned():
    """A model that returns its hidden states reads them all."""
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.ViTModel(transformers.ViTConfig(**config, image_size=64, patch_size=16)).eval()
    _, _, record = both(model, images(2, 64), pattern="dense")
    assert record.summary == "nothing to skip: the model returns values of all tokens, or of most"


def test_the_backend_and_lower_skip_too():
    model, x = tiny_vit(), images(2)
    dense = mpcompile.lower(transform(model, x, Config("2:4", skip_dead_tokens=False)), x, Config(engine="reference"))
    lowered = mpcompile.lower(transform(model, x, Config("2:4")), x, Config(engine="reference"))
    assert dense.plan.macs.executed > lowered.plan.macs.executed
    assert relative(dense(x), lowered(x)) < 1e-5
