"""Training images from WebDataset shards and Hugging Face datasets."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
import timm
from PIL import EpsImagePlugin, Image

from mpcompile.cli import main
from mpcompile.data import datasets, ranks
from mpcompile.data import loader as images
from mpcompile.data.batches import epoch_batches
from mpcompile.errors import ConfigError, InputError

CLASSES, COUNTS, SHARDS = 3, {"train": 24, "validation": 9}, 2


def picture(number: int) -> Image.Image:
    """An image of a single colour that identifies it."""
    return Image.new("RGB", (40, 40), (10 * number, 10 * number, 10 * number))


def numbers(batches) -> list[int]:
    """The numbers of the pictures in batches without normalisation."""
    return [round(float(x) * 25.5) for batch in batches for x in batch[0].mean((1, 2, 3))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same images as shards and as folders."""
    root, info = tmp_path_factory.mktemp("streams"), {}
    (root / "shards").mkdir()
    for split, count in COUNTS.items():
        names = [f"x-{split}-{shard:04}.tar" for shard in range(SHARDS)]
        lengths = [len(range(shard, count, SHARDS)) for shard in range(SHARDS)]
        info[split] = {"name": split, "num_samples": count, "filenames": names, "shard_lengths": lengths}
        for shard, name in enumerate(names):
            with tarfile.open(root / "shards" / name, "w") as tar:
                for number in range(shard, count, SHARDS):
                    content = io.BytesIO()
                    picture(number).save(content, "PNG")
                    for suffix, value in (("png", content.getvalue()), ("cls", str(number % CLASSES).encode())):
                        entry = tarfile.TarInfo(f"{number:04}.{suffix}")
                        entry.size = len(value)
                        tar.addfile(entry, io.BytesIO(value))
        for number in range(count):
            place = root / "folders" / split / "abc"[number % CLASSES]
            place.mkdir(parents=True, exist_ok=True)
            picture(number).save(place / f"{number}.png")
    (root / "shards" / "_info.json").write_text(json.dumps({"splits": info}))
    return root


@pytest.fixture
def model():
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0}
    return model


