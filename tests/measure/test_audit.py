"""The audit: counts that can be checked by hand, and notes on the code that ran."""

import importlib
import json

import pytest
import torch
from torch import nn

from mpcompile import Config, audit, transform
from mpcompile import backend as module
from mpcompile.backend import mpsparse
from mpcompile.errors import InputError
from mpcompile.measure.cost import dense_macs
from tests.support.helpers import images, mlp, tiny_vit


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
    monkeypatch.setattr("mpcompile.measure.audit.time_builds", lambda *args: times)
    report = audit(model, model, torch.randn(2, 32), dense_compiled=model, dense_bf16=False)
    assert [row.speedup for row in report.rows] == [0.5, 1.0, 0.5]
    assert [row.latency_ms for row in report.rows] == [4.0, 2.0, 4.0]
    assert any("slower than the best dense build (0.50x)" in note for note in report.notes)


def fake_times(monkeypatch, **medians):
    """Make every round of a build take these milliseconds."""
    times = {name.replace("_", " "): [ms] * 3 for name, ms in medians.items()}
    monkeypatch.setattr("mpcompile.measure.audit.time_builds", lambda builds, *args: {n: times[n] for n in builds})


def test_a_frozen_dense_build_is_part_of_the_bar(monkeypatch):
    torch._dynamo.reset()
    model, x = mlp(), torch.randn(2, 32)
    fake_times(monkeypatch, dense_eager=4.0, dense_compiled=3.0, dense_frozen=2.0, compiled_sparse=1.0)
    report = audit(model, model, x, dense_bf16=False)
    assert [(row.name, row.speedup) for row in report.rows[2:]] == [("dense frozen", 1.0), ("compiled sparse", 2.0)]
    frozen, plain = report["dense frozen"], report["dense eager"]
    assert frozen.difference < 1e-6
    assert (frozen.macs, frozen.weight_bytes) == (plain.macs, plain.weight_bytes) and frozen.macs
    assert [row.name for row in audit(model, model, x, rounds=0).rows] == [
        "dense eager",
        "dense compiled",
        "compiled sparse",
    ]


def test_dense_bf16_is_a_row_but_not_the_baseline(monkeypatch):
    model = mlp()
    fake_times(monkeypatch, dense_eager=4.0, dense_compiled=2.0, dense_bf16=0.5, compiled_sparse=1.0)
    report = audit(model, model, torch.randn(2, 32), dense_compiled=model, dense_bf16=lambda x: model(x) * 1.25)
    assert [row.name for row in report.rows] == ["dense eager", "dense compiled", "dense bf16", "compiled sparse"]
    assert [row.speedup for row in report.rows] == [0.5, 1.0, 4.0, 2.0]
    row = report["dense bf16"]
    assert row.difference == pytest.approx(0.25) and row.agree == 1
    note = "dense bf16 takes 0.50 ms, 2.00x as fast as this fp32 build (relative difference of outputs 2.5e-01): run"
    assert any(n.startswith(note) for n in report.notes)


def test_a_slower_dense_bf16_gets_no_note(monkeypatch):
    model = mlp()
    fake_times(monkeypatch, dense_eager=4.0, dense_compiled=2.0, dense_bf16=1.5, compiled_sparse=1.0)
    report = audit(model, model, torch.randn(2, 32), dense_compiled=model, dense_bf16=model)
    assert not any("bf16" in note for note in report.notes)


@pytest.mark.parametrize("native", [False, True])
def test_dense_bf16_is_shown_if_the_processor_has_it(monkeypatch, native):
    own = importlib.import_module("mpcompile.measure.builds")
    monkeypatch.setattr(own, "has_bf16", lambda: native)
    monkeypatch.setattr(own.torch, "compile", lambda module: module)
    model, x = mlp(), torch.randn(6, 32)

    def shown(x, **options):
        report = audit(model, model, x, dense_compiled=model, **{"rounds": 1, **options})
        return next((row for row in report.rows if row.name == "dense bf16"), None)

    row = shown(x)
    assert (row is not None) == native
    if row is not None:
        assert 1e-4 < row.difference < 2e-2
        assert row.weight_bytes == 2 * sum(p.numel() for p in model.parameters())
        assert row.macs == 32 * 48 + 48 * 64 + 64 * 5
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert shown(x, rounds=0) is None and shown(x, dense_bf16=False) is None
    assert shown(x, rounds=0, dense_bf16=True) is not None


def lowered(monkeypatch, engine, ms, **times):
    """The report of a lowered MLP with an invented choice for its first layer and an invented latency."""
    monkeypatch.setattr(module, "_inductor", lambda gm, *rest: gm)
    torch._dynamo.reset()
    model, x = mlp(), torch.randn(6, 32)
    gm = transform(model, x, Config(score="magnitude"))
    compiled = torch.compile(gm, backend=mpsparse)
    before = set(module.compiled_graphs())
    with torch.no_grad():
        compiled(x)
    (graph,) = set(module.compiled_graphs()) - before
    for layer in graph.plan.layers.values():
        layer.notes.pop("lower", None)
    graph.plan.layers["0"].notes["lower"] = {"us": times.get(engine), "dense_us": times.get("dense")}
    fake_times(monkeypatch, dense_eager=4.0, dense_compiled=2.0, compiled_sparse=ms)
    return audit(model, compiled, x, dense_compiled=model, dense_bf16=False)


def test_the_predicted_saving_is_compared_with_that_of_the_whole_model(monkeypatch):
    times = {"cpu": 300.0, "dense": 800.0}
    report = lowered(monkeypatch, "cpu", 1.5, **times)
    assert report.predicted_saving_ms == pytest.approx(0.5)
    assert "by their timings, layers save 0.50 ms of 0.80 ms; the whole model saves 0.50 ms" in report.notes
    assert json.loads(report.to_json())["predicted_saving_ms"] == report.predicted_saving_ms
    report = lowered(monkeypatch, "cpu", 2.5, **times)
    (note,) = [n for n in report.notes if n.startswith("WARNING")]
    assert "to save 0.50 ms of 0.80 ms, but the whole model takes 0.50 ms more" in note and 'engine="dense"' in note


@pytest.mark.parametrize("times", [{}, {"cpu": None, "dense": None}, {"cpu": 3.0}, {"dense": 3.0}])
def test_without_timings_nothing_is_predicted(monkeypatch, times):
    report = lowered(monkeypatch, "cpu", 2.5, **times)
    assert report.predicted_saving_ms is None
    assert not any("by their timings" in note for note in report.notes)


def test_macs_bytes_plan_and_json_of_a_lowered_model(monkeypatch):
    monkeypatch.setattr(module, "_inductor", lambda gm, *rest: gm)
    torch._dynamo.reset()
    model, x = mlp(), torch.randn(6, 32)
    gm = transform(model, x, Config(score="magnitude"))
    report = audit(
        model,
        torch.compile(gm, backend=mpsparse, options={"engine": "reference"}),
        x,
        rounds=2,
        dense_compiled=model,
        dense_bf16=False,
        others={"masked": gm},
    )
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
    monkeypatch.setattr(module, "_inductor", lambda gm, *rest: gm)
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


def test_an_empty_batch_has_no_macs_per_sample():
    assert dense_macs(mlp(), torch.randn(0, 32)) is None and dense_macs(mlp(), torch.randn(2, 32)) > 0


def test_old_names_warn():
    own = importlib.import_module("mpcompile.measure.audit")
    with pytest.warns(DeprecationWarning, match=r"mpcompile\.measure\.environment\.conditions"):
        assert own.environment(torch.zeros(2))["batch"] == 2
