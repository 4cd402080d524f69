"""Folders of images and the names that models of transformers give their classes."""

import pytest
from PIL import Image
from timm.data import ImageNetInfo

from mpcompile.data.images import folder

DATA = {"input_size": [3, 8, 8], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bilinear"}
INFO = ImageNetInfo("imagenet-1k")
IMAGENET = [INFO.index_to_description(number) for number in range(1000)]


def labels_of(place, names, *folders):
    for name in folders:
        (place / name).mkdir()
        Image.new("RGB", (8, 8)).save(place / name / "0.png")
    found = folder(place, DATA, classes=len(names), names=names)
    return found.labels, found.notes


def test_imagenet_folders_have_the_labels_of_their_numbers(tmp_path):
    assert len(set(IMAGENET)) < 1000  # names of several classes are the same
    numbers = INFO.label_names()
    labels, notes = labels_of(tmp_path, IMAGENET, numbers[134], numbers[517], numbers[0])
    assert sorted(labels) == [0, 134, 517] and notes == ()


def test_numbers_of_other_classes_have_no_labels(tmp_path):
    others = [f"class {number}" for number in range(1000)]
    labels, (note,) = labels_of(tmp_path, others, INFO.label_names()[0])
    assert labels is None and "no classes called n01440764" in note
    labels, notes = labels_of(tmp_path, IMAGENET, "n00000001")
    assert labels is None and notes


@pytest.mark.parametrize(
    ("folders", "labels"),
    [(("tench", "drake"), [1, 0]), (("Tinca tinca", "goldfish"), [0, 2]), (("fish", "drake"), None)],
)
def test_one_of_several_names_is_enough_if_it_is_unique(folders, labels, tmp_path):
    names = ["tench, Tinca tinca, fish", "drake", "goldfish, fish"]
    found, notes = labels_of(tmp_path, names, *folders)
    assert found == labels
    assert bool(notes) == (labels is None)
