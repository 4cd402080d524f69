"""The token axis after a merge: followed through unusual blocks, or refused with the name of the op."""

import pytest
import timm
import torch
from torch import nn

from mpcompile.errors import MPCompileError, NotEligibleError
from tests.support import merging_reference
from tests.support.helpers import convolutional, images, relative
from tests.support.merging import decision, merged


def test_refuses_a_model_without_attention():
    with pytest.raises(NotEligibleError, match=r"no attention block.*found no attention"):
        merged(convolutional("resnet18"), images(), 4)


class Block(nn.Module):
    """Attention on 8 channels with a residual addition; subclasses add what follows it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def attend(self, x, **options):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


class Windows(Block):
    """Attention inside windows of two tokens."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(1, (-1, 2)).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, windows, heads, 2, 4)
        return x + out.transpose(2, 3).flatten(3).flatten(1, 2)


class Global(Block):
    def forward(self, x):
        return self.attend(x)


class WindowsThenGlobal(nn.Module):
    """The last stage of Twins: windows, a convolution on the grid, then attention of all tokens."""

    def __init__(self):
        super().__init__()
        self.windows, self.all = Windows(), Global()
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.windows(x)
        grid = x.transpose(1, 2).unflatten(2, (4, 4))
        x = (grid + self.conv(grid)).flatten(2).transpose(1, 2)
        return self.head(nn.functional.gelu(self.all(x)).mean(1))


def test_merges_after_windows_and_a_grid():
    torch.manual_seed(0)
    model, x = WindowsThenGlobal().eval(), torch.randn(2, 16, 8)
    gm = merged(model, x, 6)
    assert len(decision(gm)["sites"]) == 1 and decision(gm)["tokens"] == [16, 10]
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 6, 0, [model.all])
        assert relative(gm(x), expected) < 1e-5
        assert relative(model(x), expected) > 1e-3


class RotaryBeforeHeads(Block):
    """Queries and keys are rotated as (B, tokens, heads, channels), by a table (B, tokens, 1, channels)."""

    def forward(self, x, table):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q * table, k * table, v))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([RotaryBeforeHeads(), RotaryBeforeHeads()])
        self.table, self.head = nn.Parameter(torch.randn(1, 16, 1, 4)), nn.Linear(8, 2)

    def forward(self, x):
        table = self.table.expand(x.shape[0], -1, -1, -1)
        for block in self.blocks:
            x = block(x, table)
        return self.head(x.mean(1))


def test_tables_with_tokens_before_heads():
    torch.manual_seed(0)
    model, x = Rotary().eval(), torch.randn(2, 16, 8)
    gm = merged(model, x, 4)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 4, 0)
        assert relative(gm(x), expected) < 1e-5
        assert relative(model(x), expected) > 1e-3


class Aliased(Block):
    """``aten.alias``, which export leaves after an attention without dropout."""

    def forward(self, x):
        return self.head(torch.ops.aten.alias.default(nn.functional.gelu(self.attend(x))).mean(1))


def test_follows_an_alias():
    torch.manual_seed(0)
    model, x = Aliased().eval(), torch.randn(2, 8, 8)
    gm = merged(model, x, 3)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 3, 0, [model])) < 1e-5


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.attention.register_forward_hook(lambda module, inputs, output: None)

    def forward(self, x):
        return (x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


def test_names_an_attention_that_stays_a_single_call():
    with pytest.raises(NotEligibleError, match=r"^attention: tome_r=2.*found it has hooks"):
        merged(Hooked().eval(), torch.randn(2, 6, 8), 2)


class Causal(Block):
    def forward(self, x):
        return self.head(self.attend(x, is_causal=True).mean(1))


class Among(Block):
    """A learned token between those of the image."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x):
        x = torch.cat([x[:, :2], self.token.expand(x.shape[0], -1, -1), x[:, 2:]], 1)
        return self.head(self.attend(x).mean(1))


class Mixer(Block):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        x = self.attend(x)
        return self.head((x + self.mix(x.transpose(1, 2)).transpose(1, 2)).mean(1))


class Flipped(Block):
    def forward(self, x):
        return self.head(self.attend(x).flip(1).mean(1))


class Last(Block):
    def forward(self, x):
        return self.head(self.attend(x)[:, -1])


class Grid(Block):
    def forward(self, x):
        return self.head(self.attend(x).unflatten(1, (2, 3)).mean((1, 2)))


class Summed(Block):
    def forward(self, x):
        return self.head(self.attend(x).sum(1))


class Linear(Block):
    """Attention without a softmax, after the merge."""

    def forward(self, x):
        x = self.attend(x)
        return self.head((x @ (x.transpose(1, 2) @ x)).mean(1))


class Stages(Block):
    """Half of the tokens go on to the second block."""

    def forward(self, x):
        return self.head(self.attend(self.attend(x)[:, :3]).mean(1))


class Joined(Block):
    """Two streams that meet in a third block."""

    def forward(self, x):
        both = torch.cat([self.attend(x[:, :3]), self.attend(x[:, 3:])], 1)
        return self.head(self.attend(both).mean(1))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Causal, "attention is causal"),
        (Among, "stand among those of the image"),
        (Mixer, "'Linear': it mixes the tokens"),
        (Flipped, "'flip': an unknown op"),
        (Last, "'getitem': it picks tokens by position"),
        (Grid, "its tokens go back to a grid before any layer has worked on fewer"),
        (Summed, "'sum': it runs over the tokens"),
        (Linear, "'matmul': it sums over tokens"),
        (Joined, "more than one token axis"),
    ],
)
def test_refusals_name_the_op(kind, message):
    with pytest.raises(MPCompileError, match=message):
        merged(kind(), torch.randn(2, 6, 8), 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swin_tiny_patch4_window7_224", r"its keys .* are not the tokens of its stream \(1, 56, 56, 96\): windows"),
        ("xcit_nano_12_p16_224", "are not the tokens"),
    ],
)
def test_refuses_families_by_name(name, message):
    size = {"depths": (1, 1)} if name.startswith("swin") else {"depth": 2}
    model = timm.create_model(name, **size).eval()
    with pytest.raises(MPCompileError, match=message):
        merged(model, images(1, 224), 4)
