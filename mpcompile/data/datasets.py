"""Labelled training images from a folder, a Hugging Face dataset or WebDataset shards.

What lies in a folder is decided in :mod:`mpcompile.data`, as for every other command; datasets and shards come through
timm's readers. Pixels, wherever they come from, are brought to RGB in :mod:`mpcompile.data.sources.pictures`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from timm.data import ImageDataset, create_dataset

from mpcompile.data.sources.class_maps import read_class_map
from mpcompile.data.sources.folders import Listing, list_images, matched, natural_key, number
from mpcompile.data.sources.pictures import EXPECTED, Unreadable, decode
from mpcompile.data.sources.regular import listed, open_regular, printable
from mpcompile.data.sources.splits import check_is_one, split_folder
from mpcompile.data.streamed import Streamed
from mpcompile.errors import ConfigError, InputError, first_line

__all__ = [
    "READERS",
    "Readable",
    "check_classes",
    "class_names",
    "dataset",
    "fingerprint",
    "labels_of",
    "read_class_map",
    "split_folder",
]
READERS = ("hfds", "hfids", "wds")


class Folder:
    """What timm's reader of folders is to its datasets: files and labels by number.

    Attributes:
        root: the folder of the split.
        samples: path and label of every image, in order.
        class_to_idx: class name -> label.
    """

    def __init__(self, listing: Listing, numbers: Mapping[str, int | None], classes: Mapping[str, int]) -> None:
        self.root, self.class_to_idx = str(listing.root), dict(classes)
        labelled = ((str(path), numbers.get(listing.class_of(path) or "")) for path in listing.files)
        self.samples = sorted((s for s in labelled if s[1] is not None), key=lambda sample: natural_key(sample[0]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | None]:
        path, label = self.samples[index]
        return open_regular(path, EXPECTED), label

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The path of an image, below the folder of the split unless it is to be ``absolute``."""
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class Readable(ImageDataset):
    """timm's dataset, except that an image that can't be read is an error that names it, and items are numbered.

    Items are (image, label, number).

    Attributes:
        notes: what of the folder isn't read, in a line; none where everything is.
    """

    notes: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        try:
            source, label, *_ = self.reader[index]
            with source:
                image = decode(source)
        except Exception as error:  # of timm's readers, too: whatever a damaged file or cache makes them raise
            found = error.found if isinstance(error, InputError) else error if isinstance(error, Unreadable) else None
            found = found or printable((str(error).splitlines() or [""])[0]) or type(error).__name__
            raise InputError(
                f"image {printable(self._name(index))} can't be read",
                expected="a whole image file",
                found=found,
                hint="replace or remove it",
            ) from error
        return (image if self.transform is None else self.transform(image)), -1 if label is None else int(label), index

    def _name(self, index: int) -> str:
        """A path that leads to the file, or what comes next to it."""
        try:
            return str(self.reader.filename(index, absolute=True) or f"number {index}")
        except Exception:
            return f"number {index}"


