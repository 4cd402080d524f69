"""Attention of torch.nn becomes layers of the graph, in graphs of every kind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import nn

from mpcompile import Config, load, lower, save, transform
from mpcompile.capture.importers import import_model
from mpcompile.export import dense_state
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers
from tests.capture.attending import Detector, Encoder, open_clip_vision, stirred, vision_transformer
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
    found, _ = attention(x, x, x)
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
    "more keys, fused": (
        padded,
        {"add_bias_kv": True, "add_zero_attn": True},
        (X.transpose(0, 1), Y.transpose(0, 1), HIDDEN),
    ),
}


def calls(gm):
    return {node.target for node in gm.graph.nodes}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_the_same(form):
    """Traced, exported and captured by dynamo; nothing of torch.nn's attention is left."""
    call, options, inputs = FORMS[form]
    model = stirred(Attention(call, **options))
    expected = model(*inputs)
    for source in (model, torch.export.export(model, inputs).module()):
        gm = import_model(source, inputs).gm
        torch.testing.assert_close(gm(*inputs), expected, rtol=1e-5, atol=1e-6)
        assert gm.state_dict().keys() == model.state_dict().keys()
        assert "attention" not in calls(gm)
    captured = capture(model, *inputs)
    assert F.multi_head_attention_forward not in calls(captured.gm)
    places = [node.name for node in captured.gm.graph.nodes if node.op == "placeholder"]
    given = [captured.lifted.tensors.get(name, value) for name, value in zip(places, captured.inputs, strict=True)]
    found = captured.gm(*given)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    torch.testing.assert_close(tuple(found), tuple(w for w in wanted if w is not None), rtol=1e-5, atol=1e-6)


def test_a_width_that_is_computed():
    """open_clip's attention pool gives ``x.shape[-1]`` as the width, and one bias for three projections."""
    model, x = stirred(AttentionPool2d(3, 16, 4, 8)), torch.randn(2, 16, 3, 3)
    gm = import_model(model, x).gm
    assert F.multi_head_attention_forward not in calls(gm)
    assert {layer.name for layer in layers(gm)} == {"q_proj", "k_proj", "v_proj", "c_proj"}
    torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-6)


def test_layers_are_named_and_the_batch_stays_free():
    model = stirred(Attention(padded, batch_first=True))
    gm = import_model(model, (X, Y, HIDDEN)).gm
    rows = ["attention.in_proj_weight_rows_0_16", "attention.in_proj_weight_rows_16_48"]
    assert [layer.name for layer in layers(gm)] == [*rows, "attention.out_proj"]
    more = torch.randn(3, 4, 16), torch.randn(3, 6, 16), torch.zeros(3, 6)
    torch.testing.assert_close(gm(*more[:2], more[2].bool()), model(*more[:2], more[2].bool()))


MODELS = {
    "torchvision": (vision_transformer, ("encoder.layers.encoder_layer_0.self_attention", "mlp.0")),
    "open_clip": (open_clip_vision, ("transformer.resblocks.0.attn", "mlp.c_fc")),
    "encoder": (lambda: stirred(Encoder()), ("encoder.layers.0.self_attn", "linear1")),
    "norm first": (
        lambda: stirred(Encoder(norm_first=True, activation="gelu")),
        ("encoder.layers.0.self_attn", "linear1"),
    ),
    "sequence first": (lambda: stirred(Encoder(batch_first=False)), ("encoder.layers.0.self_attn", "linear1")),
}


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_projections_are_masked_and_lowered(name, exported, tmp_path):
    make, (path, mlp) = MODELS[name]
    model, x = make(), images(2)
    before = copy.deepcopy(model.state_dict())
    source = torch.export.export(model, (x,)).module() if exported else model
    gm = transform(source, x, SPARSE)
    assert len(gm.plan.masked) == 8
    assert gm.plan.masked[:2] == [f"{path}.in_proj_weight", f"{path}.out_proj"]
    assert mlp in gm.plan.masked[2]
    assert gm.state_dict().keys() - model.state_dict().keys() == {n for n in gm.state_dict() if n.endswith("mask")}
    copy.deepcopy(model).load_state_dict(dense_state(gm))
    expected = gm(x)
    again = make()
    again.load_state_dict(dense_state(gm))
    assert relative(again(x), expected) < 1e-6
    lowered = lower(gm, x)
    assert relative(lowered(x), expected) < 1e-5
    assert not {f"{path}.in_proj_weight", f"{path}.out_proj.weight"} & lowered.state_dict().keys()
    for build in (gm, lowered):
        save(build, tmp_path / "model.mpc")
        assert torch.equal(load(tmp_path / "model.mpc")(x), build(x))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("exported", [False, True])
