"""Token merging in models whose attention is torch.nn's, traced and exported, against the reference."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mpcompile import Config, lower, transform
from tests.capture.attending import Encoder, open_clip_vision, stirred, vision_transformer
from tests.support import merging_reference
from tests.support.helpers import images, relative
from tests.support.merging import merged


class Plain(nn.MultiheadAttention):
    """The attention written with F.linear and fused attention, (B, N, C): the reference sees its keys."""

    def forward(self, query, key, value, key_padding_mask=None, **_):
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        parts = zip((query, key, value), weights, biases, strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x, w, b in parts)
        seen = {} if key_padding_mask is None else {"attn_mask": key_padding_mask[:, None, None] == 0}
        mixed = F.scaled_dot_product_attention(q, k, v, **seen)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


def plain(model):
    """Return a copy of a model that computes attention in the open, for sequences behind the batch."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.__class__, module.batch_first = Plain, True
    return twin


def expected(model, x, r, prefix, blocks):
    twin = plain(model)
    with torch.no_grad():
        return merging_reference.forward(twin, x, r, prefix, blocks(twin))


MODELS = {
    "torchvision": (vision_transformer, 1, lambda m: m.encoder.layers),
    "open_clip": (open_clip_vision, 1, lambda m: m.transformer.resblocks),
    "encoder": (lambda: stirred(Encoder()), 0, lambda m: m.encoder.layers),
    "norm first": (lambda: stirred(Encoder(norm_first=True)), 0, lambda m: m.encoder.layers),
}


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_reference(name, exported):
    make, prefix, blocks = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), images(2)
    source = torch.export.export(model, (x,)).module() if exported else model
    gm = merged(source, x, 3)
    count = 16 + prefix
    assert gm.plan.tokens == [count, count - 3, count - 6]
    with torch.no_grad():
        assert relative(gm(x), expected(model, x, 3, prefix, blocks)) < 1e-5
        assert relative(gm(x), model(x)) > 1e-3


@pytest.mark.parametrize("exported", [False, True])
def test_sequences_in_front_of_the_batch(exported):
    """(N, B, C): the same tokens merge as in the twin that holds the batch first."""
    first, last = stirred(Encoder(batch_first=False)), stirred(Encoder())
    last.load_state_dict(first.state_dict())
    x = images(2)
    source = torch.export.export(first, (x,)).module() if exported else first
    gm = merged(source, x, 3)
    assert gm.plan.tokens == [16, 13, 10]
    with torch.no_grad():
        assert relative(gm(x), expected(last, x, 3, 0, lambda m: m.encoder.layers)) < 1e-5


def test_masked_merged_and_lowered():
    model, x = vision_transformer(), images(2)
    gm = transform(model, x, Config(pattern="2:4", tome_r=3, engine="reference"))
    assert gm.plan.tokens == [17, 14, 11] and len(gm.plan.masked) == 8
    assert relative(lower(gm, x)(x), gm(x)) < 1e-5


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 8)

    def forward(self, x, hidden):
        return self.head(self.encoder(x, src_key_padding_mask=hidden)[:, 0])


@pytest.mark.parametrize("exported", [False, True])
def test_a_mask_over_keys(exported):
    """All layers read one mask, which the sizes of the tokens then carry."""
    torch.manual_seed(0)
    model, x = stirred(Padded()), torch.randn(2, 12, 32)
    hidden = torch.arange(12) >= torch.tensor([[9], [11]])
    source = torch.export.export(model, (x, hidden)).module() if exported else model
    gm = merged(source, (x, hidden), 2, prefix_tokens=1)
    twin = plain(model)
    with torch.no_grad():
        wanted = merging_reference.forward(twin, x, 2, 1, twin.encoder.layers, hidden=hidden)
        assert relative(gm(x, hidden), wanted) < 1e-5


# --- Attention of a model's own that joins axes ---


class Joined(nn.Module):
    """Pools tokens by attention whose heads are joined with the batch, and projects them joined with it; or apart."""

    def __init__(self, joined):
        super().__init__()
        self.joined = joined
        options = {"depth": 2, "img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "num_classes": 0}
        self.vit = timm.create_model("vit_tiny_patch16_224", global_pool="", **options)
        self.rows, self.key, self.value, self.head = (nn.Linear(64, n) for n in (64, 64, 64, 8))
        self.query = nn.Parameter(torch.randn(1, 4, 1, 16))

    def forward(self, x):
        tokens = self.vit(x)
        b, n, c = tokens.shape
        tokens = self.rows(tokens.reshape(-1, c)).reshape(b, n, c) if self.joined else self.rows(tokens)
        parts = [layer(tokens).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.key, self.value)]
        query, key, value = self.query.expand(b, -1, -1, -1), *parts
        if self.joined:
            query, key, value = (part.reshape(b * 4, -1, 16) for part in (query, key, value))
        weights = (query @ key.transpose(-2, -1) / 4).softmax(-1)
        return self.head((weights @ value).reshape(b, c))


@pytest.mark.parametrize("free", [False, True])
def test_axes_that_a_model_joins_with_the_batch(free):
    torch.manual_seed(0)
    apart, x = Joined(False).eval(), torch.randn(3, 3, 32, 32)
    joined = Joined(True).eval()
    joined.load_state_dict(apart.state_dict())
    shapes = {"x": {0: torch.export.Dim.AUTO}} if free else None
    config = Config(pattern="dense", tome_r=2)
    graphs = [
        transform(torch.export.export(model, (x,), dynamic_shapes=shapes).module(), x, config)
        for model in (joined, apart)
    ]
    assert [gm.plan.tokens for gm in graphs] == [[17, 15, 13]] * 2
    assert relative(graphs[0](x), graphs[1](x)) < 1e-5
    assert relative(graphs[0](x), joined(x)) > 1e-3  # merging changes something
