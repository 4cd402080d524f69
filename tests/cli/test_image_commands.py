"""Commands on untidy folders: labels by name or none, and a note on skipped files below the result."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mpcompile
from mpcompile import Config, cli, transform
from mpcompile.sources import timm_models
from tests.support.helpers import tiny_created

NAMES = [f"class{number}" for number in range(10)]


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """Models that commands create by name are two blocks deep and are not compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_models, "create", tiny_created)
        patch.setattr(torch, "compile", lambda model, **_: model)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dense weights, an artifact that knows its classes, and images of some of them."""
    path = tmp_path_factory.mktemp("made")
    model = tiny_created()
    save_file(model.state_dict(), path / "dense.safetensors")
    gm = transform(model, torch.randn(2, 3, 32, 32), Config(pattern="2:4", score="magnitude")).eval()
    gm.plan.provenance = {"model": "tiny", "class_names": NAMES}
    mpcompile.save(gm, path / "pruned.mpc")
    for name in (3, 7):
        (path / "images" / NAMES[name]).mkdir(parents=True)
        Image.effect_noise((40, 36), 60).convert("RGB").save(path / "images" / NAMES[name] / "0.png")
    return path


@pytest.mark.parametrize("command", ["audit", "certify", "compile"])
def test_the_result_names_unread_files(command, made, tmp_path, capsys):
    images = tmp_path / "images"
    images.symlink_to(made / "images")
    call = [command, "tiny", "--checkpoint", str(made / "dense.safetensors"), "--images", str(images), "--quiet"]
    if command == "compile":
        call += ["--score", "magnitude", "--no-permute", "--out", str(tmp_path / "x.mpc")]
    else:
        call += ["--artifact", str(made / "pruned.mpc"), "--json", str(tmp_path / "x.json")]
        call += ["--rounds", "0"] if command == "audit" else ["--tiers", "0"]
    assert cli.main(call) == 0
    tidy = capsys.readouterr().out
    assert "not read" not in tidy and "no labels" not in tidy
    if command == "audit":
        dense = json.loads((tmp_path / "x.json").read_text())["rows"][0]
        assert dense["samples"] == 2 and dense["correct"] is not None
    images.unlink()
    (images / "toad").mkdir(parents=True)
    for name in (3, 7):
        (images / NAMES[name]).symlink_to(made / "images" / NAMES[name])
    (images / "gone").symlink_to("nowhere")
    Image.new("RGB", (8, 8)).save(images / "toad" / "0.png")
    assert cli.main(call) == 0
    output = capsys.readouterr().out
    assert f"note: not read in {images}: 1 dangling link (gone)" in output
    assert ("no labels: the model has no classes called toad" in output) == (command != "compile")
    if command == "audit":
        assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["correct"] is None


@pytest.mark.parametrize("command", ["audit", "certify", "compile", "visualize"])
def test_a_damaged_image_is_named(command, made, tmp_path, capsys):
    path = tmp_path / "set" / NAMES[0] / "1.avif"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0\0\0\x20ftypavif" + bytes(40))
    call = [command, "tiny", "--checkpoint", str(made / "dense.safetensors"), "--quiet"]
    call += ["--image", str(path)] if command == "visualize" else ["--images", str(tmp_path / "set")]
    call += ["--artifact", str(made / "pruned.mpc")] if command in ("audit", "certify") else []
    call += ["--out", str(tmp_path / "out.png")] if command in ("visualize", "compile") else []
    assert cli.main(call) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line and line.startswith("mpcompile: cannot read")


def test_splits_are_not_measured_together(made, tmp_path, capsys):
    for split, name in (("TRAIN", 3), ("VAL", 7)):
        (tmp_path / split).mkdir()
        (tmp_path / split / NAMES[0]).symlink_to(made / "images" / NAMES[name])
    call = ["--checkpoint", str(made / "dense.safetensors"), "--images", str(tmp_path), "--quiet"]
    for command in (["audit", "tiny"], ["compile", "tiny", "--out", str(tmp_path / "x.mpc")]):
        assert cli.main([*command, *call]) == 2
        assert "holds several splits; expected images of one split, found TRAIN, VAL" in capsys.readouterr().err


def test_a_page_shows_images_of_one_name_apart(made, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr("mpcompile.page.pictures", lambda gm, path: [(str(path), None)])
    monkeypatch.setattr("mpcompile.page.write", lambda out, sources, title: shown.update(sources.pictures))
    paths = [str(made / "images" / NAMES[name] / "0.png") for name in (3, 7)]
    for given, names in ((paths, paths), (paths[:1], ["0.png"])):
        shown.clear()
        call = ["report", str(made / "pruned.mpc"), "--out", str(tmp_path / "x.html"), "--image", *given]
        assert cli.main(call) == 0 and list(shown) == names
