"""Tokens that return to a grid: stages, streams (B, C, H, W) and (B, H, W, C), and blocks that gain nothing."""

import pytest
import timm
import torch
from torch import nn

from mpcompile import MPCompileError
from mpcompile.kernels import ops
from tests.support.helpers import images, randomise, relative
from tests.support.merging import decision, merged
from tests.support.tokens import full_size_reference

PIT = {"base_dims": (16, 16, 16), "heads": (1, 2, 4), "depth": (1, 2, 2), "patch_size": 8, "stride": 4}
LEVIT = {"embed_dim": (32, 32, 32), "num_heads": (2, 2, 2), "key_dim": 8, "depth": (2, 2, 2)}
STAGES = {
    "a class token through the stages": ("pit_ti_224", {**PIT, "img_size": 32}),
    "biases, and norms of joined rows": ("levit_128s", {**LEVIT, "img_size": 64}),
    "convolutions of size 1": ("visformer_tiny", {"embed_dim": 48, "depth": (1, 2, 2), "img_size": 64}),
}


def attention_blocks(model):
    return [m for m in model.modules() if any("Attention" in type(child).__name__ for child in m.children())]


def streams(gm):
    """The prefixes of the streams, and the stream of every site in the order of execution."""
    found = decision(gm).get("streams") or [decision(gm)]
    places = {site: number for number, stream in enumerate(found) for site in stream["sites"]}
    return [stream["prefix"] for stream in found], [places[n.name] for n in gm.graph.nodes if n.name in places]


def compared(model, x, r):
    gm = merged(model, x, r)
    prefixes, order = streams(gm)
    with torch.no_grad():
        expected = full_size_reference.forward(model, x, r, order, prefixes, attention_blocks(model))
        assert relative(gm(x), expected) < 1e-5
        assert relative(model(x), expected) > 1e-4
    return gm


@pytest.mark.parametrize("family", STAGES)
def test_stages_equal_the_reference_that_keeps_all_tokens(family):
    name, kwargs = STAGES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs, num_classes=5).eval()
    randomise(model)
    for key, parameter in model.named_parameters():
        if "attention_biases" in key:
            nn.init.normal_(parameter)
    gm = compared(model, images(2, kwargs["img_size"], seed=1), 2)
    assert any(node.target is ops.token_spread for node in gm.graph.nodes)
    assert len(gm.plan.tokens) > 1
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    notes = [note for note in gm.plan.notes if note.startswith("after .train(), batch statistics are those of merged")]
    assert len(notes) == any(isinstance(module, norms) for module in model.modules())
    for names in (note.partition(": ")[2].split(", ") for note in notes):
        assert all(isinstance(model.get_submodule(layer), norms) for layer in names)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, 2, 4).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, channels))


class Last(nn.Module):
    """A block on (B, H, W, C), followed by an MLP with or without a convolution on the grid."""

    def __init__(self, conv, mlp=True):
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(8)
        self.mlp = nn.Linear(8, 8) if mlp else nn.Identity()
        self.conv = nn.Conv2d(8, 8, 3, padding=1) if conv else None

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        y = self.mlp(x)
        if self.conv is not None:
            y = self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x += y
        return x


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(x.permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("conv", [False, True])
def test_a_stream_with_channels_last(conv):
    """The result of a convolution is a value per token: added to merged tokens, it is averaged over their parts."""
    torch.manual_seed(0)
    gm = compared(Net(Last(conv), Last(conv)).eval(), torch.randn(2, 8, 4, 6), 4)
    assert gm.plan.tokens == [24, 20, 16]
    assert gm(torch.randn(5, 8, 4, 6)).shape == (5, 3)


def test_blocks_that_gain_nothing_are_left():
    model = Net(Last(True, mlp=False)).eval()
    with pytest.raises(MPCompileError, match="tokens go back to a grid before any layer has worked on fewer"):
        merged(model, torch.randn(2, 8, 4, 6), 4)


def with_front(front):
    """A model whose second block has an op on the grid in front of its attention."""
    block = Last(False)
    block.norm = nn.Sequential(Permuted(0, 3, 1, 2), front, Permuted(0, 2, 3, 1))
    return Net(Last(False), block)


def test_attention_over_all_tokens_in_a_stream_that_has_merged():
    """Norms of the batch and convolutions get every input token; the next merge compares the means of their keys."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 4, 6)
    for front in (nn.BatchNorm2d(8, track_running_stats=False), nn.Conv2d(8, 8, 3, padding=1)):
        gm = compared(with_front(front).eval(), x, 4)
        assert any(node.target is ops.token_spread for node in gm.graph.nodes)


def test_norms_that_take_their_mean_from_the_batch_get_all_tokens():
    """In training, a batch norm sees every input token, and merged tokens do not shift its statistics."""
    gm = merged(with_front(nn.BatchNorm2d(8)).train(), torch.randn(2, 8, 4, 6), 4)
    assert any(node.target is ops.token_spread for node in gm.graph.nodes)


class Permuted(nn.Module):
    def __init__(self, *order):
        super().__init__()
        self.order = order

    def forward(self, x):
        return x.permute(self.order)
