"""The analysis of a whole model: its rows, its files, its plot, and the command."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpcompile import Analysis, MPCompileError, analyze, cli
from mpcompile.errors import ArtifactError, InputError
from mpcompile.rmt.analysis import study, study_all
from tests.support.helpers import tiny_vit


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(64, 192)
        self.conv = nn.Conv2d(64, 64, 3, bias=False)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.grouped = nn.Conv2d(64, 64, 1, groups=4)
        self.table = nn.Embedding(10, 64)
        self.one = nn.Conv1d(64, 64, 3)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([s * torch.randn(64, 64) for s in (1.0, 0.5, 2.0)]))
            self.conv.weight.normal_()


@pytest.fixture(scope="module")
def found() -> Analysis:
    return analyze(Model(), progress=False)


def test_queries_keys_values_taps_and_omitted_layers(found):
    layers = found.layers
    assert [f.sigma for f in layers["qkv"].fits.values()] == pytest.approx([1.0, 0.5, 2.0], rel=0.06)
    notes = layers["qkv"].notes()
    assert (
        notes["sigma"] == pytest.approx(math.sqrt(5.25 / 3), rel=0.06) and notes["edge"] == layers["qkv"].fits["v"].edge
    )
    assert set(notes["blocks"]) == {"q", "k", "v"} and 0.9 < notes["noise_share"] <= 1
    taps = layers["conv"].taps
    assert (
        layers["conv"].fits[""].shape == (64, 576) and taps["of"] == 9 and taps["edge"] == pytest.approx(16, rel=0.05)
    )
    reasons = {name: layer.reason for name, layer in layers.items() if layer.reason}
    assert reasons == {"depthwise": "depthwise", "grouped": "4 groups", "table": "embedding", "one": "3 axes"}
    assert list(layers) == ["qkv", "conv", "depthwise", "grouped", "table", "one"]


def test_json_and_table_name_every_layer(found):
    data = json.loads(found.to_json(indent=1))
    assert set(data) == set(found.layers)
    assert data["qkv"]["fits"]["q"]["verdict"] == "mp" and data["depthwise"]["reason"] == "depthwise"
    text = str(found)
    assert all(name in text for name in [*found.layers, "qkv k", "9 of 9 mp", "4 matrices", "4 not fitted"])


def test_threads_and_order_change_nothing():
    weights = {f"w{i}": torch.randn(64 + i, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    one = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = study_all(weights, progress=False)
        torch.set_num_threads(2)
        together = study_all(weights, progress=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(one)
    assert list(alone) == list(together) == list(weights)
    assert all(alone[k].fits == together[k].fits for k in weights)


def test_a_state_dict_is_accepted():
    model = Model()
    found = analyze(model.state_dict(), progress=False)
    assert found.layers["qkv"].fits == analyze(model, progress=False).layers["qkv"].fits
    assert (
        found.layers["depthwise"].reason and "table" in found.layers
    )  # a state dict does not distinguish an embedding from a layer


def test_plots_are_written_atomically(found, tmp_path):
    found.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    found.plot(tmp_path / "a.pdf")
    with pytest.raises(ArtifactError, match=r"cannot write .*a\.nonsense.*format"):
        found.plot(tmp_path / "a.nonsense")
    with pytest.raises(ArtifactError, match="writable folder"):
        found.plot(tmp_path / "missing" / "a.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pdf", "a.png"]


def test_bad_weights_name_their_layer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[0, 0] = math.nan
    with pytest.raises(InputError, match="1: weight is not finite: 1 of 64"):
        analyze(model, progress=False)
    with pytest.raises(InputError, match="nothing to analyse"):
        analyze(nn.ReLU())
    with pytest.raises(InputError, match="meta"):
        study("far", torch.empty(4, 4, device="meta"))


def test_degenerate_weights_get_a_verdict_and_finite_numbers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1), nn.Linear(2048, 64), nn.Linear(80, 80))
    with torch.no_grad():
        model[0].weight.zero_()
        model[3].weight.fill_(0.1)
    found = analyze(model, progress=False).layers
    assert [found[k].fits[""].verdict for k in "0123"] == ["not_mp", "low_confidence", "mp", "not_mp"]
    assert found["0"].notes()["noise_share"] == 0
    json.dumps({k: v.to_dict() for k, v in found.items()}, allow_nan=False)


def test_command(tmp_path, capsys):
    table, page = tmp_path / "a.json", tmp_path / "a.png"
    assert cli.main(["analyze", "resnet10t", "--quiet", "--json", str(table), "--plot", str(page), "--seed", "1"]) == 0
    text = capsys.readouterr().out
    assert "layer1.0.conv1" in text and "random weights, which are noise by construction" in text
    assert json.loads(table.read_text())["layer4.0.conv2"]["taps"]["of"] == 9 and page.exists()


def test_command_on_a_file(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file(tiny_vit().state_dict(), path)
    assert cli.main(["analyze", str(path), "--quiet"]) == 0
    assert "blocks.0.attn.qkv k" in capsys.readouterr().out
    assert cli.main(["analyze", str(path), "--pretrained", "--quiet"]) == 2
    assert cli.main(["analyze", str(tmp_path / "none.safetensors"), "--quiet"]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(found, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MPCompileError, match=r"pip install 'mpcompile\[report\]'"):
        found.plot(tmp_path / "a.png")
