"""How models are called on batches: by name, in any order, without labels and other extras."""

import logging

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BatchFeature

from mpcompile import Config, audit, certify, distill, transform
from mpcompile.capture.inputs import call_for
from mpcompile.data.batches import unpack
from mpcompile.data.calls import call_form, graph_inputs
from mpcompile.data.labels import Labels, labels_in
from mpcompile.errors import InputError
from mpcompile.measure.evaluate import evaluate
from mpcompile.training.options import Training

X, CLASSES = torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 0, 1])


class Two(nn.Module):
    """Takes two inputs, and labels as models of transformers do; returns a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, pixel_values, scale=None, labels=None, **kwargs):
        y = self.a(pixel_values)
        y = y if scale is None else y + self.b(scale)
        return {"features": y[:, None], "logits": self.head(self.c(y.relu()).relu())}


class OneDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Two()

    def forward(self, batch):
        return self.net(batch["image"])["logits"], batch["id"]


def free(model, inputs):
    shapes = {name: {0: torch.export.Dim.AUTO} for name in inputs}
    return torch.export.export(model, (), inputs, dynamic_shapes={**shapes}).module()


def test_a_module_takes_what_it_knows(caplog):
    scale = torch.ones(6, 4)
    with caplog.at_level(logging.WARNING, "mpcompile"):
        for _ in range(2):
            batch = {"odd": 1, "scale": scale, "labels": CLASSES, "pixel_values": X}
            assert call_form(Two(), batch) == ((), {"scale": scale, "pixel_values": X})
    assert [line for line in caplog.messages if "odd" in line and "labels" not in line]
    assert sum("odd" in line for line in caplog.messages) == 1
    assert call_form(Two(), BatchFeature({"pixel_values": X, "labels": CLASSES})) == ((), {"pixel_values": X})
    for batch in (X, (X, CLASSES), [X]):
        assert call_form(Two(), batch) == ((X,), {})
    assert call_form(Two(), ({"pixel_values": X}, CLASSES)) == ((), {"pixel_values": X})


def test_models_of_one_dict_and_of_several_inputs():
    batch = {"image": X, "id": torch.arange(6)}
    assert call_form(OneDict(), batch)[0][0] is batch and call_form(OneDict(), (batch, CLASSES))[0][0] is batch
    bilinear = nn.Bilinear(8, 8, 2)
    assert call_form(bilinear, (X, X + 1, CLASSES))[0][1] is not X and len(call_form(bilinear, (X, X, CLASSES))[0]) == 2
    with pytest.raises(InputError, match=r"'input2' is missing; expected input1, input2"):
        call_form(bilinear, {"input1": X})
    with pytest.raises(InputError, match="a batch is empty"):
        call_form(bilinear, ())


def test_targets_of_segmentation_are_left_out_as_in_a_capture():
    batch = {"pixel_values": X, "mask_labels": CLASSES, "class_labels": CLASSES}
    assert call_form(Two(), batch) == ((), {"pixel_values": X})
    assert call_for(Two(), batch).left_out == ("mask_labels", "class_labels")


def test_graphs_take_names_in_any_order():
    inputs = {"pixel_values": X, "scale": torch.ones(6, 4)}
    for gm in (free(Two(), inputs), transform(Two(), inputs, Config("dense"))):
        values = graph_inputs(gm, {"labels": CLASSES, "scale": inputs["scale"], "pixel_values": X})
        assert values[0] is X and values[1] is inputs["scale"]
        args, kwargs = call_form(gm, {"scale": inputs["scale"], "pixel_values": X})
        assert torch.equal(gm(*args, **kwargs)["logits"], gm(**inputs)["logits"])
    with pytest.raises(InputError, match="'scale' is missing"):
        graph_inputs(free(Two(), inputs), {"pixel_values": X})


@pytest.mark.parametrize("kind", ["symbolic", "exported"])
def test_calibration_on_batches_of_loaders(kind, caplog):
    inputs = {"pixel_values": X, "scale": torch.ones(6, 4)}
    model = Two().eval()
    source = model if kind == "symbolic" else free(model, inputs)
    config = Config("2:4", score="wanda", tome_r=0)
    plain = transform(source, inputs, config, [inputs])
    with caplog.at_level(logging.WARNING, "mpcompile"):
        for batch in (
            BatchFeature({"labels": CLASSES, "scale": inputs["scale"], "pixel_values": X}),
            ({**inputs, "labels": CLASSES}, CLASSES),
            *([(X, inputs["scale"])] if kind == "exported" else []),
        ):
            gm = transform(source, inputs, config, [batch])
            assert all(torch.equal(v, plain.state_dict()[k]) for k, v in gm.state_dict().items())
    assert sum("calibration uses no labels" in line for line in caplog.messages) <= 1


def test_a_dict_as_the_one_input():
    batch = {"image": X, "id": torch.arange(6)}
    model = OneDict().eval()
    for source in (model, torch.export.export(model, (batch,)).module()):
        for data in ([batch], [(batch,)], [({**batch, "extra": 1}, CLASSES)]):
            gm = transform(source, (batch,), Config("2:4", score="wanda"), data)
            report = audit(model, gm, data, CLASSES, rounds=0, dense_compiled=model, progress=False)
            assert report.rows[-1].samples == 6 and report.rows[-1].correct is not None


@pytest.mark.parametrize("kind", ["symbolic", "exported"])
def test_labels_beside_the_inputs(kind):
    """Audit, evaluation, certificates and distillation read the batches of a Hugging Face loader."""
    model = Two().eval()
    inputs = {"pixel_values": X}
    gm = transform(model if kind == "symbolic" else free(model, inputs), inputs, Config("2:4"))
    batches = [{**inputs, "labels": CLASSES}] * 2
    report = audit(model, gm, batches, rounds=0, dense_compiled=model, progress=False)
    assert report.rows[-1].samples == 12 and report.rows[-1].correct is not None and report.rows[-1].macs
    right = (model(X)["logits"].argmax(1) == CLASSES).float().mean()
    assert report.rows[0].top1 == pytest.approx(float(right)) and evaluate(model, batches) == pytest.approx(
        float(right)
    )
    certificates = certify(model, gm, batches, tiers=(0,), progress=False)
    assert certificates.samples == 12
    if kind == "symbolic":
        result = distill(gm, model, batches, batches, Training(epochs=1, lr=1e-3), progress=False)
        assert result.steps == 2 and len(result.accuracy) == 1


def test_outputs_without_classes_are_compared_as_numbers():
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            y = self.last(self.first(x).relu()).reshape(-1, 2, 4)
            return {"boxes": y, "kept": y.sum(-1) > 0}

    model = Boxes().eval()
    gm = transform(model, X, Config("2:4"))
    row = audit(model, gm, [(X, CLASSES)], rounds=0, dense_compiled=model, progress=False).rows[-1]
    assert row.samples == 6 and row.agree is None and row.correct is None and row.difference > 0
    with pytest.raises(InputError, match=r"does not return logits.*boxes \(6, 2, 4\), kept \(6, 2\)"):
        evaluate(model, [(X, CLASSES)])


def test_labels_of_batches():
    assert labels_in((X, CLASSES), 6) is CLASSES and labels_in({"target": CLASSES}, 6) is CLASSES
    assert labels_in(({"x": X, "label": [1, 2]},), 2) == [1, 2]
    assert labels_in({"labels": np.arange(6)}, 6) is not None
    for other in (torch.zeros(6), torch.zeros(6, 4, dtype=torch.long), [{"boxes": 1}] * 6, None, "text"):
        assert labels_in({"labels": other}, 6) is None
    assert labels_in(X, 6) is None and labels_in((X,), 6) is None
    known = Labels()
    assert torch.equal(known.of({"x": X, "labels": CLASSES}, 6), CLASSES)


def test_images_of_a_mapping():
    batch = unpack({"labels": CLASSES, "pixel_values": X, "mask": X}, need_labels=True)
    assert batch.images is X and torch.equal(batch.labels, CLASSES) and batch.index is None
    batch = unpack({"x": X, "index": torch.arange(6)}, need_labels=False)
    assert batch.images is X and batch.index.tolist() == list(range(6))
    with pytest.raises(InputError, match="which of its entries are the images"):
        unpack({"a": X, "b": X}, need_labels=False)
