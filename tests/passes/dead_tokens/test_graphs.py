"""Operations one by one: heads, projections and attentions in many forms, each against the graph without the pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpcompile import Config, transform
from mpcompile.capture.importers import import_model
from mpcompile.ir.module import Lifted
from mpcompile.ir.shapes import propagate
from mpcompile.passes.dead_tokens import SkipDeadTokens
from mpcompile.passes.dead_tokens.demand import find_demand, saved_macs

N, C, H = 6, 16, 2


def unbound(x, qkv):
    return qkv(x).reshape(x.shape[0], -1, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)


def chunked(x, qkv):
    return [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in qkv(x).chunk(3, -1)]


def split(x, qkv):
    return [t.view(x.shape[0], x.shape[1], H, -1).transpose(1, 2) for t in qkv(x).split(C, dim=-1)]


def sliced(x, qkv):
    y = qkv(x)
    return [t.reshape(*x.shape[:2], H, -1).transpose(1, 2) for t in (y[..., :C], y[..., C : 2 * C], y[..., 2 * C :])]


def indexed(x, qkv):
    y = qkv(x).view(x.shape[0], -1, 3, H, C // H)
    return [y[:, :, i].transpose(1, 2) for i in range(3)]


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def written_out(q, k, v):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def batched(q, k, v):
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).unflatten(0, (-1, H))


def biased(q, k, v):
    bias = torch.arange(q.shape[-2] * q.shape[-2]).reshape(1, 1, q.shape[-2], -1).cos()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def rotated(q, k, v):
    """Rotary embeddings of the patches alone."""
    turn = torch.arange(N - 1)[:, None].cos()

    def turned(t):
        rest = t[:, :, 1:]
        half = torch.stack([-rest[..., 1::2], rest[..., ::2]], -1).reshape(rest.shape)
        return torch.cat([t[:, :, :1], rest * turn + half], 2).type_as(v)

    return F.scaled_dot_product_attention(turned(q), turned(k), v)


class Block(nn.Module):
    """One transformer block and a head; everything behind the attention is per token."""

    def __init__(self, parts=unbound, attend=fused, head=lambda x: x[:, 0], flat=False, first=False):
        super().__init__()
        self.parts, self.attend, self.head, self.flat, self.first = parts, attend, head, flat, first
        self.norm, self.norm2, self.norm3 = (nn.LayerNorm(C) for _ in range(3))
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.scale = nn.Parameter(torch.rand(C) + 0.5)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Dropout(0.0), nn.Linear(2 * C, C))
        self.out = nn.Linear(C, 3)

    def forward(self, x):
        y = self.attend(*self.parts(self.norm(x), self.qkv)).transpose(1, 2).reshape(x.shape)
        x = x + self.scale * self.proj(y)
        z = self.norm2(x)
        z = self.mlp(z.flatten(0, 1)).reshape(z.shape) if self.flat else self.mlp(z)
        x = x + z
        return self.out(self.head(self.norm3(x)))


def seq_first(x):
    return x.transpose(0, 1)[0]


def narrow(x):
    return x.narrow(1, 0, 2).mean(1)


def registers(x):
    return F.normalize(x[:, 1:][:, 1:2], dim=-1).squeeze(1)


def first_and_last(x):
    return torch.cat([x[:, 0], x[:, -1]], -1)[:, :C] + x[:, -1]


def two(x):
    a, b = x[:, 0], x[:, 1]
    return (a + b) / 2


def written_norm(x):
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x.select(1, 0)


def ellipsis(x):
    return x.unsqueeze(1)[..., 0, :][:, 0]


def split_tokens(x):
    return x.split([1, N - 1], 1)[0].squeeze(1)


CASES = {
    "parts": [Block(parts) for parts in (unbound, chunked, split, sliced, indexed)],
    "attention": [Block(attend=attend) for attend in (written_out, batched, biased, rotated)],
    "heads": [
        Block(head=head)
        for head in (seq_first, narrow, registers, first_and_last, two, written_norm, ellipsis, split_tokens)
    ],
}
MODELS = [(f"{kind} {i}", model) for kind, models in CASES.items() for i, model in enumerate(models)]


def transformed(model, x, **options):
    return transform(model, x, Config(pattern="dense", exclude=(), **options))


@pytest.mark.parametrize("captured", [False, True], ids=["traced", "exported"])
@pytest.mark.parametrize(("name", "model"), MODELS, ids=[name for name, _ in MODELS])
def test_each_form_is_followed(name, model, captured):
    """Queries, projection and MLP shrink in each form; sizes of other batches are not built in."""
    torch.manual_seed(0)
    model, x = model.eval(), torch.randn(2 if captured else 1, N, C)
    given = model
    if captured:
        batch = {0: torch.export.Dim("batch", min=2)}
        given = torch.export.export(model, (x,), dynamic_shapes=(batch,), strict=False).module()
    gm = transformed(given, x)
    (queries,) = gm.plan.passes[-1].decision["queries"].values()
    assert queries[0] <= 2 < queries[1] == N
    for other in (x, torch.randn(3, N, C)):
        torch.testing.assert_close(gm(other), model(other), rtol=1e-5, atol=1e-6)


class Mixed(nn.Module):
    """A head in which something reads all tokens."""

    def __init__(self, head):
        super().__init__()
        self.block, self.head = Block(head=nn.Identity()), head

    def forward(self, x):
        return self.head(self.block(x))


@pytest.mark.parametrize(
    ("head", "why"),
    [
        (lambda x: x[:, 0] + x.mean(1), "mean"),
        (lambda x: x.flatten(1), "returns values of all tokens"),
        (lambda x: torch.cumsum(x, 1)[:, 0], "cumsum"),
        (lambda x: x[:, 1:].mean(1), "mean"),
        (lambda x: x.roll(1, 1)[:, 0], "roll"),
        (lambda x: F.conv1d(x.mT, torch.ones(1, 3, 3))[:, :, 0], "conv1d"),
        (lambda x: x[:, torch.arange(1)], "index"),
        (lambda x: x.mul_(2)[:, 0] + x.sum(1), "sum"),
    ],
)
def test_heads_that_read_all_tokens(head, why):
    model, x = Mixed(head).eval(), torch.randn(2, N, C)
    gm = transformed(model, x)
    assert why in gm.plan.passes[-1].summary and not gm.plan.passes[-1].decision["queries"]
    torch.testing.assert_close(gm(x), model(x))


def test_a_batch_of_another_size_keeps_joined_axes_whole():
    """Tokens joined with the batch lie elsewhere for another batch: nothing is skipped behind them."""
    model, x = Block(flat=True).eval(), torch.randn(1, N, C)
    gm = transformed(model, x)
    for other in (x, torch.randn(3, N, C)):
        torch.testing.assert_close(gm(other), model(other), rtol=1e-5, atol=1e-6)


def test_causal_queries_stay_whole():
    def causal(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model = Block(attend=causal, head=lambda x: x[:, 2])
    x = torch.randn(2, N, C)
    gm = transformed(model.eval(), x)
    decision = gm.plan.passes[-1].decision
    assert not decision["queries"] and decision["macs"]  # the projection and the MLP shrink
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_layers_that_are_overwritten():
    """An activation in place overwrites nothing but the layer before it: it is computed in parts, like others."""
    model, x = Block().eval(), torch.randn(2, N, C)
    model.mlp[1], model.mlp[2] = nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)
    gm = transformed(model, x)
    assert gm.plan.passes[-1].decision["queries"] and saved_share(gm) > 0.3
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def saved_share(gm):
    return gm.plan.passes[-1].decision["share"]


def test_a_written_tensor_is_not_computed_in_parts():
    class Writes(Block):
        def forward(self, x):
            y = self.attend(*self.parts(self.norm(x), self.qkv)).transpose(1, 2).reshape(x.shape)
            y = self.proj(y)
            y[:, 1] = y[:, 0]
            return self.out(y[:, 1])

    model, x = Writes().eval(), torch.randn(2, N, C)
    torch.testing.assert_close(transformed(model, x)(x), model(x))


def test_the_demand_counts_what_is_saved():
    model, x = Block().eval(), torch.randn(1, N, C)
    gm = import_model(model, x).gm
    propagate(gm, [x])
    demand = find_demand(gm, Lifted())
    saved = saved_macs(gm, demand)
    assert saved == (N - 1) * (2 * C * C + 4 * C * C + 2 * N * C)
    plain, skipping = (transformed(model, x, skip_dead_tokens=skip) for skip in (False, True))
    assert plain.plan.macs.executed - skipping.plan.macs.executed == saved == skipping.plan.passes[-1].decision["macs"]
    (attention,) = (node for node in gm.graph.nodes if "attention" in node.name)
    assert demand.share(attention) == pytest.approx(1 / N)
    assert skipping.plan.passes[-1].name == SkipDeadTokens.name


class Flipped(nn.Linear):
    """A linear layer by name, which mixes tokens."""

    def forward(self, x):
        return super().forward(x.flip(1))


def test_modules_with_a_forward_of_their_own_or_hooks_stay_whole():
    x, seen = torch.randn(2, N, C), []
    flipped, hooked = Block().eval(), Block().eval()
    flipped.mlp[3] = Flipped(2 * C, C)
    hooked.proj.register_forward_hook(lambda module, args, result: seen.append(result.shape[1]))
    for model in (flipped, hooked):
        gm = transformed(model, x)
        torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)
    assert set(seen) == {N}


class CastsLike(nn.Module):
    """``to`` takes the dtype of a tensor whose shape has nothing to do with its own."""

    def __init__(self):
        super().__init__()
        self.block, self.like = Block(head=nn.Identity()), nn.Parameter(torch.ones(2, 3, 4, 5, dtype=torch.float64))

    def forward(self, x):
        return self.block(x).to(self.like)[:, 0]


def test_casts_to_the_dtype_of_another_tensor():
    model, x = CastsLike().eval(), torch.randn(2, N, C)
    gm = transformed(model, x)
    assert gm.plan.passes[-1].decision["queries"]
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)