def test_cross_attention(exported, tmp_path):
    """Rows of the packed weights are layers of their own: a decoder's queries, and its keys with its values."""
    torch.manual_seed(0)
    model, inputs = stirred(Detector()), (images(2), torch.zeros(2, 16, dtype=torch.bool))
    inputs[1][:, 12:] = True
    source = torch.export.export(model, inputs).module() if exported else model
    dense = transform(source, inputs, Config(pattern="dense"))
    assert relative(dense(*inputs), model(*inputs)) < 1e-6
    gm = transform(source, inputs, SPARSE)
    cross = "decoder.layers.0.multihead_attn"
    parts = ("0_32", "32_64", "64_96") if exported else ("0_64", "64_96")  # torch.export projects each input alone
    wanted = {f"attention.in_proj_weight_rows_{part}" for part in parts}
    wanted |= {f"{cross}.in_proj_weight_rows_0_32", f"{cross}.in_proj_weight_rows_32_96", f"{cross}.out_proj"}
    assert wanted <= set(gm.plan.masked)
    assert len(gm.plan.masked) == len(parts) + 1 + 2 * (2 + 3 + 2)
    dense_again = Detector()
    dense_again.load_state_dict(dense_state(gm))
    weight = dense_again.get_parameter(f"{cross}.in_proj_weight")
    assert float((weight == 0).float().mean()) == 0.5
    assert relative(dense_again.eval()(*inputs), gm(*inputs)) < 1e-6
    lowered = lower(gm, inputs)
    assert relative(lowered(*inputs), gm(*inputs)) < 1e-5
    assert f"{cross}.in_proj_weight" not in lowered.state_dict()
    save(gm, tmp_path / "model.mpc")
    assert torch.equal(load(tmp_path / "model.mpc")(*inputs), gm(*inputs))


def test_training():
    """Dropout follows the mode; gradients reach the kept values of every projection, and no others."""
    torch.manual_seed(0)
    model, inputs = stirred(Detector()), (images(2), torch.zeros(2, 16, dtype=torch.bool))
    gm = transform(model, inputs, SPARSE)
    assert torch.equal(gm(*inputs), gm(*inputs))
    gm.train()
    assert not torch.equal(gm(*inputs), gm(*inputs))
    gm(*inputs).square().sum().backward()
    for layer in layers(gm):
        if "in_proj" in layer.name:
            start, stop = map(int, layer.name.split("_rows_")[1].split("_")) if "_rows_" in layer.name else (0, 96)
            gradient = gm.get_parameter(layer.name.split("_rows_")[0]).grad[start:stop]
            assert bool((gradient[~layer.mask.tensor] == 0).all()) and bool((gradient[layer.mask.tensor] != 0).any())
    gm.eval()
    assert torch.equal(gm(*inputs), gm(*inputs))


@pytest.mark.parametrize("first", [False, True])
def test_fused_kernels(first):
    """Without gradients, dynamo and torch.export record torch's kernel of a whole layer."""
    model = stirred(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=first)).requires_grad_(False)
    expected = model(X)
    captured = capture(model, X)
    exported = import_model(torch.export.export(model, (X,), strict=True).module(), X).gm
    for gm in (captured.gm, exported):
        assert not any("_fwd" in str(target) or "native" in str(target) for target in calls(gm))
    assert len(layers(exported)) == len(layers(captured.gm, captured.lifted)) == 4
    torch.testing.assert_close(exported(X), expected, rtol=1e-5, atol=1e-6)


