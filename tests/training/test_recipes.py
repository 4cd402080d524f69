"""Recipes, and images from folders."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import timm
import torch
from torch import nn

from mpcompile.data import datasets, ranks
from mpcompile.data import loader as images
from mpcompile.data.seeding import seed_everything
from mpcompile.errors import ConfigError, InputError
from mpcompile.training.recipes.recipe import Recipe
from tests.support.helpers import labelled_images

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
    return labelled_images(tmp_path_factory.mktemp("data"))


OURS = {"vit_tiny_8of16_unlabelled"}


def test_every_row_of_the_paper_has_a_recipe():
    assert set(Recipe.names()) == set(ROWS) | OURS
    for name, (pattern, r) in ROWS.items():
        found = Recipe.load(name)
        assert (found.compile.pattern, found.compile.tome_r, found.train.epochs) == (pattern, r, 3)
        assert found.model in timm.list_pretrained() and "2606.02608" in found.source
        assert set(found.macs) == {"dense", "executed", "paper"}
        assert Recipe.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("name", sorted(OURS))
def test_our_own_recipes_need_no_labels(name):
    found = Recipe.load(name)
    assert found.train.alpha == 1 and found.data.mix > 0 and found.reconstruct is not None
    assert found.model in timm.list_pretrained() and set(found.macs) == {"dense", "executed"}
    assert Recipe.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_a_recipe_can_be_changed():
    found = Recipe.load(
        "resnet50_8of16",
        [
            "train.lr=1e-4",
            "train.epochs=08",
            "compile.exclude=[stem]",
            "compile.pattern=2:4",
            "data.batch=16",
            "model=resnet18",
        ],
    )
    assert found.compile.pattern == "2:4"
    assert found.train.epochs == 8
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
        (["train.lr=["], "'train.lr=\\['.* is not YAML"),
        (["data.batch=abc"], "'batch' has the wrong type"),
        (["data.scale=5"], "'scale' has the wrong type; expected 2 values"),
        (["data.scale=[0.5, 0.2]"], "'scale' is out of range"),
        (["data.workers=1.5"], "'workers' has the wrong type"),
        (["data.hflip=7"], "'hflip' is out of range"),
        (["data.auto_augment=foo"], "timm knows no such augmentation.*found 'foo'"),
        (["calibration.images=abc"], "'images' has the wrong type"),
        (["calibration.batch=0"], "'batch' is out of range"),
        (["calibration.calibrate=x"], "'calibrate' has no such value"),
        (["prior_weight=abc"], "'prior_weight' has the wrong type"),
        (["train.epochs=09x"], "'epochs' has the wrong type"),
        (["train.seed=-1"], "'seed' is out of range"),
        (["train.cache=true"], "augment=false with train.cache=true"),
        (["reconstruct.view=4"], "reconstruction has no option 'view'"),
        (["reconstruct=4"], "reconstruct has the wrong type"),
    ],
)
def test_wrong_recipes_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        Recipe.load("resnet50_2of4", changes)


def test_a_recipe_may_reconstruct():
    assert Recipe.load("resnet50_2of4").reconstruct is None
    found = Recipe.load("resnet50_2of4", ["reconstruct.views=4", "train.seed=3"])
    assert found.reconstruct is not None and (found.reconstruct.views, found.reconstruct.seed) == (4, 3)
    assert Recipe.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert Recipe.from_dict(found.to_dict(), ["reconstruct=null"]).reconstruct is None


def test_other_files_are_not_recipes(tmp_path):
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
    options = images.ImageOptions(batch=4, size=32, workers=0)
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
    fixed = images.loader(source, model, images.ImageOptions(batch=4, size=32, workers=0, augment=False), training=True)
    seen = [{int(i): x for xs, _, index in fixed for x, i in zip(xs, index, strict=True)} for _ in range(2)]
    assert all(torch.equal(seen[0][i], seen[1][i]) for i in range(24))


def test_splits_are_recognised_by_name(folder, tmp_path):
    assert len(datasets.dataset(str(folder), "val", False)) == 9  # validation/ by another name
    assert len(datasets.dataset(str(folder / "train"), "train", True)) == 24  # a folder of classes
    with pytest.raises(InputError, match=r"no images of split 'trian'.*found train, validation"):
        datasets.dataset(str(folder), "trian", True)
    with pytest.raises(InputError, match=r"no images of split 'test'.*--val-split none"):
        datasets.dataset(str(folder), "test", False)
    with pytest.raises(InputError, match=r"split 'validation'.*no splits.*--val-split none"):
        datasets.dataset(str(folder / "train"), "validation", False)
    named = tmp_path / "named"  # a class with the name of a split
    shutil.copytree(folder / "train", named)
    (named / "ant").rename(named / "train")
    assert set(datasets.class_names(datasets.dataset(str(named), "train", True))) == {"bee", "cat", "train"}
    with pytest.raises(InputError, match=r"is a file.*--reader wds/NAME"):
        datasets.dataset(str(folder / "train" / "bee" / "0.png"), "train", True)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no images of split 'train'.*one sub-folder of images per class"):
        datasets.dataset(str(tmp_path / "empty"), "train", True)


def test_all_splits_number_their_classes_the_same_way(folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    shutil.rmtree(data / "validation" / "bee")
    train = datasets.dataset(str(data), "train", True)
    names = datasets.class_names(train)
    val = datasets.dataset(str(data), "validation", False, classes=names)
    assert datasets.labels_of(val) == [0] * 3 + [2] * 3
    (data / "validation" / "cat").rename(data / "validation" / "dog")
    with pytest.raises(InputError, match=r"split 'validation' has unknown classes.*ant, bee, cat.*dog"):
        datasets.dataset(str(data), "validation", False, classes=names)
    for count in (2, 4):
        with pytest.raises(
            InputError, match=rf"different classes; expected {count}, as in the model, found 3.*--class-map"
        ):
            datasets.check_classes(train, count)


def test_a_class_map_numbers_the_classes(folder, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("cat\nant\n\ndog\nbee\n")
    names = datasets.read_class_map(path)
    train = datasets.dataset(str(folder), "train", True, classes=names)
    assert datasets.labels_of(train) == [1] * 8 + [3] * 8 + [0] * 8
    datasets.check_classes(train, 4)
    for text, match in (("", "an empty file"), ("a\nb\na\n", "'a' twice")):
        path.write_text(text)
        with pytest.raises(InputError, match=match):
            datasets.read_class_map(path)
    with pytest.raises(InputError, match="cannot read the class map"):
        datasets.read_class_map(tmp_path / "none.txt")


def test_a_step_has_the_same_images_on_one_process_and_on_many(monkeypatch):
    """The numbers of processes and of batches per step make no difference."""

    def steps(world: int, accumulate: int, epoch: int = 0) -> list[list[int]]:
        parts, found = world * accumulate, []
        monkeypatch.setattr(ranks, "world", lambda: world)
        for rank in range(world):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            order = images.Order(50, 12 // parts, seed=3, dealt=parts)
            order.set_epoch(epoch)
            mine = list(order)
            assert len(mine) == len(order) == 48 // world
            found.append([mine[i : i + 12 // world] for i in range(0, len(mine), 12 // world)])
        return [sorted(itertools.chain(*step)) for step in zip(*found, strict=True)]

    alone = steps(1, 1)
    assert len(alone) == 4 and len(set(itertools.chain(*alone))) == 48
    assert steps(2, 1) == steps(3, 2) == steps(1, 4) == alone != steps(1, 1, epoch=1)


def test_unusable_data_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no images of split 'train' in"):
        datasets.dataset(str(tmp_path / "nowhere"), "train", True)
    with pytest.raises(InputError, match=r"fewer training images than make a batch; expected at least 25, found 24"):
        images.loader(
            datasets.dataset(str(folder), "train", True), nn.Linear(1, 1), images.ImageOptions(batch=25), True
        )
    with pytest.raises(ConfigError, match="multiple of 4"):
        images.loader(
            datasets.dataset(str(folder), "train", True), nn.Linear(1, 1), images.ImageOptions(batch=6), True, 4
        )
