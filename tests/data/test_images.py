"""Folders of images as batches with labels from their folders; errors name unreadable files."""

import numpy as np
import pytest
import torch
from PIL import Image

from mpcompile.data import datasets, images
from mpcompile.errors import InputError
from tests.support.helpers import tiny_vit

DATA = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}


def write(path, colour=(10, 200, 30), size=(40, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_images_are_resized_and_normalised(tmp_path):
    for name in ("b.png", "a.jpg", "sub/c.PNG"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = images.folder(tmp_path, DATA, batch=2)
    batches = list(found)
    assert [tuple(b.shape) for b in batches] == [(2, 3, 32, 32), (1, 3, 32, 32)] and len(found) == 2
    expected = (torch.tensor([10, 200, 30]) / 255 - 0.5) / 0.25
    assert torch.allclose(batches[-1][0].mean((1, 2)), expected, atol=0.02)
    assert all(torch.equal(a, b) for a, b in zip(batches, found, strict=True))  # a second pass reads the same
    assert np.abs(images.shown(batches[-1][0], DATA)[5, 5].astype(int) - [10, 200, 30]).max() <= 2


def test_labels_are_the_order_of_the_folders(tmp_path):
    for place, name in enumerate(["dog", "cat", "eel"]):
        write(tmp_path / name / f"{place}.png")
    labels = [int(v) for _, batch in images.folder(tmp_path, DATA, batch=2, classes=3) for v in batch]
    assert labels == [0, 1, 2]
    assert images.folder(tmp_path, DATA, classes=4).labels is None  # not the model's classes
    assert images.folder(tmp_path, DATA).labels is None
    (tmp_path / "bat").mkdir()  # a class without images counts
    assert images.folder(tmp_path, DATA, classes=4).labels == [1, 2, 3]


def test_labels_are_numbered_as_in_training(tmp_path):
    for name in ("1", "2", "10"):
        write(tmp_path / name / "a.png")
    trained = datasets.dataset(str(tmp_path), "train", True)
    found = images.folder(tmp_path, DATA, classes=3)
    assert [path.parent.name for path in found.paths] == ["1", "10", "2"] and found.labels == [0, 2, 1]
    assert datasets.class_names(trained) == {"1": 0, "2": 1, "10": 2}
    named = images.folder(tmp_path, DATA, classes=4, names=["x", "10", "2", "1"])
    assert named.labels == [3, 1, 2]
    assert images.folder(tmp_path, DATA, classes=4).labels is None
    assert images.folder(tmp_path, DATA, classes=3, names=["a", "b", "c"]).labels is None  # none of the classes


def test_images_are_read_while_they_are_iterated(tmp_path):
    paths = [write(tmp_path / f"{number}.png") for number in range(5)]
    found = images.folder(tmp_path, DATA, batch=2)
    paths[4].write_bytes(b"no image")  # in the last batch, which is not read yet
    iterator = iter(found)
    assert len(found) == 3 and found.count == 5
    assert [len(next(iterator)) for _ in range(2)] == [2, 2]
    with pytest.raises(InputError, match=r"4\.png"):
        next(iterator)
    write(paths[4])
    assert [len(batch) for batch in found] == [2, 2, 1]


def test_samples_are_drawn_by_the_seed(tmp_path):
    for number in range(9):
        write(tmp_path / f"{number}.png")
    draws = [images.folder(tmp_path, DATA, samples=4, seed=seed).paths for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(set(draws[0])) == 4
    assert len(images.folder(tmp_path, DATA, samples=99).paths) == 9


def test_bad_files_and_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        images.folder(tmp_path / "none", DATA)
    with pytest.raises(InputError, match="no images in"):
        images.folder(tmp_path, DATA)
    whole = write(tmp_path / "cut.png", size=(400, 300)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot read .*cut\.png"):
        list(images.folder(tmp_path, DATA))
    (tmp_path / "cut.png").write_text("no image")
    with pytest.raises(InputError, match=r"cannot read .*cut\.png"):
        list(images.folder(tmp_path, DATA))


def test_the_data_config_of_a_model_is_json():
    import json

    found = images.data_config(tiny_vit())
    assert json.loads(json.dumps(found)) == found and len(found["input_size"]) == 3


def test_all_at_once_from_folders_and_archives(tmp_path):
    for name in ("a/1.png", "b/2.png", "b/3.jpg"):
        write(tmp_path / "set" / name)
    x, labels = images.read_images(tmp_path / "set", DATA, samples=10, classes=2)
    assert x.shape == (3, 3, 32, 32) and labels.tolist() == [0, 1, 1]
    assert images.read_images(tmp_path / "set", DATA, samples=10, classes=1000)[1] is None
    file = tmp_path / "set.npz"
    np.savez(file, images=np.zeros((5, 4, 4, 3), np.uint8), labels=np.arange(5))
    x, labels = images.read_images(file, DATA, samples=2)
    assert x.shape == (2, 3, 32, 32) and len(set(labels.tolist())) == 2
    np.savez(file, images=np.zeros((5, 4, 4), np.float32))
    for path, message in (
        (file, "holds images of another form"),
        (tmp_path / "none.npz", "cannot read"),
        (tmp_path / "x", "no images in"),
    ):
        with pytest.raises(InputError, match=message):
            images.read_images(path, DATA, samples=2)
