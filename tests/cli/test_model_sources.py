"""MODEL of every command: functions, folders, programs; what is printed, recorded in artifacts, and found again."""

import json
import sys

import pytest
import torch
from PIL import Image

import mpcompile
from mpcompile import cli
from tests.support.folders import LABELS, timm_folder
from tests.support.helpers import tiny_vit

FUNCTION = """
import torch
from tests.support.helpers import tiny_vit
def build(classes=10):
    return tiny_vit(num_classes=classes), torch.zeros(2, 3, 32, 32)
"""
FAST = ["--pattern", "2:4", "--score", "magnitude", "--no-permute"]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    (tmp_path / "own_models.py").write_text(FUNCTION)
    yield tmp_path
    sys.modules.pop("own_models", None)


@pytest.fixture
def images(place):
    """Images of two classes of :func:`tests.support.folders.timm_folder`."""
    for number, name in enumerate(("fox", "cat", "fox")):
        (place / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 70), 30 + 20 * number).convert("RGB").save(place / "images" / name / f"{number}.png")
    return place / "images"


def test_every_command_takes_a_function(place, images, capsys):
    name = "own_models.py:build"
    (place / "photo.png").write_bytes((images / "fox" / "0.png").read_bytes())
    merge = ["--tome-r", "1"]
    calls = {
        "compile": [name, *FAST, *merge, "--images", "images", "--out", "pruned.mpc"],
        "audit": [name, "--artifact", "pruned.mpc", "--rounds", "0"],
        "analyze": [name],
        "verify": [name],
        "explain": [name, *FAST, "--batch", "1"],
        "visualize": [name, "--image", "photo.png", *merge],
        "certify": [name, "--artifact", "pruned.mpc", "--images", "images", "--tiers", "0"],
    }
    statuses = {}
    for command, call in calls.items():
        statuses[command] = cli.main([command, *call])
        heard = capsys.readouterr()
        assert "own_models.py:build: function, VisionTransformer; weights: as the function made them" in heard.err, (
            command
        )
    assert set(statuses.values()) == {0}, statuses
    provenance = mpcompile.load("pruned.mpc").plan.provenance
    assert provenance["source"] == "function" and provenance["model"] == name and provenance["num_classes"] == 10
    assert cli.main(["audit", "--artifact", "pruned.mpc", "--rounds", "0"]) == 2
    assert "made by code, which is run only if you name it" in capsys.readouterr().err


def test_arguments_of_functions_and_of_timm(capsys):
    call = ["compile", "own_models:build", *FAST, "--out", "a.mpc", "--model-args", "classes=4"]
    assert cli.main(call) == 0
    assert mpcompile.load("a.mpc").plan.provenance["num_classes"] == 4
    capsys.readouterr()
    call = ["analyze", "vit_tiny_patch16_224", "--model-args", "depth=1", "img_size=32", "--quiet"]
    assert cli.main(call) == 0
    out = capsys.readouterr()
    assert "blocks.0.attn.qkv" in out.out and "blocks.1" not in out.out and out.err == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["clases=4"], "got an unexpected keyword argument 'clases'"),
        (["classes"], "--model-args is malformed; expected NAME=VALUE"),
        (["classes=[1"], "the value of --model-args classes is not YAML"),
        (["classes=1", "classes=2"], "--model-args gives classes twice"),
    ],
)
def test_arguments_that_are_wrong(given, message, capsys):
    assert cli.main(["analyze", "own_models:build", "--model-args", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mpcompile: ") and message in line


def test_a_folder_is_compiled_and_audited_by_its_class_names(place, images, capsys):
    timm_folder(place / "resnet10t")
    assert cli.main(["compile", "resnet10t", *FAST, "--images", "images", "--out", "pruned.mpc"]) == 0
    heard = capsys.readouterr().err
    assert "resnet10t: timm folder, resnet10t (timm" in heard and "3 classes (cat, dog, fox)" in heard
    provenance = mpcompile.load("pruned.mpc").plan.provenance
    assert provenance["class_names"] == list(LABELS) and provenance["weights"]["file"] == "model.safetensors"
    assert provenance["data"]["std"] == [0.25] * 3
    call = ["audit", "--artifact", "pruned.mpc", "--images", "images", "--rounds", "0", "--json", "audit.json"]
    assert cli.main(call) == 0  # the artifact names the folder
    dense = json.loads((place / "audit.json").read_text())["rows"][0]
    assert dense["samples"] == 3 and dense["correct"] is not None


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_a_program_keeps_its_batch(batch, images, capsys):
    torch.export.save(torch.export.export(tiny_vit(), (torch.zeros(batch, 3, 32, 32),)), "vit.pt2")
    call = ["compile", "vit.pt2", "--pattern", "2:4", "--images", "images", "--out", "pruned.mpc"]
    if batch == 4:
        assert cli.main(call) == 2
        assert "takes batches of 4 images alone; found 3 images" in capsys.readouterr().err
        return
    assert cli.main(call) == 0
    heard = capsys.readouterr()
    assert f"it takes batches of {batch} alone" in heard.err and ("1 images left out" in heard.out) == (batch == 2)
    assert cli.main(["audit", "vit.pt2", "--artifact", "pruned.mpc", "--images", "images", "--rounds", "0"]) == 0


def test_a_size_is_given_for_a_model_that_does_not_tell(capsys):
    call = ["compile", "torchvision.models:resnet18", "--input-size", "3", "40", "48", *FAST, "--out", "a.mpc"]
    assert cli.main(call) == 0
    assert mpcompile.load("a.mpc").plan.provenance["data"]["input_size"] == [3, 40, 48]


def test_outputs_do_not_replace_the_model(place, capsys):
    timm_folder(place / "net")
    assert cli.main(["compile", "net", *FAST, "--out", "net/"]) == 2
    assert cli.main(["analyze", "own_models.py:build", "--json", "own_models.py"]) == 2
    assert capsys.readouterr().err.count("which this command reads") == 2
    assert (place / "own_models.py").read_text() == FUNCTION


def test_the_weights_of_an_artifact_are_asked_for(place, capsys):
    from safetensors.torch import save_file

    for number in range(2):
        torch.manual_seed(number)
        save_file(mpcompile.load_model("resnet10t", num_classes=3).model.state_dict(), f"{number}.safetensors")
    base = ["--checkpoint", "0.safetensors", "--num-classes", "3", "--input-size", "3", "32", "32"]
    assert cli.main(["compile", "resnet10t", *base, *FAST, "--out", "pruned.mpc"]) == 0
    audit = ["audit", "--artifact", "pruned.mpc", "--rounds", "0", "--batch", "2"]
    assert cli.main(audit) == 2
    assert "expected --checkpoint FILE, the file 0.safetensors" in capsys.readouterr().err
    for number in range(2):
        assert cli.main([*audit, "--checkpoint", f"{number}.safetensors"]) == 0
        other = "these are not the weights that the artifact was made from" in capsys.readouterr().err
        assert other == (number == 1)


def test_nothing_to_audit(capsys):
    assert cli.main(["audit"]) == 2
    assert "expected MODEL, or --artifact FILE" in capsys.readouterr().err
    gm = mpcompile.transform(tiny_vit(), torch.zeros(2, 3, 32, 32), mpcompile.Config(pattern="2:4", score="magnitude"))
    mpcompile.save(gm, "bare.mpc")
    assert cli.main(["audit", "--artifact", "bare.mpc"]) == 2
    assert "does not say which model it was made from" in capsys.readouterr().err
