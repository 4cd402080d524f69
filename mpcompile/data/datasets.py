"""Labelled training images from a folder, a Hugging Face dataset or WebDataset shards.

Folders are read by :mod:`mpcompile.data.sources`, as for every other command; datasets and shards by timm's readers.
Pixels from any source are converted to RGB in :mod:`mpcompile.data.sources.pictures`.
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
from mpcompile.data.sources.folders import Listing, matched, natural_key, number
from mpcompile.data.sources.labelled import labelled_files, note_of, read_folder
from mpcompile.data.sources.pictures import EXPECTED, Unreadable, decode
from mpcompile.data.sources.regular import listed, open_regular, printable
from mpcompile.data.sources.splits import split_folder
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
    "unlabelled",
]
READERS = ("hfds", "hfids", "wds")


class Folder:
    """A folder as a reader of timm's datasets: files and labels by index.

    Attributes:
        root: the folder of the split.
        samples: path and label of every image, in order.
        class_to_idx: label of every class, by name; empty if images have no classes.
    """

    def __init__(self, root: Path, files: Iterable[tuple[Path, int]], classes: Mapping[str, int]) -> None:
        self.root, self.class_to_idx = str(root), dict(classes)
        samples = ((str(path), label) for path, label in files)
        self.samples = sorted(samples, key=lambda sample: natural_key(sample[0]))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open_regular(path, EXPECTED), label

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the path of an image, relative to the folder of the split unless ``absolute``."""
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


class Readable(ImageDataset):
    """timm's dataset, except that an unreadable image raises an error that names it, and items carry their index.

    Items are (image, label, index).

    Attributes:
        notes: a line about files that were not read; empty if all were.
    """

    notes: tuple[str, ...] = ()

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        try:
            source, label, *_ = self.reader[index]
            with source:
                image = decode(source)
        except Exception as error:  # includes timm's readers: on damaged files and caches they raise anything
            found = error.found if isinstance(error, InputError) else error if isinstance(error, Unreadable) else None
            found = found or first_line(error)
            raise InputError(
                f"image {printable(self._name(index))} cannot be read",
                expected="a whole image file",
                found=found,
                hint="replace or remove it",
            ) from error
        return (image if self.transform is None else self.transform(image)), -1 if label is None else int(label), index

    def _name(self, index: int) -> str:
        """Return the path of the image, or its index."""
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
    """Return a dataset of labelled images.

    Args:
        root: image folder or its parent (see :func:`split_folder`), folder of shards, or Hugging Face cache.
        split: name of the split; ``"NAME|COUNT"`` gives the number of images in a streamed Hugging Face split.
        training: shuffle a streamed dataset.
        reader: ``""`` for folders, ``"hfds/NAME"`` (Hugging Face datasets), ``"hfids/NAME"`` (streamed), ``"wds/NAME"``
            (WebDataset), in timm's spelling.
        seed: seed of a streamed dataset's shuffling.
        classes: label of every class, by name, for data that names its classes; None numbers them in the order of
            their names.
        class_map: the file with these names, for errors.

    Raises:
        InputError: there is no data, a package to read it is missing, or it has a class that ``classes`` does not
            name.
        ConfigError: the reader does not exist.
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
        source = create_dataset(reader, root, split=name, **options)
        names = class_names(source)
        if names and classes and names != dict(classes):
            _check_names(names, classes, name, class_map)
            source = create_dataset(reader, root, split=name, class_map=dict(classes), **options)
        if isinstance(source, ImageDataset):
            return Readable(root, reader=source.reader)
        return _streamed(source, root, training, seed)
    except InputError:
        raise
    except Exception as error:  # timm's readers do not check _info.json and caches
        raise _unreadable(root, name, reader, error) from error


def _check_regular(root: str, names: Iterable[str]) -> None:
    """Check files in a folder of shards before timm opens them: it would wait for a FIFO.

    Raises:
        InputError: one exists, but is not a regular file.
    """
    for name in names:
        path = os.path.join(root, name)
        if os.path.exists(path) and not os.path.isfile(path):
            open_regular(path, "a regular file")  # raises, and names its kind


def _streamed(source: Any, root: str, training: bool, seed: int) -> Streamed:
    """Return a stream, after a check of its description: its length and its shards.

    Raises:
        InputError: the description is unusable.
    """
    count, info = source.reader.num_samples, getattr(source.reader, "split_info", None)
    shards = getattr(info, "filenames", ("",))
    if (
        not isinstance(count, int)
        or count < training
        or not shards
        or not all(isinstance(name, str) for name in shards)
    ):
        described = printable(f"{count!r} samples in {list(shards)[:3]}")
        raise InputError(
            "a stream has no usable description", expected="a number of samples, names of shards", found=described
        )
    if info is not None:
        _check_regular(root, shards)
    return Streamed(source.reader, training, seed)


def _of_folder(place: Path, split: str, classes: Mapping[str, int] | None, class_map: str) -> Readable:
    """Return the images in the folder of a split; its sub-folders are the classes."""
    listing = read_folder(place, classes or ())
    if not listing.classes:
        found = "images, but none in a sub-folder" if listing.files else listing.note() or "no images"
        raise InputError(
            f"there are no images of split {printable(split)!r} in {printable(place)}",
            expected="one sub-folder of images per class",
            found=found,
        )
    if classes:
        _check_names(listing.classes, classes, split, class_map)
    known = dict(classes or number(listing.classes))
    labels = {name: label for name, label in matched(listing.classes, known).items() if label is not None}
    return _readable(listing, labelled_files(listing, labels), known)


def unlabelled(root: str, split: str) -> Readable:
    """Return all images below a folder, at any depth, as a dataset without classes.

    Args:
        root: folder of images, or its parent.
        split: name of the split to read (see :func:`split_folder`); if there is none, ``root`` itself is read.

    Raises:
        InputError: the folder does not exist, has no images, or holds several splits.
    """
    try:
        place = split_folder(root, split, training=True)
    except InputError:  # it has no folders of classes
        place = Path(root) / split if (Path(root) / split).is_dir() else Path(root)
    listing = read_folder(place)
    if not listing.files:
        found = listing.note() or "no images"
        raise InputError(f"there are no images in {printable(place)}", expected="a folder of images", found=found)
    numbers = number(listing.classes)  # of folders: they are no classes, but calibration takes some images of each
    files = [(path, numbers.get(listing.class_of(path) or "", -1)) for path in listing.files]
    return _readable(listing, files, {})


def _readable(listing: Listing, files: Iterable[tuple[Path, int]], classes: Mapping[str, int]) -> Readable:
    source = Readable(str(listing.root), reader=Folder(listing.root, files, classes))
    source.notes = tuple(filter(None, [note_of(listing, labelled=bool(classes))]))
    return source


def _unreadable(root: str, split: str, reader: str, error: Exception) -> InputError:
    """Return the error for data that timm's reader cannot read."""
    reason = first_line(error)
    reason = f"no {reason} in its description" if isinstance(error, KeyError) else reason
    if isinstance(error, ImportError) or "install webdataset" in reason:
        package = "webdataset" if reader.startswith("wds") else error.name if isinstance(error, ImportError) else None
        return InputError(f"{reader} cannot be read without {package}", hint="run pip install 'mpcompile[streams]'")
    if "length is unknown" in reason:
        hint = f"give it: '{split}|50000'; or use hfds, which fetches all data first"
        return InputError(f"the number of images in split {split!r} of {reader} is unknown", hint=hint)
    expected = "shards and timm's _info.json" if reader.startswith("wds") else "a split of this name"
    return InputError(f"there are no images of split {split!r} in {root}", expected=expected, found=reason)


