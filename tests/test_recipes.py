"""Recipes, images from folders, and the command that puts them together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import mpcompile
from mpcompile.cli import main
from mpcompile.errors import ConfigError, InputError
from mpcompile.training import datasets, images
from mpcompile.training.checkpoint import seed_everything
from mpcompile.training.recipe import Recipe

ROWS = {
    "convnextv2_base_12of16": ("12:16", 0),
    "deit_base_2of4_tome8": ("2:4", 8),
    "deit_small_2of4_tome8": ("2:4", 8),
    "deit_tiny_2of4_tome8": ("2:4", 8),
    "resnet152d_2of4": ("2:4", 0),
    "resnet50_2of4": ("2:4", 0),
    "resnet50_8of16": ("8:16", 0),
    "vit_base_2of4_tome8": ("2:4", 8),
    "vit_base_6of12": ("6:12", 0),
    "vit_large_8of16": ("8:16", 0),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two splits of three classes of small images."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 3)):
        for number, name in enumerate(("ant", "bee", "cat")):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, number] += 150
                Image.fromarray(pixels).save(place / f"{index}.png")
    return root


@pytest.fixture
def recipe(tmp_path):
    """A small one, as YAML."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: test_resnet\n"
        'compile: {pattern: "2:4", score: wanda, permute: false, restore: false}\n'
        "calibration: {images: 6, batch: 3, calibrate: dense}\n"
        "train: {epochs: 2, lr: 1e-4, warmup: 0, bn_batches: 2}\n"
        "data: {batch: 6, size: 32, workers: 0, auto_augment: rand-m9-mstd0.5-inc1, reprob: 0.25}\n"
    )
    return path


def test_every_row_of_the_paper_has_a_recipe():
    assert set(Recipe.names()) == set(ROWS)
    for name, (pattern, r) in ROWS.items():
        found = Recipe.load(name)
        assert (found.compile.pattern, found.compile.tome_r, found.train.epochs) == (pattern, r, 3)
        assert found.model in timm.list_pretrained() and "2606.02608" in found.source
        assert set(found.macs) == {"dense", "executed", "paper"}
        assert Recipe.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_recipe_can_be_changed():
    found = Recipe.load(
        "resnet50_8of16",
        ["train.lr=1e-4", "compile.exclude=[stem]", "compile.pattern=2:4", "data.batch=16", "model=resnet18"],
    )
    assert found.compile.pattern == "2:4"
    assert (found.train.lr, found.compile.exclude, found.data.batch, found.model) == (1e-4, ("stem",), 16, "resnet18")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (["train.lrr=1"], "no option 'lrr'"),
        (["compile.pattrn=2:4"], "unknown option 'pattrn'"),
        (["data.size2=1"], "data has no option"),
        (["calibration.count=1"], "calibration has no option"),
        (["speed=1"], "no part 'speed'"),
        (["train.lr"], "wrong form"),
        (["model.a=1"], "names no part"),
        (["train=3"], "wrong type"),
    ],
)
def test_wrong_recipes_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        Recipe.load("resnet50_2of4", changes)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"no recipe.*vit_base_2of4_tome8"):
        Recipe.load("vit_huge")
    path = tmp_path / "a.yaml"
    for text, match in (("model: [", "not YAML"), ("- 1", "holds no recipe"), ("train: {}", "names no model")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=match):
            Recipe.load(path)


def test_images_of_a_folder(folder):
    model = timm.create_model("resnet10t", num_classes=3)
    source = datasets.dataset(str(folder), "train", True)
    options = images.Images(batch=4, size=32, workers=0)
    batches = images.loader(source, model, options, training=True)
    seed_everything(0, 0, 0)
    first = list(batches)
    seed_everything(0, 0, 0)
    again = list(batches)
    assert len(first) == len(batches) == 6 and first[0][0].shape == (4, 3, 32, 32)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    assert sorted(torch.cat([index for _, _, index in first]).tolist()) == list(range(24))
    drawn = images.calibration(source, model, options, 6, 4)
    assert [len(part) for part in drawn] == [4, 2]
    plain = images.loader(datasets.dataset(str(folder), "validation", False), model, options, training=False)
    labels = torch.cat([batch[1] for batch in plain])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    fixed = images.loader(source, model, images.Images(batch=4, size=32, workers=0, augment=False), training=True)
    seen = [{int(i): x for xs, _, index in fixed for x, i in zip(xs, index, strict=True)} for _ in range(2)]
    assert all(torch.equal(seen[0][i], seen[1][i]) for i in range(24))


def test_data_that_can_not_be_used(folder, tmp_path):
    with pytest.raises(InputError, match="no images of split 'train' in"):
        datasets.dataset(str(tmp_path / "nowhere"), "train", True)
    with pytest.raises(InputError, match=r"different classes; expected 2, as the model, found 3"):
        datasets.check_classes(datasets.dataset(str(folder), "train", True), 2)
    with pytest.raises(ConfigError, match="multiple of 4"):
        images.loader(datasets.dataset(str(folder), "train", True), nn.Linear(1, 1), images.Images(batch=6), True, 4)


def test_the_command_runs_a_recipe_and_goes_on(folder, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["distill", str(recipe), "--data", str(folder), "--out", str(out), "--num-classes", "3", "--quiet"]
    assert main([*command, "--set", "train.checkpoint_steps=1"]) == 0
    said = capsys.readouterr().out
    assert "8 steps, 48 images" in said and "random weights" in said
    assert {p.name for p in out.iterdir()} >= {
        "student.mpc",
        "distilled.mpc",
        "result.json",
        "log.jsonl",
        "checkpoint.pt",
    }
    result = json.loads((out / "result.json").read_text())
    assert len(result["result"]["accuracy"]) == 3 and result["recipe"]["model"] == "test_resnet"
    weights = mpcompile.load(out / "distilled.mpc").state_dict()
    assert main([*command, "--set", "train.checkpoint_steps=1"]) == 2
    assert "earlier run" in capsys.readouterr().err
    assert main([*command, "--set", "train.checkpoint_steps=1", "--resume", "auto"]) == 0
    again = mpcompile.load(out / "distilled.mpc").state_dict()
    assert all(torch.equal(weights[k], again[k]) for k in weights)


def test_a_corrupt_image_is_named(folder, recipe, tmp_path, capsys):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(folder, data)
    whole = data / "train" / "bee" / "3.png"
    out = tmp_path / "run"
    command = ["distill", str(recipe), "--data", str(data), "--out", str(out), "--num-classes", "3", "--quiet"]
    whole.write_bytes(whole.read_bytes()[:200])
    assert main([*command, "--set", "calibration.images=1", "--val-split", "none"]) == 2
    said = capsys.readouterr().err
    assert "bee/3.png can't be read" in said and "checkpoint" in said


def test_the_command_says_what_is_missing(capsys):
    assert main(["distill", "resnet50_2of4"]) == 2
    assert "no ['--data', '--out']" in capsys.readouterr().err
    assert main(["distill", "--list"]) == 0
    assert "vit_large_8of16" in capsys.readouterr().out