def dataset(
    root: str,
    split: str,
    training: bool,
    reader: str = "",
    seed: int = 0,
    classes: Mapping[str, int] | None = None,
    class_map: str = "",
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
        class_map: the file that names them, for errors.

    Raises:
        InputError: nothing is there, what it takes to read it isn't installed, or it has a class that ``classes``
            doesn't name.
        ConfigError: no such reader.
    """
    kind = reader.partition("/")[0].lower()
    if kind and kind not in READERS:
        expected = "hfds/NAME, hfids/NAME, wds/NAME, or none: a folder"
        raise ConfigError(f"there is no reader {reader!r}", expected=expected)
    if not kind:
        return _of_folder(split_folder(root, split, training), split, classes, class_map)
    options: dict[str, Any] = {"is_training": training, "seed": seed, "search_split": False}
    name = split
    if kind == "hfids":
        name, _, count = split.partition("|")
        options["num_samples"] = int(count) if count.isdecimal() else None
    try:
        if kind == "wds":
            _check_regular(root, ("_info.json", "info.json"))
        found = create_dataset(reader, root, split=name, **options)
        names = class_names(found)
        if names and classes and names != dict(classes):
            _check_names(names, classes, name, class_map)
            found = create_dataset(reader, root, split=name, class_map=dict(classes), **options)
        return (
            Readable(root, reader=found.reader)
            if isinstance(found, ImageDataset)
            else _streamed(found, root, training, seed)
        )
    except InputError:
        raise
    except Exception as error:  # timm's readers take _info.json and caches as they are
        raise _unreadable(root, name, reader, error) from error


def _check_regular(root: str, names: Iterable[str]) -> None:
    """Of a folder of shards, timm opens these: it would wait for a FIFO.

    Raises:
        InputError: one is there, but no regular file.
    """
    for name in names:
        path = os.path.join(root, name)
        if os.path.exists(path) and not os.path.isfile(path):
            open_regular(path, "a regular file")  # says what it is


def _streamed(found: Any, root: str, training: bool, seed: int) -> Streamed:
    """A stream, if what is said about its length and its shards makes sense.

    Raises:
        InputError: it doesn't.
    """
    count, info = found.reader.num_samples, getattr(found.reader, "split_info", None)
    shards = getattr(info, "filenames", ("",))
    if (
        not isinstance(count, int)
        or count < training
        or not shards
        or not all(isinstance(name, str) for name in shards)
    ):
        says = printable(f"{count!r} samples in {list(shards)[:3]}")
        raise InputError(
            "a stream has no usable description", expected="a number of samples, names of shards", found=says
        )
    if info is not None:
        _check_regular(root, shards)
    return Streamed(found.reader, training, seed)


def _of_folder(place: Path, split: str, classes: Mapping[str, int] | None, class_map: str) -> Readable:
    """The images of a split's folder, its first sub-folders the classes."""
    listing = list_images(place, classes or ())
    check_is_one(listing, classes or ())
    if not listing.classes:
        found = "images, but none in a sub-folder" if listing.files else listing.told() or "no images"
        raise InputError(
            f"there are no images of split {printable(split)!r} in {printable(place)}",
            expected="one sub-folder of images a class",
            found=found,
        )
    if classes:
        _check_names(listing.classes, classes, split, class_map)
    known = dict(classes or number(listing.classes))
    source = Readable(str(place), reader=Folder(listing, matched(listing.classes, known), known))
    source.notes = tuple(filter(None, [listing.told(*([listing.beside()] if listing.without_class() else []))]))
    return source


def _unreadable(root: str, split: str, reader: str, error: Exception) -> InputError:
    """What to say where timm's reader gave up."""
    told = first_line(error)
    told = f"no {told} in what describes it" if isinstance(error, KeyError) else told
    if isinstance(error, ImportError) or "install webdataset" in told:
        package = "webdataset" if reader.startswith("wds") else error.name if isinstance(error, ImportError) else None
        return InputError(f"{reader} can't be read without {package}", hint="pip install 'mpcompile[streams]'")
    if "length is unknown" in told:
        hint = f"say it: '{split}|50000'; or take hfds, which fetches all data first"
        return InputError(f"it isn't known how many images split {split!r} of {reader} has", hint=hint)
    expected = "shards and timm's _info.json" if reader.startswith("wds") else "a split of this name"
    return InputError(f"there are no images of split {split!r} in {root}", expected=expected, found=told)


def class_names(source: Any) -> dict[str, int]:
    """Class name -> label, as far as the data names its classes."""
    return dict(getattr(getattr(source, "reader", None), "class_to_idx", None) or {})


def _check_names(found: Iterable[str], known: Mapping[str, int], split: str, class_map: str) -> None:
    unknown = sorted(name for name, label in matched(found, dict(known)).items() if label is None)
    if unknown:
        raise InputError(
            f"split {printable(split)!r} has classes that aren't known",
            expected=f"some of {listed(known)}{_lines_of(class_map)}",
            found=listed(unknown),
            hint="training and evaluation need the same classes, and a class map all of them",
        )


def _lines_of(class_map: str) -> str:
    return f", the lines of {printable(class_map)}" if class_map else ""


def labels_of(source: Any) -> list[int] | None:
    """The label of every item, where it is known without reading images."""
    samples = getattr(getattr(source, "reader", None), "samples", None)
    return None if samples is None else [int(label) for _, label in samples]


def check_classes(source: Any, classes: int, class_map: str = "") -> None:
    """The dataset has as many classes as the model, where it names them, or the file ``class_map`` does.

    Raises:
        InputError: it hasn't.
    """
    count = len(class_names(source))
    if count and count != classes:
        raise InputError(
            "data and model have different classes",
            expected=f"{classes}, as the model",
            found=f"{count} ({listed(class_names(source))}{_lines_of(class_map)})",
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
