"""Labelled training images from a folder, a Hugging Face dataset or WebDataset shards, through timm's readers."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.data import ImageDataset, create_dataset

from mpcompile.errors import ConfigError, InputError
from mpcompile.training.streamed import Streamed

READERS = ("hfds", "hfids", "wds")


class Readable(ImageDataset):
    """timm's dataset, except that an image that can't be read is an error that names it, and items are numbered.

    Items are (image, label, number).
    """

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        from PIL import Image

        try:
            source, label, *_ = self.reader[index]
            image = Image.open(source).convert(self.input_img_mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(
                f"image {self.reader.filename(index)} can't be read",
                expected="a whole image file",
                found=str(error).split(" <")[0] or type(error).__name__,
                hint="replace or remove it",
            ) from error
        return (image if self.transform is None else self.transform(image)), -1 if label is None else int(label), index


def dataset(
    root: str,
    split: str,
    training: bool,
    reader: str = "",
    seed: int = 0,
    classes: Mapping[str, int] | None = None,
) -> Any:
    """A dataset of labelled images.

    Args:
        root: image folder or its parent (see :func:`split_folder`), folder of shards, or a cache.
        split: name of the split; ``"NAME|COUNT"`` says how many images a streamed Hugging Face split has.
        training: shuffle a streamed dataset.
        reader: ``""`` for folders, ``"hfds/NAME"`` (Hugging Face datasets), ``"hfids/NAME"`` (streamed), ``"wds/NAME"``
            (WebDataset), as timm spells them.
        seed: of a streamed dataset's shuffling.
        classes: class name -> label, where the data names its classes; None numbers them in the order of their names.

    Raises:
        InputError: nothing is there, what it takes to read it isn't installed, or it has a class that ``classes``
            doesn't name.
        ConfigError: no such reader.
    """
    kind = reader.partition("/")[0].lower()
    if kind and kind not in READERS:
        expected = "hfds/NAME, hfids/NAME, wds/NAME, or none: a folder"
        raise ConfigError(f"there is no reader {reader!r}", expected=expected)
    options: dict[str, Any] = {"is_training": training, "seed": seed, "search_split": False}
    name = split
    if kind == "hfids":
        name, _, count = split.partition("|")
        options["num_samples"] = int(count) if count.isdecimal() else None
    if not kind:
        root = split_folder(root, split, training)
    try:
        found = create_dataset(reader, root, split=name, **options)
        names = class_names(found)
        if names and classes and names != dict(classes):
            _check_names(names, classes, name)
            found = create_dataset(reader, root, split=name, class_map=dict(classes), **options)
    except (ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
        raise _unreadable(root, name, reader, error) from error
    if isinstance(found, ImageDataset):
        return Readable(root, reader=found.reader)
    return Streamed(found.reader, training, seed)


_SPLITS = ({"train", "training"}, {"val", "valid", "validation", "eval", "evaluation"}, {"test"})


def split_folder(root: str, split: str, training: bool) -> str:
    """The folder of a split: the sub-folder of that name, or of one that means the same (``val`` for ``validation``).

    A folder without splits is a training set itself.

    Raises:
        InputError: there is no such split.
    """
    place = Path(root)
    if place.is_file():
        raise InputError(
            f"{root} is a file",
            expected="a folder",
            hint="unpack it, or cut it into shards and read them with --reader wds/NAME",
        )
    alike = next((names for names in _SPLITS if split in names), set())
    for name in [split, *sorted(alike - {split})]:
        if _folders(place / name):  # else it may be a class that is called like a split
            return str(place / name)
    there = _folders(place)
    splits = [name for name in there if any(name in names for names in _SPLITS) and _folders(place / name)]
    if training and there and not splits:
        return root
    raise InputError(
        f"there are no images of split {split!r} in {root}",
        expected=f"a folder {place / split} with one sub-folder of images a class",
        found=", ".join(splits) or ("no splits" if there else "no sub-folders" if place.is_dir() else "no such folder"),
        hint=None if training else "--val-split none trains without evaluation",
    )


def _folders(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []


def _unreadable(root: str, split: str, reader: str, error: Exception) -> InputError:
    """What to say where timm's reader gave up."""
    told = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, ImportError) or "install webdataset" in told:
        package = "webdataset" if reader.startswith("wds") else error.name if isinstance(error, ImportError) else None
        return InputError(f"{reader} can't be read without {package}", hint="pip install 'mpcompile[streams]'")
    if "length is unknown" in told:
        hint = f"say it: '{split}|50000'; or take hfds, which fetches all data first"
        return InputError(f"it isn't known how many images split {split!r} of {reader} has", hint=hint)
    expected = "shards and timm's _info.json" if reader.startswith("wds") else "a split of this name"
    if not reader:
        expected = "one sub-folder of images a class"
    return InputError(f"there are no images of split {split!r} in {root}", expected=expected, found=told)


def class_names(source: Any) -> dict[str, int]:
    """Class name -> label, as far as the data names its classes."""
    return dict(getattr(getattr(source, "reader", None), "class_to_idx", None) or {})


def read_class_map(path: Path) -> dict[str, int]:
    """Class name -> label from a text file with one name a line, in the order of the model's outputs.

    Raises:
        InputError: there is no such file, or a name stands in it twice.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't read the class map {path}", expected="one name a line", found=error) from error
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None or not names:
        found = "an empty file" if not names else f"{twice!r} twice"
        raise InputError(f"{path} is no class map", expected="every class once, one name a line", found=found)
    return {name: number for number, name in enumerate(names)}


def _check_names(found: Mapping[str, int], known: Mapping[str, int], split: str) -> None:
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise InputError(
            f"split {split!r} has classes that aren't known",
            expected=f"some of {', '.join(list(known)[:5])}{', ...' if len(known) > 5 else ''}",
            found=", ".join(unknown[:5]),
            hint="training and evaluation need the same classes, and a class map all of them",
        )


def labels_of(source: Any) -> list[int] | None:
    """The label of every item, where it is known without reading images."""
    samples = getattr(getattr(source, "reader", None), "samples", None)
    return None if samples is None else [int(label) for _, label in samples]


def check_classes(source: Any, classes: int) -> None:
    """The dataset has as many classes as the model, where it names them.

    Raises:
        InputError: it hasn't.
    """
    count = len(class_names(source))
    if count and count != classes:
        raise InputError(
            "data and model have different classes",
            expected=f"{classes}, as the model",
            found=count,
            hint="name the model's classes in their order with --class-map FILE, or give a model of these classes "
            "(--checkpoint FILE --num-classes N)",
        )


def fingerprint(source: Any) -> str:
    """A checksum of what a dataset holds, wherever it lies: names of its files and classes, and labels, if known."""
    reader = source.reader
    names = getattr(reader, "samples", None)
    if names is not None:
        names = [(name.removeprefix(str(reader.root)).lstrip(os.sep), label) for name, label in names]
    elif hasattr(reader, "split_info"):
        names = [os.path.basename(str(name)) for name in getattr(reader.split_info, "filenames", None) or ()]
    count = source.samples if isinstance(source, Streamed) else len(source)
    return hashlib.sha256(json.dumps([count, names, class_names(source)]).encode()).hexdigest()
