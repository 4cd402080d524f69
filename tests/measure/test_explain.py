"""Explain: one row per masked layer, every candidate's time or reason, and totals that add up."""

import json

import pytest
import torch

import mpcompile
from mpcompile import Config, cli
from mpcompile.errors import InputError
from mpcompile.kernels import dispatch, timing
from mpcompile.kernels.dispatch import Dense, Reference
from tests.support.helpers import images, mlp, tiny_vit


@pytest.fixture
def modelled(monkeypatch):
    """A cost model: linear layers are faster on the reference engine, convolutions as dense."""
    monkeypatch.setattr(dispatch, "ENGINES", (Reference(), Dense()))
    timing.set_cost_model(
        lambda name, spec, threads: {"reference": 5.0 if spec.geometry is None else 20.0, "dense": 10.0}.get(name)
    )
    yield
    timing.set_cost_model(None)


@pytest.mark.usefixtures("modelled")
def test_explains_a_transformer():
    model = tiny_vit()
    found = mpcompile.explain(model, images(), Config(tome_r=3, exclude=("head",)))
    rows = {layer.name: layer for layer in found.layers}
    assert len(rows) == 9 and "patch_embed.proj" not in rows  # 3 input channels
    assert rows["blocks.0.attn.qkv"].tokens == 3 * 17
    queries, others = (rows[f"blocks.1.attn.qkv.weight_rows_{part}"] for part in ("0_32", "32_96"))
    assert queries.tokens == 3 and others.tokens == 3 * 14 and rows["blocks.1.mlp.fc1"].tokens == 3
    assert all(layer.engine == "reference" and layer.us == 5.0 and layer.dense_us == 10.0 for layer in found.layers)
    assert (found.us, found.dense_us, found.speedup) == (45.0, 90.0, 2.0)
    text = str(found)
    assert "blocks.1.mlp.fc2" in text and "11.1%" in text and "2.00x" in text and "threads" in text
    data = json.loads(found.to_json())
    assert data["speedup"] == 2 and data["layers"][0]["candidates"] == {"reference": 5.0, "dense": 10.0}


@pytest.mark.usefixtures("modelled")
def test_explains_a_transformed_module_as_it_is():
    gm = mpcompile.transform(mlp(), torch.randn(2, 32), Config("4:8", score="magnitude"))
    before = {name: value.clone() for name, value in gm.state_dict().items()}
    found = mpcompile.explain(gm, torch.randn(2, 32), Config("2:4", engine="dense"))
    assert [(row.name, row.pattern, row.engine, row.why) for row in found.layers] == [
        ("0", "4:8", "dense", "asked for"),
        ("2", "4:8", "dense", "asked for"),
    ]
    assert found.layers[0].candidates["reference"] == 5.0 and found.speedup == 1
    assert all(torch.equal(value, before[name]) for name, value in gm.state_dict().items())


def test_without_timing_there_is_a_note(monkeypatch):
    monkeypatch.setattr(dispatch, "ENGINES", (Reference(), Dense()))
    found = mpcompile.explain(mlp(), torch.randn(2, 32))
    assert found.speedup is None
    assert "not timed" in str(found) and "timing is off" in str(found)


def test_a_dense_model_has_nothing_to_explain():
    with pytest.raises(InputError, match="no masked layer"):
        mpcompile.explain(mlp(), torch.randn(2, 32), Config("dense"))


def test_command_line_with_real_timings(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dispatch, "ENGINES", (Reference(), Dense()))
    monkeypatch.setenv("MPCOMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("MPCOMPILE_TIMING", "on")
    out = tmp_path / "explain.json"
    arguments = ["explain", "resnet10t", "--pattern", "auto", "--batch", "1", "--quiet", "--json", str(out)]
    arguments += ["--exclude", "stem", "head", "layer[234]*"]
    assert cli.main(arguments) == 0
    text, data = capsys.readouterr().out, json.loads(out.read_text())
    assert data["layers"] and all(layer["us"] > 0 for layer in data["layers"])
    assert {layer["pattern"] for layer in data["layers"]} == {"4:8", "8:16"}  # the stem has 24 channels
    assert data["speedup"] >= 1  # never slower than dense
    assert data["layers"][0]["name"] in text and str(tmp_path) in text
    assert len(list(tmp_path.glob("timings-*.json"))) == 1
    assert cli.main(arguments) == 0
    assert json.loads(out.read_text()) == data  # all from the cache
