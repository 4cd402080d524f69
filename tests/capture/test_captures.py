"""Which capture takes a model, what its graph keeps, and how the refusal of all of them reads."""

import threading
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import TypedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from transformers import BatchFeature, ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification
from typing_extensions import Unpack

from mpcompile import Config, lower, transform
from mpcompile.capture.exported import dynamo_graph, export, import_captured, strict_export
from mpcompile.capture.inputs import arguments, call_for
from mpcompile.errors import GraphError, InputError, TraceError
from tests.support.helpers import mlp, relative

DENSE, HALF = Config(pattern="dense", skip_dead_tokens=False), Config(pattern="2:4")  # DENSE: the same operations
X = torch.randn(4, 32)
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def hf_vit(**options):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VIT, image_size=32, patch_size=8, num_labels=8, **options)).eval()


class ByShape(nn.Module):
    """Branches on a shape, which symbolic tracing cannot follow."""

    def __init__(self):
        super().__init__()
        self.body, self.dropout = mlp(), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.body(x if x.shape[-1] == 32 else F.pad(x, (0, 32 - x.shape[-1]))))


class Locked(ByShape):
    """Takes a lock, which dynamo cannot follow."""

    lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return super().forward(x)


class ByValue(ByShape):
    """Branches on a value: no capture can take it."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


# --- The order of the captures ---


@pytest.mark.parametrize(
    ("model", "captured", "failed"),
    [
        (mlp, "symbolic tracing", []),
        (ByShape, "torch.export, strict, batch free", ["symbolic tracing"]),
        (Locked, "torch.export, non-strict, batch free", ["symbolic tracing", "torch.export, strict"]),
    ],
)
def test_the_first_capture_that_succeeds_is_taken_and_named(model, captured, failed):
    model = model().eval()
    gm = transform(model, X, DENSE)
    assert gm.plan.captured == captured and f"graph: {captured}" in str(gm.plan)
    notes = [note.partition(" failed: ")[0] for note in gm.plan.notes if " failed: " in note]
    assert notes == failed
    assert torch.equal(gm(X), model(X)) and torch.equal(gm(X[:1]), model(X[:1]))


def test_a_graph_is_taken_as_it_is():
    assert transform(torch.fx.symbolic_trace(mlp()), X, DENSE).plan.captured == "a graph as given"


def test_the_refusal_names_the_reason_of_each_capture():
    with pytest.raises(TraceError) as raised:
        transform(ByValue().eval(), X, DENSE)
    first, *attempts = str(raised.value).splitlines()
    assert first.startswith("ByValue cannot be traced") and "data-dependent" in first.lower()
    assert "test_captures.py:" in first and "torch.compile" in first
    names = ["symbolic tracing", "torch.export, strict", "torch.export, non-strict", "dynamo"]
    assert [line.strip().partition(": ")[0] for line in attempts] == names
    assert all(line.isprintable() and len(line) < 600 for line in [first, *attempts])


def test_what_the_model_itself_raises_is_the_first_line():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            if x.shape[-1] != 31:
                raise ValueError("this model takes 31 values")
            return self.body(x)

    with pytest.raises(TraceError, match=r"^Broken cannot be traced: .*this model takes 31 values"):
        transform(Broken(), X, DENSE)


def test_the_model_and_torch_are_left_as_they_were(capsys):
    model = ByValue().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(TraceError):
        transform(model, X, DENSE)
    assert torch.equal(state, torch.get_rng_state()) and model.training and model.dropout.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(type(t) is not nn.Parameter for t in model.parameters()) and not model._forward_hooks
    assert "class GraphModule" not in capsys.readouterr().err  # torch prints what it has captured so far


@pytest.mark.parametrize("capture", [strict_export, export, dynamo_graph])
def test_every_capture_keeps_weights_names_and_results(capture):
    model = ByShape().eval()
    imported = import_captured(model, {"x": X}, capture)
    gm = imported.gm
    assert gm.state_dict().keys() == model.state_dict().keys() and len(imported.inputs) == 1
    assert torch.equal(gm(x=X), model(X)) and torch.equal(gm(x=X[:2]), model(X[:2]))
    assert all(a is not b for a, b in zip(gm.parameters(), model.parameters(), strict=True))
    gm.train()
    torch.manual_seed(0)
    expected = model.train()(X)
    torch.manual_seed(0)
    assert torch.equal(gm(x=X), expected) and (expected == 0).any()


# --- Shapes ---


def test_a_batch_of_one_leaves_the_batch_free():
    model = ByShape().eval()
    gm = transform(model, X[:1], HALF)
    assert gm.plan.captured.endswith("batch free") and gm(X).shape == (4, 5)
    assert lower(gm, X[:1], Config(engine="reference"))(X).shape == (4, 5)


def test_a_model_that_fixes_its_batch_says_so():
    class One(ByShape):
        def forward(self, x):
            if len(x) != 1:
                raise ValueError("one sample at a time")
            return super().forward(x)

    gm = transform(One().eval(), X[:1], DENSE)
    assert gm.plan.captured.endswith("batch fixed") and gm(X[:1]).shape == (1, 5)
    with pytest.raises(InputError, match=r"input x .*batch 1.*found .4, 32"):
        gm(X)


def test_a_batch_of_one_that_a_doubled_batch_does_not_describe_stays_fixed():
    class Halves(ByShape):
        def forward(self, x):
            return super().forward(x[: len(x) // 2 + 1] + x[len(x) // 2 :][: len(x) // 2 + 1])

    model = Halves().eval()
    gm = transform(model, X[:1], DENSE)
    assert torch.equal(gm(X[:1]), model(X[:1]))


def test_other_axes_stay_free_where_asked():
    class AnySize(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

        def forward(self, x):
            if x.shape[-1] < 4:
                raise ValueError("too small")
            return self.head(self.stem(x).mean((2, 3)))

    model, x = AnySize().eval(), torch.randn(2, 3, 8, 8)
    wide = torch.randn(3, 3, 8, 20)
    with pytest.raises(InputError):
        transform(model, x, DENSE)(wide)
    shapes = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}}
    gm = transform(model, x, DENSE, dynamic_shapes=shapes)
    assert torch.equal(gm(wide), model(wide))


def test_a_number_that_an_exported_graph_reads_from_a_tensor():
    class Scaled(ByShape):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x):
            return super().forward(x) * self.scale.item()

    model = Scaled().eval()
    exported = torch.export.export(model, (X,)).module()
    assert any(node.target is torch.ops.aten.item.default for node in exported.graph.nodes)
    gm = transform(exported, X, HALF)
    assert relative(lower(gm, X, Config(engine="reference"))(X), gm(X)) < 1e-5
    assert relative(transform(exported, X, DENSE)(X), model(X)) < 1e-6


# --- Modes ---


def test_a_captured_graph_follows_train_and_eval_and_trains():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 32], depths=[1, 1], num_labels=4)
    model = ResNetForImageClassification(config).eval()
    x = {"pixel_values": torch.randn(4, 3, 32, 32)}
    gm = transform(model, x, HALF)
    assert gm.locked_mode is None and gm.plan.masked
    with torch.no_grad():
        expected = transform(model, x, DENSE)(**x).logits
        assert torch.equal(expected, model(**x).logits)
    before = {name: value.clone() for name, value in gm.named_buffers() if "running_" in name}
    layer = gm.plan.masked[0]
    gm.train()
    gm(**x).logits.sum().backward()
    assert before and all(not torch.equal(value, gm.get_buffer(name)) for name, value in before.items())
    gradient = gm.get_parameter(f"{layer}.weight").grad
    assert gradient.any() and gm.state_dict().keys() >= model.state_dict().keys()
    gm.eval()
    after = {name: gm.get_buffer(name).clone() for name in before}
    gm(**x)
    assert all(torch.equal(value, gm.get_buffer(name)) for name, value in after.items())
    lowered = lower(gm, x, Config(engine="reference"))
    assert relative(lowered(**x).logits, gm(**x).logits) < 1e-5


def test_modes_that_take_different_paths_are_told():
    class Paths(ByShape):
        def forward(self, x):
            y = super().forward(x)
            return y * 2 if self.training else y

    gm = transform(Paths().eval(), X, DENSE)
    assert gm.locked_mode is False and any("eval() only" in note for note in gm.plan.notes)
    with pytest.raises(GraphError, match=r"train\(\)"):
        gm.train()


# --- Inputs ---


def test_labels_and_unknown_keys_of_a_batch_are_left_out():
    model = hf_vit()
    pixels = torch.randn(2, 3, 32, 32)
    batch = BatchFeature({"labels": torch.tensor([1, 2]), "pixel_values": pixels, "image_id": torch.tensor([7, 8])})
    gm = transform(model, batch, DENSE)
    assert "inputs left out: labels, image_id" in gm.plan.notes
    result = gm(pixel_values=pixels)
    assert result.keys() == {"logits"} and torch.equal(result.logits, model(pixels).logits)


class _Options(TypedDict, total=False):
    gain: float


def test_what_a_call_takes():
    class Net(nn.Module):
        def forward(self, x, labels=None, *, scale=1.0, **rest: Unpack[_Options]):
            return x

    net = Net()
    assert call_for(net, X).args == (X,)
    call = call_for(net, UserDict(scale=2.0, x=X, gain=3.0, labels=X, other=X))
    assert call.kwargs == {"scale": 2.0, "x": X, "gain": 3.0} and call.left_out == ("labels", "other")
    with pytest.raises(InputError, match="do not fit forward"):
        call_for(net, {"scale": 1.0})
    with pytest.raises(InputError, match="wrong type"):
        call_for(net, 3)
    assert arguments(net, {"scale": 2.0, "x": X}) == [X, 2.0]


def test_labels_that_a_model_needs_are_kept():
    class Loss(nn.Module):
        def forward(self, x, labels):
            return F.cross_entropy(x, labels)

    assert set(call_for(Loss(), {"x": X, "labels": X}).kwargs) == {"x", "labels"}


# --- Outputs ---

Pair = namedtuple("Pair", "logits features")


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor | None = None


@pytest.mark.parametrize("kind", [Pair, Result])
@pytest.mark.parametrize("base", [ByShape, mlp])
def test_structured_outputs_keep_their_class(kind, base):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = base()

        def forward(self, x):
            y = self.net(x)
            return kind(y, y * 2)

    model = Net().eval()
    gm = transform(model, X, HALF)
    result = lower(gm, X, Config(engine="reference"))(X)
    assert type(result) is kind and relative(result.features, 2 * result.logits) < 1e-6
    assert relative(result.logits, gm(X).logits) < 1e-5
