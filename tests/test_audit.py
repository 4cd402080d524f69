"""The audit: counts that can be checked by hand, and remarks that say what ran."""

import json
import sys

import pytest
import torch
from torch import nn

from mpcompile import Config, audit, transform
from mpcompile import backend as module
from mpcompile.backend import mpsparse
from mpcompile.errors import InputError
from tests.helpers import images, mlp, tiny_vit


class Fixed(nn.Module):
    """Returns rows of a table: predictions chosen by hand."""

    def __init__(self, predictions):
        super().__init__()
        self.table = nn.Parameter(torch.eye(5)[predictions])

    def forward(self, x):
        return self.table[x[:, 0].long()]


def test_accuracy_agreement_and_paired_counts():
    dense, other = Fixed([0, 1, 2, 3]), Fixed([0, 1, 4, 4])
    x, y = torch.arange(4)[:, None].float(), torch.tensor([0, 0, 2, 4])
    report = audit(dense, other, [(x[:3], y[:3]), (x[3:], y[3:])], rounds=0, dense_compiled=dense)
    row = report["compiled sparse"]
    assert (report["dense eager"].correct, row.correct, row.samples) == (2, 2, 4)
    assert (row.lost, row.won, row.agree) == (1, 1, 0.5)
    assert row.interval == pytest.approx((0.15004, 0.84996), abs=1e-4)  # Wilson, 2 of 4
    again = audit(dense, other, x, y, rounds=0, dense_compiled=dense)["compiled sparse"]
    assert (again.correct, again.interval) == (row.correct, row.interval)


def test_speedup_is_best_dense_median_over_own_median(monkeypatch):
    model = mlp()
    times = {"dense eager": [4.0, 4.0, 9.0], "dense compiled": [2.0, 2.0, 2.0], "compiled sparse": [3.0, 8.0, 4.0]}
    monkeypatch.setattr(sys.modules["mpcompile.audit"], "_time", lambda *args: times)  # audit names the function too
    report = audit(model, model, torch.randn(2, 32), dense_compiled=model)
    assert [row.speedup for row in report.rows] == [0.5, 1.0, 0.5]
    assert [row.latency_ms for row in report.rows] == [4.0, 2.0, 4.0]
    assert any("slower than the best dense build (0.50x)" in note for note in report.notes)


def test_macs_bytes_plan_and_json_of_a_lowered_model(monkeypatch):
    monkeypatch.setattr(module, "_inductor", lambda gm, inputs, mode: gm)
    torch._dynamo.reset()
    model, x = mlp(), torch.randn(6, 32)
    gm = transform(model, x, Config(score="magnitude"))
    report = audit(model, torch.compile(gm, backend=mpsparse), x, rounds=2, dense_compiled=model, others={"masked": gm})
    assert [row.name for row in report.rows] == ["dense eager", "dense compiled", "masked", "compiled sparse"]
    row = report["compiled sparse"]
    masked = 32 * 48 + 48 * 64
    assert report["dense eager"].macs == masked + 64 * 5
    assert row.macs == masked // 2 + 64 * 5
    parameters = 4 * (masked + 64 * 5 + 48 + 64 + 5)
    assert report["dense eager"].weight_bytes == parameters
    assert row.weight_bytes == parameters - 4 * masked + 4 * masked // 2 + masked // 8
    assert report.plan is gm.plan and row.latency_ms > 0
    data = json.loads(report.to_json())
    assert data["rows"][3]["macs"] == row.macs and data["plan"]["layers"]["0"]["pattern"] == "2:4"
    assert "no labels" in str(report) and "vs best dense" in str(report)


def test_one_call_models_are_counted_from_their_graphs(monkeypatch):
    monkeypatch.setattr(module, "_inductor", lambda gm, inputs, mode: gm)
    torch._dynamo.reset()
    model, x = mlp(), torch.randn(6, 32)
    report = audit(model, torch.compile(model, backend=mpsparse), x, rounds=0, dense_compiled=mlp())
    masked = 32 * 48 + 48 * 64
    assert report["compiled sparse"].macs == masked // 2 + 64 * 5
    assert report["dense eager"].macs == masked + 64 * 5
    assert report.plan.masked == ["0", "2"]


def test_dense_macs_are_counted_under_attention_pooling():
    model = tiny_vit(global_pool="map", class_token=False)
    gm = transform(model, images(2), Config(pattern="dense"))
    report = audit(model, gm, images(2), rounds=0, dense_compiled=model)
    assert report["dense eager"].macs == gm.plan.macs.dense


def test_modes_are_restored():
    model = mlp().train()
    audit(model, model, torch.randn(2, 32), rounds=0, dense_compiled=model)
    assert model.training


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        ([], None, "no inputs"),
        (torch.randn(4, 32), torch.zeros(3), "4 labels"),
        ([["text"]], None, "no tensor"),
    ],
)
def test_bad_input(inputs, labels, message):
    with pytest.raises(InputError, match=message):
        audit(mlp(), mlp(), inputs, labels, rounds=0, dense_compiled=mlp())


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="another shape"):
        audit(mlp(), nn.Linear(32, 3), torch.randn(4, 32), rounds=0, dense_compiled=mlp())
