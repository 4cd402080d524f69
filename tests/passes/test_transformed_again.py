"""Transforming a module again: its plan records the first transform, and later plans still describe its weights."""

import copy

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile import Config, MPCompileError
from mpcompile.artifact.verify import verify
from mpcompile.backend import compiled_graphs, mpsparse
from tests.support.helpers import images, tiny_vit

MAGNITUDE = {"score": "magnitude"}


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def saved(gm, folder):
    mpcompile.save(gm, folder / "m.mpc")
    return mpcompile.load(folder / "m.mpc")


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("way", ["as it is", "deepcopy", "saved"])
@pytest.mark.parametrize("r", [0, 2])
def test_layers_that_were_to_stay_dense_are_not_pruned(way, r, tmp_path):
    x = images(2)
    gm = mpcompile.transform(tiny_vit(), x, Config(pattern="dense", tome_r=r)).eval()
    gm = {"as it is": gm, "deepcopy": copy.deepcopy(gm), "saved": saved(gm, tmp_path)}[way]
    with torch.no_grad():
        lowered = mpcompile.lower(gm, x)
        assert relative(lowered(x), gm(x)) < 1e-5 and lowered.plan.masked == []
        assert relative(torch.compile(gm, backend=mpsparse)(x), gm(x)) < 1e-5


def test_masks_first_then_merging(tmp_path):
    x = images(2)
    masked = mpcompile.transform(tiny_vit(), x, Config(pattern="2:4", **MAGNITUDE))
    both = mpcompile.transform(masked, x, Config(pattern="dense", tome_r=2)).eval()
    for gm in (both, copy.deepcopy(both), saved(both, tmp_path)):
        assert gm.plan.masked == masked.plan.masked and gm.plan.tokens
        assert all(gm.plan.layers[name].pattern == "2:4" for name in masked.plan.masked)
        assert gm.plan.config["pattern"] == "2:4" and gm.plan.config["tome_r"] == 2
        assert gm.plan.macs.dense == masked.plan.macs.dense > gm.plan.macs.executed
        lowered = mpcompile.lower(gm, x, Config(engine="reference"))
        assert lowered.plan.macs == gm.plan.macs and lowered.plan.tokens == gm.plan.tokens
        again = mpcompile.transform(gm, x, Config(pattern="2:4", tome_r=2, **MAGNITUDE))
        assert again.plan.masked == masked.plan.masked and again.plan.macs == gm.plan.macs


def test_merging_first_then_masks():
    x = images(2)
    merged = mpcompile.transform(tiny_vit(), x, Config(pattern="dense", tome_r=2))
    both = mpcompile.transform(merged, x, Config(pattern="2:4", **MAGNITUDE))
    assert both.plan.tokens == merged.plan.tokens and both.plan.masked
    assert both.plan.macs.dense == merged.plan.macs.dense


@pytest.mark.parametrize("second", [{"pattern": "1:4"}, {"pattern": "3:4"}, {"mac_reduction": 0.2}])
@pytest.mark.parametrize("way", ["masked", "lowered"])
def test_another_mask_is_refused(second, way):
    x = images(2)
    gm = mpcompile.transform(tiny_vit(), x, Config(pattern="2:4", **MAGNITUDE))
    if way == "lowered":
        gm = mpcompile.lower(gm, x, Config(engine="dense"))
    with pytest.raises(MPCompileError, match=r"dense model|was made from"):
        mpcompile.transform(gm, x, Config(**second, **MAGNITUDE))


def test_other_merges_are_refused():
    x = images(2)
    gm = mpcompile.transform(tiny_vit(), x, Config(pattern="dense", tome_r=2))
    with pytest.raises(MPCompileError, match="tokens merge in it already"):
        mpcompile.transform(gm, x, Config(pattern="dense", tome_r=3))


def test_layers_left_out_can_be_masked_later_and_channels_stay():
    x = torch.randn(16, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    first = mpcompile.transform(model, x, Config(pattern="2:4", exclude=("head", "0")), [x])
    both = mpcompile.transform(first, x, Config(pattern="2:4"), [x])
    assert both.plan.masked == ["0", "2"]
    assert verify(both).ok


CONV = (nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 8))


@pytest.mark.usefixtures("no_inductor")
def test_masks_stay_if_nothing_can_merge(caplog):
    model, x = nn.Sequential(*copy.deepcopy(CONV)).eval(), torch.randn(2, 3, 8, 8)
    before = set(compiled_graphs())
    with torch.no_grad():
        torch.compile(model, backend=mpsparse, options={"tome_r": 2, "engine": "reference"})(x)
    assert [g.plan.masked for g in compiled_graphs() if g not in before] == [["2"]]
    assert "nothing merged" in caplog.text
    lowered = mpcompile.lower(model, x, Config(pattern="2:4", tome_r=2, engine="reference"))
    assert lowered.plan.masked == ["2"] and any("nothing merged" in note for note in lowered.plan.notes)
    with pytest.raises(MPCompileError, match="no attention block to merge in"):
        mpcompile.transform(model, x, Config(pattern="2:4", tome_r=2))