@pytest.fixture(params=["wds", "hfds", "hfids"])
def opened(request, root, tmp_path, monkeypatch):
    """A function that opens a split."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    where = root / "shards" if request.param == "wds" else tmp_path / "cache"
    reader = "wds/x" if request.param == "wds" else f"{request.param}/{root / 'folders'}"
    ending = "|{}" if request.param == "hfids" else ""
    return lambda split: datasets.dataset(
        str(where), split + ending.format(COUNTS[split]), split == "train", reader, seed=3
    )


def test_an_epoch_holds_every_image_once_and_can_be_repeated(opened, model):
    options = images.ImageOptions(batch=4, size=32, workers=0, augment=False)
    train = images.loader(opened("train"), model, options, training=True)
    epochs = [numbers(epoch_batches(train, 0, epoch, 0, 0, None, "")) for epoch in (0, 1, 0)]
    assert len(train) == 6 and all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] == epochs[2] != epochs[1]


def test_calibration_leaves_the_training_order_as_it_is(opened, model):
    options, drawn = images.ImageOptions(batch=4, size=32, workers=0, augment=False), []
    for count in (0, 5):
        source = opened("train")
        if count:
            part = images.calibration(source, model, options, count, 4)
            assert [len(batch) for batch in part] == [4, 1]
            assert len(set(numbers([(batch,) for batch in part]))) == 5
        train = images.loader(source, model, options, training=True)
        drawn.append(numbers(epoch_batches(train, 0, 0, 0, 0, None, "")))
    assert drawn[0] == drawn[1]
    with pytest.raises(InputError, match=r"too few images to calibrate on.*25.*24"):
        images.calibration(opened("train"), model, options, 25, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_image_once_on_two_ranks(opened, model, workers, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "active", lambda: True)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        val = images.loader(opened("validation"), model, images.ImageOptions(batch=2, size=32, workers=workers), False)
        seen.append([(n, int(label)) for batch in val for n, label in zip(numbers([batch]), batch[1], strict=True)])
    assert sorted(seen[0] + seen[1]) == [(n, n % CLASSES) for n in range(9)]
    assert abs(len(seen[0]) - len(seen[1])) <= 1


def test_workers_share_shards(root, model, caplog):
    source = datasets.dataset(str(root / "shards"), "train", True, "wds/x")
    images.calibration(source, model, images.ImageOptions(batch=4, size=32), 3, 4)
    options = images.ImageOptions(batch=4, size=32, workers=3, augment=False)
    train = images.loader(source, model, options, training=True)
    assert "there are shards for only 2 workers per process: data.workers becomes 2, not 3" in caplog.text
    # Two workers read a shard of 12 each.
    assert sorted(numbers(epoch_batches(train, 0, 0, 0, 0, None, ""))) == list(range(24))


def test_fewer_shards_than_processes_are_refused(root, model, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    source = datasets.dataset(str(root / "shards"), "train", True, "wds/x")
    with pytest.raises(InputError, match=r"fewer shards than processes.*at least 3 shards.*2"):
        images.loader(source, model, images.ImageOptions(batch=6, size=32), training=True)


def test_the_command_takes_shards_and_resumes(root, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "model: test_resnet\n"
        'compile: {pattern: "2:4", score: magnitude, permute: false, restore: false}\n'
        "calibration: {images: 2, batch: 2}\n"
        "train: {epochs: 2, lr: 1e-3}\n"
        "data: {batch: 8, size: 32, workers: 0}\n"
    )
    command = ["distill", str(recipe), "--data", str(root / "shards"), "--reader", "wds/x", "--num-classes", "3"]
    command += ["--quiet", "--json", "-", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["result"]["images"] == 48


def shard(place, files):
    """A folder of one shard whose samples are (suffix, content)."""
    place.mkdir()
    with tarfile.open(place / "x-train-0.tar", "w") as tar:
        for number, (suffix, content) in enumerate(files):
            for ending, value in ((suffix, content), ("cls", str(number % CLASSES).encode())):
                entry = tarfile.TarInfo(f"{number:04}.{ending}")
                entry.size = len(value)
                tar.addfile(entry, io.BytesIO(value))
    split = {"name": "train", "num_samples": len(files), "filenames": ["x-train-0.tar"], "shard_lengths": [len(files)]}
    (place / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return place


def saved(image, form):
    content = io.BytesIO()
    image.save(content, form)
    return content.getvalue()


def test_shards_are_decoded_as_files_are(tmp_path, monkeypatch, caplog):
    """Every suffix is read, 16 bits are scaled, and no format starts a program."""
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(1) or Image.new("RGB", (9, 9)).im)
    deep = Image.fromarray(np.full((8, 8), 200 * 257, np.uint16))
    plain = Image.new("RGB", (8, 8), (200, 200, 200))
    forms = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "bmp": "BMP", "TIF": "TIFF"}
    files = [("png", saved(deep, "PNG")), *((suffix, saved(plain, form)) for suffix, form in forms.items())]
    files.append(("jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 1 add\n"))
    source = datasets.dataset(str(shard(tmp_path / "a", files)), "train", False, "wds/x")
    read = list(source)
    assert [label for _, label in read] == [0, 1, 2, 0, 1, 2] and not called
    assert all(abs(image.getpixel((4, 4))[0] - 200) < 3 and image.mode == "RGB" for image, _ in read)
    assert "0006.jpg in" in caplog.text and "no image of a known format" in caplog.text


SPLIT = {"name": "train", "num_samples": 1, "filenames": ["x-train-0.tar"], "shard_lengths": [1]}


@pytest.mark.parametrize(
    "info",
    [
        [1],
        {"splits": [1]},
        {"splits": {"train": 3}},
        {"splits": {"train": {"num_samples": 1}}},
        {"splits": {"train": {**SPLIT, "filenames": 7}}},
        {"splits": {"train": {**SPLIT, "filenames": [7]}}},
        {"splits": {"train": {**SPLIT, "filenames": []}}},
        {"splits": {"train": {**SPLIT, "num_samples": "many"}}},
        {"splits": {"train": {**SPLIT, "num_samples": -1}}},
        "\x1b[2J",
    ],
)
def test_a_wrong_description_of_shards_is_one_line(info, tmp_path):
    place = shard(tmp_path / "a", [("png", saved(picture(1), "PNG"))])
    (place / "_info.json").write_text(json.dumps(info))
    with pytest.raises(InputError) as caught:
        datasets.dataset(str(place), "train", True, "wds/x")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["_info.json", "info.json", "x-train-0.tar"])
def test_shards_are_regular_files(name, tmp_path):
    place = shard(tmp_path / "a", [("png", saved(picture(1), "PNG"))])
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name)
    with pytest.raises(InputError, match=f"cannot read .*{name}.*found a FIFO"):
        datasets.dataset(str(place), "train", True, "wds/x")


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_hugging_face_datasets_are_decoded_as_files_are(reader, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    for name, level in (("a", 200), ("b", 100)):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), level * 257, np.uint16)).save(tmp_path / "data" / "train" / name / "0.png")
    ending = "|2" if reader == "hfids" else ""
    where = str(tmp_path / "cache")
    source = datasets.dataset(where, f"train{ending}", False, f"{reader}/{tmp_path / 'data'}")
    source.transform = lambda image: image.getpixel((0, 0))
    items = source if reader == "hfids" else [source[number][:2] for number in range(2)]
    assert sorted(items) == [((100,) * 3, 1), ((200,) * 3, 0)]
    if reader == "hfids":
        (tmp_path / "data" / "train" / "b" / "0.png").write_bytes(b"none")
        with pytest.raises(InputError, match=r"train/b/0\.png cannot be read.*no image of a known format"):
            list(source)


def test_unusable_readers_are_refused(root, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no images of split 'test'"):
        datasets.dataset(str(root / "shards"), "test", True, "wds/x")
    with pytest.raises(ConfigError, match=r"no reader 'zip/x'.*hfds/NAME"):
        datasets.dataset(str(root / "shards"), "train", True, "zip/x")
    with pytest.raises(InputError, match=r"the number of images in split 'train'.*'train\|50000'"):
        datasets.dataset(str(tmp_path / "cache"), "train", True, f"hfids/{root / 'folders'}")
    monkeypatch.setattr("timm.data.readers.reader_wds.wds", None)
    with pytest.raises(InputError, match=r"wds/x cannot be read without webdataset.*mpcompile\[streams\]"):
        datasets.dataset(str(root / "shards"), "train", True, "wds/x")