class Variant(nn.Module):
    """Fused attention as it is called below autograd on a CPU."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.fc(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=0.3)[0]


def test_a_variant_of_fused_attention():
    model = Variant()
    gm = import_model(torch.export.export(model, (X,)).module(), X).gm
    assert F.scaled_dot_product_attention in calls(gm)
    torch.testing.assert_close(gm(X), model(X), rtol=1e-5, atol=1e-6)


class Renamed(nn.MultiheadAttention):
    pass


def test_a_subclass_without_a_forward_of_its_own():
    model = Attention(itself, batch_first=True)
    model.attention = Renamed(16, 4, batch_first=True)
    gm = transform(stirred(model), X, SPARSE)
    assert gm.plan.masked == ["attention.in_proj_weight"]


def hooked(attention):
    attention.register_forward_hook(lambda module, inputs, output: None)


def parametrized(attention):
    torch.nn.utils.parametrizations.weight_norm(attention.out_proj)


def projecting(attention):
    attention.out_proj.register_forward_pre_hook(lambda module, inputs: None)


@pytest.mark.parametrize(
    ("change", "why"), [(hooked, "hooks"), (parametrized, "parametrized"), (projecting, "output projection has hooks")]
)
def test_what_stays_a_single_call(change, why):
    class Net(Attention):
        def __init__(self):
            super().__init__(itself, batch_first=True)
            self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.fc(super().forward(x)).relu())

    model = Net().eval()
    change(model.attention)
    gm = transform(model, X, SPARSE)
    assert gm.plan.masked == ["fc"]
    reason = gm.plan.layers["attention.in_proj_weight"].reason
    assert reason.startswith("inside MultiheadAttention: it") and why in reason


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Transformer(16, 4, 1, 2, 32, batch_first=True, norm_first=True)

    def forward(self, source, target, mask):
        return self.model(source, target, tgt_mask=mask, tgt_is_causal=True)


def test_a_whole_transformer():
    torch.manual_seed(0)
    model, inputs = stirred(Translator()), (X, Y, TRIANGLE)
    gm = transform(model, inputs, SPARSE)
    assert len(gm.plan.masked) == 4 + 2 * (2 + 3 + 2)
    torch.testing.assert_close(
        transform(model, inputs, Config(pattern="dense"))(*inputs), model(*inputs), rtol=1e-5, atol=1e-5
    )


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)

    def forward(self, x, hidden):
        return self.encoder(x, src_key_padding_mask=hidden)


def test_hidden_tokens_without_nested_tensors():
    model = stirred(Nested())
    imported = import_model(model, (Y, HIDDEN))
    assert any("without nested tensors" in note for note in imported.notes)
    torch.testing.assert_close(imported.gm(Y, HIDDEN), model(Y, HIDDEN), rtol=1e-5, atol=1e-5)


def test_channels_are_permuted_alike_in_both_graphs():
    model, x = vision_transformer(), images(4)
    for source in (model, torch.export.export(model, (x,)).module()):
        gm = transform(source, x, Config(pattern="2:4", restore=False), calibration=images(4, seed=2))
        permuted = [name for name, layer in gm.plan.layers.items() if "permute" in layer.notes]
        assert len(permuted) == 8
        state = dense_state(gm)
        again = copy.deepcopy(model)
        again.load_state_dict(state)
        assert relative(again(x), gm(x)) < 1e-6


class Twice(nn.Module):
    """One decoder that runs twice, the second time on what it returned."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
        self.stem, self.decoder, self.head = nn.Conv2d(3, 32, 8, 8), nn.TransformerDecoder(layer, 2), nn.Linear(32, 16)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.decoder(self.decoder(tokens, tokens), tokens).mean(1))


@pytest.mark.parametrize("known", [True, False])
def test_a_module_that_is_called_twice(known, monkeypatch):
    """Both calls become layers; where the second stays whole, the module keeps what it needs."""
    again = iter([propagate])

    def once(gm, inputs):
        next(again, lambda gm, inputs: None)(gm, inputs)

    if not known:  # the shapes of what the first call returned
        monkeypatch.setattr("mpcompile.capture.attention.expansion.propagate", once)
    torch.manual_seed(0)
    model, x = stirred(Twice()), images(4)
    gm = import_model(model, (x,)).gm
    whole = [node for node in gm.graph.nodes if node.op == "call_module" and node.target == "decoder"]
    assert len(whole) == (not known)
    torch.testing.assert_close(gm(x), model(x))
    monkeypatch.undo()
    sparse = transform(model, x, SPARSE, [x])
    assert len(sparse.plan.masked) >= 12
    torch.testing.assert_close(lower(sparse)(x), sparse(x), atol=1e-4, rtol=1e-4)
