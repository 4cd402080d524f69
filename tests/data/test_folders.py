"""Folders: the files that are read, the names of classes, and sub-folders that are splits."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from mpcompile.data import datasets, images
from mpcompile.data.sources import folders, splits
from mpcompile.errors import InputError

DATA = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
NAMES = ["ant", "bee", "cat"]


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return root


def classes(root, names=NAMES, count=2):
    return write(root, *(f"{name}/{number}.png" for name in names for number in range(count)))


def read(root, names=NAMES, count=3):
    """(class folder, label) of every image, and the notes."""
    found = images.folder(root, DATA, classes=count, names=names)
    labels = [None] * len(found.paths) if found.labels is None else found.labels
    return [(path.relative_to(root).parts[0], label) for path, label in zip(found.paths, labels, strict=True)], found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / ".ipynb_checkpoints").mkdir(), ".ipynb_checkpoints"),
        (lambda d: write(d, ".ipynb_checkpoints/0.png", "__MACOSX/ant/0.png", "ant/._0.png"), "3 hidden entries"),
        (lambda d: (d / "aaa").mkdir(), "1 folder without images (aaa)"),
        (lambda d: write(d, "0.png"), "1 image in no folder (0.png)"),
        (lambda d: (d / "ant" / "notes.heic").touch(), "1 file of another format (.heic)"),
        (lambda d: (d / "aardvark").symlink_to(d / "gone"), "1 dangling link (aardvark)"),
        (lambda d: os.mkfifo(d / "ant" / "z.png"), "1 FIFO, socket or device (ant/z.png)"),
    ],
)
def test_known_names_decide_labels_and_a_note_lists_skipped_folders(change, message, tmp_path):
    change(classes(tmp_path))
    for names in (NAMES, ()):  # if names are not known, three folders of images are the three classes
        found, how = read(tmp_path, names)
        assert found == [("ant", 0)] * 2 + [("bee", 1)] * 2 + [("cat", 2)] * 2
        (note,) = how.notes
        assert message in note and note.isprintable() and len(note) < 600


def test_a_class_that_is_missing_shifts_no_label(tmp_path):
    assert read(classes(tmp_path, ["ant", "cat"]))[0] == [("ant", 0)] * 2 + [("cat", 2)] * 2
    (tmp_path / "aaa").mkdir()
    assert read(tmp_path)[0] == [("ant", 0)] * 2 + [("cat", 2)] * 2


@pytest.mark.parametrize(
    ("there", "names", "count", "message"),
    [
        (["ant", "bug", "cat"], NAMES, 3, "called bug, and no folder is called bee"),
        (["x", "y", "z"], NAMES, 3, "called x, y, z, and no folder is called ant, bee, cat"),
        (NAMES, ["ant", "bee", "bee"], 3, "2 class names are known, but the model has 3"),
        (NAMES, NAMES, 4, "3 class names are known, but the model has 4"),
        (NAMES, (), 4, "3 folders of images (ant, bee, cat), but 4 classes"),
    ],
)
def test_no_labels_are_given_rather_than_wrong_ones(there, names, count, message, tmp_path):
    _, found = read(classes(tmp_path, there), names, count)
    assert found.labels is None and len(found.paths) == 6
    assert message in found.notes[-1]


def test_a_known_class_is_never_hidden(tmp_path):
    found, how = read(classes(tmp_path, [".net", "java", ".git"]), [".net", "java"], 2)
    assert [label for _, label in found] == [0, 0, 1, 1] and "(.git)" in how.notes[0]
    source = datasets.dataset(str(tmp_path), "train", True, classes={"java": 0, ".net": 1})
    assert datasets.labels_of(source) == [1, 1, 0, 0]


def test_names_match_in_any_unicode_normalisation(tmp_path):
    assert read(classes(tmp_path, ["cafe\u0301", "the"]), ["the", "caf\u00e9"], 2)[1].labels == [1, 1, 0, 0]


def test_the_class_is_the_first_folder(tmp_path):
    write(tmp_path, "ant/day1/0.png", "ant/day2/a/0.png", "bee/day1/0.PNG", "bee/1.webp", "cat/x.jpg/0.Tiff")
    assert [label for _, label in read(tmp_path)[0]] == [0, 0, 1, 1, 2]
    source = datasets.dataset(str(tmp_path), "train", True)
    assert datasets.class_names(source) == {"ant": 0, "bee": 1, "cat": 2} and len(source) == 5
    assert sorted(datasets.labels_of(source)) == [0, 0, 1, 1, 2]


def test_training_reads_what_every_command_reads(tmp_path):
    classes(tmp_path)
    for number, suffix in enumerate(sorted(images.SUFFIXES)):
        (tmp_path / "ant" / f"x{number}{suffix.upper()}").touch()
    write(tmp_path, "stray.png", ".cache/ant/0.png")
    (tmp_path / "aaa").mkdir()
    source = datasets.dataset(str(tmp_path), "train", True)
    count = 6 + len(images.SUFFIXES)
    assert len(source) == count == len(images.folder(tmp_path, DATA, classes=3).paths)
    assert datasets.class_names(source) == {"ant": 0, "bee": 1, "cat": 2}
    assert all(word in source.notes[0] for word in ("stray.png", ".cache", "aaa"))


def test_linked_folders_are_read(tmp_path):
    plain, root = classes(tmp_path / "plain"), tmp_path / "linked"
    root.mkdir()
    (root / "ant").symlink_to(plain / "ant")
    (root / "bee").symlink_to("../plain/bee")
    (root / "cat").mkdir()
    (root / "cat" / "0.png").symlink_to(plain / "cat" / "0.png")  # a file
    (root / "cat" / "more").symlink_to(plain / "cat")
    found, how = read(root)
    assert [label for _, label in found] == [0, 0, 1, 1, 2, 2, 2] and not how.notes
    assert len(datasets.dataset(str(root), "train", True)) == 7
    (tmp_path / "top").symlink_to(root)
    assert len(read(tmp_path / "top")[0]) == 7


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ({"a/up": ".."}, "1 link to a folder that holds it (a/up)"),
        ({"a/up": "..", "b/up": ".."}, "2 links to folders that hold them"),
        ({"a/up": "../..", "b/self": "."}, "2 links to folders that hold them"),
        ({"a/b": "../b", "b/a": "../a"}, "2 links to folders that are read elsewhere"),
        ({"a/x": "x"}, "1 dangling link (a/x)"),
        ({"c": "a"}, "1 link to a folder that is read elsewhere (c)"),
        ({"a/deep": "../../other"}, "1 link to a folder that holds it (a/deep/back)"),
    ],
)
def test_links_do_not_count_an_image_twice(links, message, tmp_path):
    root = classes(tmp_path / "train", "ab", 8)
    write(tmp_path, "test/0.png")
    if "a/deep" in links:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "back").symlink_to("..")
    for name, target in links.items():
        (root / name).symlink_to(target)
    found = images.folder(root, DATA, classes=2)
    assert found.labels == [0] * 8 + [1] * 8 and message in found.notes[0]
    source = datasets.dataset(str(tmp_path), "train", True)
    assert len(source) == 16 and message in source.notes[0]


def test_a_linked_class_keeps_its_images(tmp_path):
    """A class keeps its images even if another class links to its folder and comes first."""
    root, store = tmp_path / "set", classes(tmp_path / "store", ["zebra"])
    write(root, "ant/0.png")
    (root / "ant" / "zoo").symlink_to(store / "zebra")
    (root / "zebra").symlink_to(store / "zebra")
    assert images.folder(root, DATA, classes=2, names=["ant", "zebra"]).labels == [0, 1, 1]


def test_only_folders_are_listed(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path, "a.png")
    for place, found in (("pipe", "a FIFO"), ("a.png", "a regular file"), ("none", "no such folder"), ("x\0", "null")):
        with pytest.raises(InputError, match=f"there are no images in .*found .*{found}"):
            images.folder(tmp_path / place, DATA)
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    with pytest.raises(InputError, match=r"there are no images in .*hidden entry \(\.hidden\)"):
        images.folder(tmp_path / "empty", DATA)


def test_names_of_any_kind_sort_and_print(tmp_path):
    assert sorted(["b10", "b2", "²", "B2", "10", "9"], key=folders.natural_key) == ["9", "10", "B2", "b2", "b10", "²"]
    classes(tmp_path, ["²", "a\x1b[2J", os.fsdecode(b"\xff")], 1)
    (tmp_path / "a\x1b[2J" / "x\n.txt").touch()
    found = images.folder(tmp_path, DATA, classes=3, names=["x", "y", "z"])
    assert len(found.paths) == 3 and all(note.isprintable() for note in found.notes)
    assert len(datasets.class_names(datasets.dataset(str(tmp_path), "train", True))) == 3


@pytest.mark.parametrize(
    ("train", "others"),
    [
        ("train", ["test"]),
        ("Training", ["Testing"]),
        ("tr", ["te", "va"]),
        ("Train", ["Valid", "Test"]),
        ("TRAIN", ["VAL"]),
        ("train", ["dev"]),
        ("seg_train/seg_train", ["seg_test/seg_test", "seg_pred/seg_pred"]),
        ("flowers_train/flowers_train", ["flowers_test/flowers_test"]),
        ("training_set/training_set", ["test_set/test_set"]),
        ("TrainImages", ["TestImages"]),
        ("train2017", ["val2017"]),
        ("images/train", ["images/val"]),
        ("archive/data/Training", ["archive/data/Testing"]),
        ("images/train", ["images/val", "labels/train", "labels/val"]),
        ("train/train", ["train/test"]),
    ],
)
def test_training_reads_only_the_training_split(train, others, tmp_path):
    classes(tmp_path / train)
    for other in others:
        if other.startswith("labels"):
            (tmp_path / other / "ant").mkdir(parents=True)
        else:
            classes(tmp_path / other, count=1)
    source = datasets.dataset(str(tmp_path), "train", True)
    assert len(source) == 6 and str(tmp_path / train) == source.reader.root


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (["ant/train/0.png", "ant/test/0.png", "bee/train/0.png", "bee/test/0.png"], "test, train"),
        (["train/0.png", "test/0.png"], "no sub-folders in"),
        (["ant/0.png", "bee/0.png", "test/ant/0.png"], "found test"),
        (["Train/ant/0.png", "TRAIN/ant/0.png", "test/ant/0.png"], "TRAIN, Train"),
        (
            ["fold1/Train/ant/0.png", "fold1/Val/ant/0.png", "fold2/Train/ant/0.png", "fold2/Val/ant/0.png"],
            "Train, Val",
        ),
        (["learn/ant/0.png", "test/0.png"], "found test"),
        (["flowers_train/ant/0.png", "plants_test/ant/0.png"], "found flowers_train, plants_test"),
    ],
)
def test_training_never_takes_test_images(layout, message, tmp_path):
    with pytest.raises(InputError, match=message):
        datasets.dataset(str(write(tmp_path, *layout)), "train", True)


def test_classes_may_have_names_of_splits(tmp_path):
    for names in (["bus", "car", "train"], ["test_tube", "train_station", "validation_stamp"]):
        root = classes(tmp_path / names[0], names)
        assert list(datasets.class_names(datasets.dataset(str(root), "train", True))) == names
        assert images.folder(root, DATA, classes=3).labels is not None
    root = classes(tmp_path / "rail", ["train", "test"])
    assert images.folder(root, DATA, classes=2, names=["test", "train"]).labels == [0, 0, 1, 1]


def test_no_command_reads_several_splits_at_once(tmp_path):
    for split in ("Training", "Testing"):
        classes(tmp_path / split)
    for count in (0, 2):  # to calibrate on, and to measure with as many classes as splits
        with pytest.raises(InputError, match=r"holds several splits.*found Testing, Training.*such as .*Testing"):
            images.folder(tmp_path, DATA, classes=count)


def test_words_that_name_splits():
    found = splits.kinds(["seg_train", "Testing", "val2017", "train_station", "flowers_train", "trainval"])
    assert found == {"seg_train": "train", "Testing": "test", "val2017": "validation"}
    assert splits.kinds(["TR", "te"]) == {"TR": "train", "te": "test"}
    assert splits.kinds(["de", "te", "tr"]) == splits.kinds(["te", "ts"]) == splits.kinds([]) == {}  # languages
    assert set(splits.kinds(["flowers_train", "flowers_test", "notes"])) == {"flowers_train", "flowers_test"}
    assert not splits.kinds(["a_train", "b_test"])


def test_a_split_has_a_name(tmp_path):
    (tmp_path / "train" / "apple").mkdir(parents=True)
    with pytest.raises(InputError, match="the name of a split is empty"):
        splits.split_folder(tmp_path, "", True)
