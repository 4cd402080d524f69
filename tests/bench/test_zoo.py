"""The table of architectures: its page, its steps on a model, and what it says about those that fail."""

import json
import multiprocessing

import pytest
import torch
from torch import nn

from bench import zoo
from bench.architectures import page, steps
from mpcompile.errors import GraphError


def test_the_page_is_what_the_results_say():
    assert zoo.PAGE.read_text(encoding="utf-8") == page.render(zoo.load(zoo.RESULTS))


def test_a_model_goes_through_every_step(tmp_path, capsys):
    name, out = "wrapped:a namedtuple out", tmp_path / "zoo.json"
    assert zoo.main(["--only", name, "--out", str(out)]) == 0
    (record,) = json.loads(out.read_text())["models"]
    assert record["name"] == name and list(record["steps"]) == list(steps.STEPS)
    assert all(result["ok"] for result in record["steps"].values()), record
    assert name in capsys.readouterr().out
    assert "| a namedtuple out | traced | 8 of 10" in page.render(zoo.load(out))


def results(model, example, tmp_path):
    return dict(steps.Trial(model.eval(), example, tmp_path).results())


def test_reasons_of_refusals(tmp_path):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    found = results(Branch(), torch.randn(2, 8), tmp_path)
    assert list(found) == ["trace"] and found["trace"]["refused"]
    assert "data-dependent" in found["trace"]["why"]
    record = {"name": "wrapped:Branch", "steps": found}
    text = page.render({"versions": {}, "models": [record]})
    assert "| Branch | no (1)" in text and "\n1. " in text


def test_other_errors_are_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.mpcompile, "lower", lambda *_: 1 / 0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    found = results(model, torch.randn(2, 3, 8, 8), tmp_path)
    assert found["lower"] == {"ok": False, "refused": False, "why": "ZeroDivisionError: division by zero"}
    assert found["merge"]["refused"] and found["save"]["ok"] and found["train"]["ok"]


@pytest.mark.parametrize(
    ("found", "expected", "size"),
    [
        ({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 2.0])}, 0.5),
        ((torch.ones(2), None), (torch.ones(2), None), 0.0),
        (torch.ones(2), torch.ones(3), float("inf")),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), float("inf")),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("inf"), 1.0]), 0.0),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([2.0, 1.0]), float("nan")),
    ],
)
def test_differences(found, expected, size):
    difference = steps.difference(found, expected)
    assert difference == size or (size != size and not difference <= steps.EXACT)


def test_errors_are_one_line():
    assert steps.one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert steps.one_line(GraphError("a\nb")).count("\n") == 0


def endless():
    while True:
        pass


def test_a_model_that_takes_too_long(monkeypatch):
    monkeypatch.setattr(zoo, "builders", lambda: {"wrapped:endless": endless})
    record = zoo.supervised("wrapped:endless", 1, multiprocessing.get_context("fork"))
    assert record["steps"]["trace"] == {"ok": False, "refused": False, "why": "took more than 1 s"}
    assert "trace FAILED" in page.line(record)
