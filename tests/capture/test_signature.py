"""Names of a graph's inputs and outputs, and calls from any form of example inputs, for traced and exported graphs."""

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mpcompile import Config, transform
from mpcompile.capture.signature import call_of, flatten_inputs, input_names, output_names, outputs
from mpcompile.errors import InputError

Pair = namedtuple("Pair", "logits features")
X, IDS = torch.randn(2, 16), torch.arange(2)


@dataclass
class Found:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


torch.export.register_dataclass(Found)

SHAPES = {
    "tensor": (lambda y: y, ["logits"]),
    "images": (lambda y: y[:, :, None], ["output"]),
    "integers": (lambda y: y.argmax(1), ["output"]),
    "tuple": (lambda y: (y, [y, y]), ["0", "1.0", "1.1"]),
    "dict": (lambda y: {"logits": y, "hidden_states": (y, y)}, ["logits", "hidden_states.0", "hidden_states.1"]),
    "ordered": (lambda y: OrderedDict(out=y, aux=y), ["out", "aux"]),
    "namedtuple": (lambda y: Pair(y, y), ["logits", "features"]),
    "nested": (lambda y: {"a": Pair(y, (y,))}, ["a.logits", "a.features.0"]),
    "dataclass": (Found, ["logits"]),
    "several of one operator": (lambda y: y.topk(2), ["0", "1"]),
    "none": (lambda y: {"logits": y, "loss": None}, ["logits", "loss"]),
}


class Net(nn.Module):
    """Returns what ``shape`` makes of its logits."""

    def __init__(self, shape):
        super().__init__()
        self.hidden, self.head, self.shape = nn.Linear(16, 16), nn.Linear(16, 4), shape

    def forward(self, x):
        return self.shape(self.head(self.hidden(x).relu()))


class Batched(Net):
    def forward(self, batch, scale=2.0, mask=None):
        y = super().forward(batch["image"]["pixels"]) * scale
        return {"logits": y, "id": batch["id"]}


def graph(model, kind, args, kwargs=None):
    """The same model as a traced graph or as one of torch.export, transformed."""
    model = model.eval()
    if kind == "exported":
        return transform(torch.export.export(model, args, kwargs).module(), None, Config(pattern="dense"))
    return transform(model, kwargs or args, Config(pattern="dense"))


both = pytest.mark.parametrize("kind", ["traced", "exported"])


@both
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_are_named_by_their_keys_and_fields(kind, name):
    shape, names = SHAPES[name]
    gm = graph(Net(shape), kind, (X,))
    assert input_names(gm) == ["x"]
    assert output_names(gm) == names
    made = outputs(gm)
    assert list(made) == names
    assert all(made[n] is None if n == "loss" else isinstance(made[n], torch.fx.Node) for n in names)


@both
def test_entries_of_a_dict_have_names_of_their_own(kind):
    batch = {"image": {"pixels": X}, "id": IDS}
    gm = graph(Batched(lambda y: y), kind, (batch, 3.0, None))
    assert input_names(gm)[:2] == ["batch.image.pixels", "batch.id"]
    assert output_names(gm) == ["logits", "id"]
    with torch.no_grad():
        expected = gm(batch, 3.0, None)
        for example in (
            (batch, 3.0, None),
            {"batch": UserDict(batch, labels=IDS), "scale": 3.0, "mask": None, "labels": IDS},
            {"mask": None, "scale": 3.0, "batch": {"id": IDS, "image": {"depth": X, "pixels": X}}},
        ):
            values = flatten_inputs(gm, example)
            assert len(values) == sum(node.op == "placeholder" for node in gm.graph.nodes)
            for keywords in (None, True, False):
                args, kwargs = call_of(gm, values, keywords=keywords)
                assert bool(kwargs) is (keywords is True) and bool(args) is (keywords is not True)
                assert torch.equal(gm(*args, **kwargs)["logits"], expected["logits"])


def test_numbers_that_are_not_given_keep_the_values_of_the_capture():
    batch = {"image": {"pixels": X}, "id": IDS}
    gm = graph(Batched(lambda y: y), "exported", (), {"batch": batch, "scale": 3.0})
    assert input_names(gm) == ["batch.image.pixels", "batch.id", "scale"]
    values = flatten_inputs(gm, (batch,))
    assert values[2] == 3.0
    args, kwargs = call_of(gm, values)
    assert args == () and list(kwargs) == ["batch", "scale"]
    assert flatten_inputs(gm, values) == values
    with pytest.raises(InputError, match="input 'x' is missing"):
        flatten_inputs(graph(Net(lambda y: y), "exported", (X,)), {"y": X})


def test_the_one_input_may_be_the_mapping_itself():
    class One(Net):
        def forward(self, batch):
            return super().forward(batch["image"])

    batch = defaultdict(lambda: None, image=X)
    gm = graph(One(lambda y: y), "exported", ({"image": X},))
    assert input_names(gm) == ["batch.image"]
    assert flatten_inputs(gm, batch)[0] is X and flatten_inputs(gm, {"batch": batch})[0] is X


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (7, "wrong type.*found int"),
        ((X, X, X, X), "more example inputs"),
        (({"image": X, "id": IDS},), "'batch.image' has another structure.*dict of pixels"),
        (({"id": IDS},), "'batch' has another structure.*dict of image, id.*found dict of id"),
    ],
)
def test_inputs_of_another_structure_are_refused(example, message):
    gm = graph(Batched(lambda y: y), "exported", ({"image": {"pixels": X}, "id": IDS},))
    with pytest.raises(InputError, match=message):
        flatten_inputs(gm, example)


@both
def test_several_positional_inputs_and_inputs_without_a_name(kind):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x, *more):
            return self.head(self.hidden(x + more[0] * more[1]).relu())

    more = torch.randn(2, 16), torch.randn(2, 16)
    model = Sum().eval()
    gm = torch.fx.symbolic_trace(model) if kind == "traced" else graph(model, kind, (X, *more))
    assert len(input_names(gm)) == (2 if kind == "traced" else 3)  # a bare trace does not know how many there are
    values = [X, more] if kind == "traced" else flatten_inputs(gm, (X, *more))
    args, kwargs = call_of(gm, values)
    assert kwargs == {}
    with torch.no_grad():
        assert torch.equal(gm(*args), model(X, *more))


def test_outputs_of_transformers_are_named_by_their_fields():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "output_hidden_states": True}
    gm = torch.export.export(Dinov2Model(config).eval(), (), inputs).module()
    assert input_names(gm) == ["pixel_values", "output_hidden_states"]
    names = ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(3))]
    assert output_names(gm) == names
    assert flatten_inputs(gm, UserDict(pixel_values=X, labels=IDS)) == [X, True]
