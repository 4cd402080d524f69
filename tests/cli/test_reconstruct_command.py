"""``mpcompile compile --reconstruct``: its result, resuming, and bad input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import mpcompile
from mpcompile.cli import main
from tests.support.helpers import labelled_images

MODELS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, last=torch.nn.Identity()):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), last)

    def forward(self, x):
        return x + self.inner(x)


class Root(nn.Module):
    def forward(self, x):
        return (-1 - x.abs()).sqrt()


def model(*middle):
    torch.manual_seed(0)
    ends = [nn.Conv2d(3, 16, 4, 4), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*ends).eval()


def residual():
    return model(Block(), Block())


def plain():
    return model(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU())


def broken():
    return model(Block(), Block(Root()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return labelled_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """Compile a model of ``MODELS``; the budget buys one round over the images at most."""
    monkeypatch.setattr("mpcompile.reconstruction.budget._MOST_VIEWS", 1)
    (tmp_path / "models.py").write_text(MODELS)

    def arguments(name: str, *more: str, images: str | None = str(folder / "train")) -> list[str]:
        made = ["compile", f"{tmp_path}/models.py:{name}", "--input-size", "3", "32", "32", "--pattern", "2:4"]
        made += ["--score", "magnitude", "--batch", "8", "--quiet", "--out", str(tmp_path / "out.mpc"), *more]
        return made if images is None else [*made, "--images", images]

    return arguments


def record(capsys) -> dict:
    """The decision of the pass in the Plan that the command printed."""
    plan = json.loads(capsys.readouterr().out)
    (found,) = [entry["decision"] for entry in plan["passes"] if entry["name"] == "reconstruct"]
    return found


def test_compile_reconstructs_and_resumes(command, tmp_path, capsys):
    work = tmp_path / "work"
    line = command("residual", "--reconstruct", "--minutes", "9", "--statistics", str(work), "--json", "-")
    assert main(line) == 0
    found = record(capsys)
    assert [region["name"] for region in found["regions"]] == ["1", "2"]
    for region in found["regions"]:
        better = region["held_after"] < region["held_before"]
        assert better == (region["reason"] is None)
    assert any(region["reason"] is None for region in found["regions"])
    weights = mpcompile.load(tmp_path / "out.mpc").state_dict()
    assert main(["verify", str(tmp_path / "out.mpc"), "--quiet"]) == 0
    times = {path: path.stat().st_mtime_ns for path in work.glob("reconstruct-0*")}
    assert len(times) == 2
    assert main(line) == 0
    assert {path: path.stat().st_mtime_ns for path in work.glob("reconstruct-0*")} == times
    again = mpcompile.load(tmp_path / "out.mpc").state_dict()
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_wrong_calls(command, capsys):
    for line, message in (
        (command("residual", "--minutes", "5"), "--minutes is the time budget of --reconstruct"),
        (command("residual", "--reconstruct", images=None), "--reconstruct needs images; expected --images FOLDER"),
        (command("residual", "--reconstruct", "--minutes", "nan"), "option 'minutes' is out of range"),
        (
            command("residual", "--reconstruct", "--minutes", "1e-7"),
            "the time budget is too short for one pass over the images; expected minutes=",
        ),
    ):
        assert main(line) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert message in error


def test_one_image_holds_nothing_out(command, folder, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    shutil.copy(folder / "train" / "bee" / "0.png", tmp_path / "one")
    line = command("residual", "--reconstruct", "--json", "-", images=str(tmp_path / "one"))
    assert main(line) == 0
    found = record(capsys)
    assert (found["images"], found["held"]) == (1, 0) and "one image" in found["notes"][0]
    assert all(region["held_before"] is None for region in found["regions"])


def test_without_blocks_each_layer_is_a_region(command, capsys):
    assert main(command("plain", "--reconstruct", "--json", "-")) == 0
    found = record(capsys)
    assert {region["kind"] for region in found["regions"]} == {"layer"}
    assert any("no block" in note for note in found["notes"])


def test_a_block_that_is_not_finite_keeps_its_weights(command, tmp_path, capsys):
    line = command("broken", "--no-restore", "--no-permute", "--reconstruct", "--json", "-")
    assert main(line) == 0
    first, second = record(capsys)["regions"]
    assert first["name"] == "1"
    assert second["name"] == "2" and "not finite" in second["reason"]
    weights = mpcompile.load(tmp_path / "out.mpc").state_dict()
    assert all(bool(value.isfinite().all()) for value in weights.values() if value.is_floating_point())
