"""Attention of torch.nn becomes layers of the graph, in graphs of every kind."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpcompile import Config, load, lower, save, transform
from mpcompile.capture.importers import import_model
from mpcompile.export import dense_state
from mpcompile.ir.view import layers
from tests.support.attending import Detector, Encoder, open_clip_vision, stirred, vision_transformer
from tests.support.helpers import capture, images, relative

SPARSE = Config(pattern="2:4", engine="reference")
HIDDEN = torch.tensor([[False] * 4 + [True] * 3, [False] * 6 + [True]])


class Attention(nn.Module):
    """One ``nn.MultiheadAttention`` and how it is called."""

    def __init__(self, call, **options):
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(16, 4, **options), call

    def forward(self, *inputs):
        return self.call(self.attention, *inputs)


def itself(attention, x):
    return attention(x, x, x, need_weights=False)[0]


def padded(attention, x, y, hidden):
    return attention(x, y, y, key_padding_mask=hidden, need_weights=False)[0]


def apart(attention, x, y, z):
    return attention(x, y, z)


def every_head(attention, x, y, hidden):
    return attention(x, y, y, key_padding_mask=hidden, average_attn_weights=False)


def masked(attention, x, mask):
    return attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def causal(attention, x, mask):
    return attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]


def both(attention, x, mask, hidden):
    return attention(x, x, x, attn_mask=mask, key_padding_mask=hidden)


def unread(attention, x):
    found, weights = attention(x, x, x)
    return found


X, Y = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
SQUARE = torch.randn(7, 7)
TRIANGLE = torch.ones(7, 7, dtype=torch.bool).triu(1)
FORMS = {
    "self": (itself, {"batch_first": True}, (X,)),
    "sequence first": (itself, {}, (X,)),
    "without batch": (itself, {}, (X[0],)),
    "without bias": (itself, {"bias": False, "batch_first": True}, (X,)),
    "unread weights": (unread, {"batch_first": True}, (X,)),
    "hidden keys": (padded, {"batch_first": True}, (X, Y, HIDDEN)),
    "hidden keys, added": (padded, {"batch_first": True}, (X, Y, HIDDEN * -2.0)),
    "three inputs": (apart, {"batch_first": True}, (X, Y, Y + 1)),
    "other widths": (apart, {"batch_first": True, "kdim": 8, "vdim": 12}, (X, Y[..., :8], Y[..., :12])),
    "weights of heads": (every_head, {"batch_first": True}, (X, Y, HIDDEN)),
    "added mask": (masked, {"batch_first": True}, (Y, SQUARE)),
    "mask of every head": (masked, {"batch_first": True}, (Y, torch.randn(8, 7, 7))),
    "boolean mask": (masked, {}, (Y.transpose(0, 1), TRIANGLE)),
    "causal": (causal, {"batch_first": True}, (Y, TRIANGLE)),
    "both masks": (both, {"batch_first": True}, (Y, TRIANGLE, HIDDEN)),
    "more keys": (every_head, {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, (X, Y, HIDDEN)),
    "more keys, fused": (padded, {"add_bias_kv": True, "add_zero_attn": True}, (X, Y[:, :5], HIDDEN.T)),
}
FORMS["more keys, fused"] = (padded, {"add_bias_kv": True, "add_zero_attn": True}, (X.mT.mT, Y[:2, :5], HIDDEN[:, :2].repeat(3, 1)[:5]))


def importeds(model, inputs):
    """Yield the graph of each kind and its lifted parameters: traced, exported, and captured by dynamo."""
    yield import_model(model, inputs)
    yield import_model(torch.export.export(model, inputs).module(), inputs)
    yield capture(model, *inputs)


def calls(gm):
    return {node.target for node in gm.graph.nodes}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_the_same(form):
    call, options, inputs = FORMS[form]
    model = stirred(Attention(call, **options))
    expected = model(*inputs)
    traced = import_model(model, inputs).gm
    exported = import_model(torch.export.export(model, inputs).module(), inputs).gm
    for gm in (traced, exported):
        torch.testing.assert_close(gm(*inputs), expected, rtol=1e-5, atol=1e-6)
        assert gm.state_dict().keys() == model.state_dict().keys()
        assert not calls(gm) & {"attention", F.multi_head_attention_forward}
    captured = capture(model, *inputs)
    values = list(captured.lifted.tensors.values())
    assert F.multi_head_attention_forward not in calls(captured.gm) and values
    given = [captured.lifted.tensors.get(n.name, v) for n, v in zip(places(captured), captured.inputs, strict=True)]
    found = captured.gm(*given)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(tuple(found), wanted, rtol=1e-5, atol=1e-6)