def class_names(source: Any) -> dict[str, int]:
    """Return the label of every class, by name; empty if the data does not name its classes."""
    return dict(getattr(getattr(source, "reader", None), "class_to_idx", None) or {})


def _check_names(names: Iterable[str], known: Mapping[str, int], split: str, class_map: str) -> None:
    unknown = sorted(name for name, label in matched(names, dict(known)).items() if label is None)
    if unknown:
        raise InputError(
            f"split {printable(split)!r} has unknown classes",
            expected=f"some of {listed(known)}{_lines_of(class_map)}",
            found=listed(unknown),
            hint="training and evaluation need the same classes, and a class map all of them",
        )


def _lines_of(class_map: str) -> str:
    return f", the lines of {printable(class_map)}" if class_map else ""


def labels_of(source: Any) -> list[int] | None:
    """Return the label of every item, or None if images would have to be read to know it."""
    samples = getattr(getattr(source, "reader", None), "samples", None)
    return None if samples is None else [int(label) for _, label in samples]


def check_classes(source: Any, classes: int, class_map: str = "") -> None:
    """Check that a dataset has as many classes as the model, if it or the file ``class_map`` names them.

    Raises:
        InputError: it has another number.
    """
    count = len(class_names(source))
    if count and count != classes:
        raise InputError(
            "data and model have different classes",
            expected=f"{classes}, as in the model",
            found=f"{count} ({listed(class_names(source))}{_lines_of(class_map)})",
            hint="name the model's classes in order with --class-map FILE, or pass a model of these classes "
            "(--checkpoint FILE --num-classes N)",
        )


def fingerprint(source: Any) -> str:
    """Return a SHA-256 checksum of a dataset, independent of its location: file and class names, and known labels."""
    reader = source.reader
    names = getattr(reader, "samples", None)
    if names is not None:
        names = [(name.removeprefix(str(reader.root)).lstrip(os.sep), label) for name, label in names]
    elif hasattr(reader, "split_info"):
        names = [os.path.basename(str(name)) for name in getattr(reader.split_info, "filenames", None) or ()]
    count = source.samples if isinstance(source, Streamed) else len(source)
    return hashlib.sha256(json.dumps([count, names, class_names(source)]).encode()).hexdigest()
