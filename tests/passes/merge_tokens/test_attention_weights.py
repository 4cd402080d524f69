"""Merging with idle attention masks, and with ops on the weights of attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpcompile
from mpcompile import Config, MPCompileError


class Block(nn.Module):
    def __init__(self, weigh, mask):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mix, self.plain = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.across, self.drop = nn.LayerNorm(4), nn.Dropout(0.1)
        self.weigh, self.mask = weigh, mask

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, 4, 8).permute(2, 0, 3, 1, 4)
        if self.mask is not None:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(self, x, t))
        else:
            y = self.weigh(self, (q @ k.transpose(-1, -2)).softmax(-1)) @ v
        return x + self.out(y.transpose(1, 2).reshape(b, t, 32))


class Vit(nn.Module):
    def __init__(self, weigh=None, mask=None):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 32, 4, 4), nn.Parameter(torch.randn(1, 1, 32))
        self.blocks, self.head = nn.Sequential(*(Block(weigh, mask) for _ in range(3))), nn.Linear(32, 8)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1))[:, 0])


def heads_last(f):
    return lambda net, w: f(net, w.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


LINEAR = {
    "as they are": lambda net, w: w,
    "scaled": lambda net, w: (2 * w / 3).to(w.dtype),
    "scaled in place": lambda net, w: w.mul_(0.5),
    "dropout": lambda net, w: net.drop(w),
    "heads mixed": heads_last(lambda net, w: net.plain(w)),
    "heads mixed with a bias": heads_last(lambda net, w: net.mix(w)),
    "difference of two": lambda net, w: w - 0.3 * net.drop(w),
    "mean of the heads": lambda net, w: w.mean(1, keepdim=True).expand(-1, 4, -1, -1),
}
OTHER = {
    "sum": lambda net, w: w + 0.1,
    "rest": lambda net, w: 1 - w,
    "sigmoid": lambda net, w: torch.sigmoid(w),
    "clamp": lambda net, w: w.clamp(max=0.05),
    "square": lambda net, w: w * w,
    "quotient": lambda net, w: w / w.amax(-1, keepdim=True),
    "norm over heads": heads_last(lambda net, w: net.across(w)),
    "softmax again": lambda net, w: w.softmax(-1),
    "transposed": lambda net, w: w.transpose(-1, -2),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_equal_tokens_merge_without_loss_if_ops_on_weights_are_linear(kind):
    model, x = Vit(weigh=LINEAR[kind]).eval(), torch.randn(1, 3, 1, 1).expand(1, 3, 16, 16).contiguous()
    gm = mpcompile.transform(model, x, Config(pattern="dense", tome_r=2))
    with torch.no_grad():
        assert torch.allclose(gm(x), model(x), atol=1e-5)


@pytest.mark.parametrize("kind", OTHER)
def test_ops_not_linear_in_the_weights_are_refused(kind):
    with pytest.raises(MPCompileError, match=r"is not linear in the attention weights|without attention weights"):
        mpcompile.transform(Vit(weigh=OTHER[kind]).eval(), torch.randn(1, 3, 16, 16), Config(pattern="dense", tome_r=2))


IDLE = {
    "full": lambda net, x, t: torch.full((t, t), True)[None, None],
    "arange": lambda net, x, t: (torch.arange(t)[:, None] - torch.arange(t)).abs() < 99,
    "ones_like": lambda net, x, t: torch.ones_like(x[:, :, 0], dtype=torch.bool)[:, None, None, :],
    "zeros to add": lambda net, x, t: (1.0 - torch.full((1, 1, t, t), 1.0)) * -1e9,
}
REAL = {
    "causal": lambda net, x, t: torch.full((t, t), True).tril(),
    "data": lambda net, x, t: (x[:, :, 0] > -99)[:, None, None, :].expand(-1, 1, 17, 17),
}


@pytest.mark.parametrize("kind", IDLE)
def test_tokens_merge_under_idle_masks(kind):
    x = torch.randn(2, 3, 16, 16)
    gm = mpcompile.transform(Vit(mask=IDLE[kind]).eval(), x, Config(pattern="dense", tome_r=2))
    assert gm.plan.tokens == [17, 15, 13, 11]


@pytest.mark.parametrize("kind", REAL)
def test_masks_that_may_hide_something_are_refused(kind):
    with pytest.raises(MPCompileError, match="cannot follow merged tokens"):
        mpcompile.transform(Vit(mask=REAL[kind]).eval(), torch.randn(2, 3, 16, 16), Config(pattern="dense", tome_r=2))
