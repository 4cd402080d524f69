"""Labelled images of a folder: the listing, the label of each class folder, and notes on both."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mpcompile.data.sources.folders import Listing, list_images, matched, natural_key, number
from mpcompile.data.sources.regular import listed
from mpcompile.data.sources.splits import check_is_one

_IMAGENET, _SYNSET = 1000, re.compile(r"n\d{8}")


def read_folder(root: Path, names: Collection[str] = ()) -> Listing:
    """List the images below a folder that holds one split.

    Args:
        root: the folder.
        names: names of the classes, if known: a folder with such a name is neither hidden nor a split.

    Raises:
        InputError: the folder does not exist, cannot be read, or holds several splits.
    """
    listing = list_images(root, names)
    check_is_one(listing, names)
    return listing


def labelled_files(listing: Listing, labels: Mapping[str, int]) -> list[tuple[Path, int]]:
    """Return the images in class folders with their labels, in the listing's order."""
    classes = ((path, listing.class_of(path)) for path in listing.files)
    return [(path, labels[name]) for path, name in classes if name is not None]


def note_of(listing: Listing, labelled: bool) -> str | None:
    """Return one line about skipped files, or None. With labels, it includes images outside class folders."""
    return listing.note(*([listing.outside_classes()] if labelled and listing.without_class() else []))


def class_labels(listing: Listing, classes: int, names: Sequence[str]) -> tuple[dict[str, int] | None, str | None]:
    """Return the label of each class folder, or None and the reason if there is one to report.

    Args:
        listing: listing of the folder.
        classes: number of the model's classes.
        names: names of the classes in the model's order, if known. A folder may also have one of several names that
            are separated by commas ("tench, Tinca tinca"), or ImageNet's number of the class. Without names, and with
            as many folders as classes, the order of the folders gives the labels: 2 before 10, as timm's readers count.
    """
    if not listing.classes:
        return None, None
    if not names:
        for folders in (listing.classes, sorted([*listing.classes, *listing.empty], key=natural_key)):
            if len(folders) == classes:
                return number(folders), None
        count = f"{len(listing.classes)} folders of images" if len(listing.classes) > 1 else "one folder of images"
        return None, f"no labels: {count} ({listed(listing.classes)}), but {classes} classes"
    by_synset = _synset_labels(listing.classes, names) if len(names) == classes else None
    if by_synset is not None:
        return by_synset, None
    if len(set(names)) != len(names) or len(names) != classes:
        return None, f"no labels: {len(set(names))} class names are known, but the model has {classes} classes"
    labels = matched(listing.classes, {**_synonyms(names), **number(names)})
    unknown = [name for name, label in labels.items() if label is None]
    if unknown:
        missing = [name for name in names if name not in labels]
        absent = f", and no folder is called {listed(missing)}" if missing else ""
        return None, f"no labels: the model has no classes called {listed(unknown)}{absent}"
    return {name: label for name, label in labels.items() if label is not None}, None


def _synset_labels(folders: Collection[str], names: Sequence[str]) -> dict[str, int] | None:
    """Return the labels of folders called by WordNet's numbers, as ImageNet's are; None for other folders or classes.

    The names of ImageNet's classes, as models of transformers have them, are not even unique: two are a "crane".
    """
    if len(names) != _IMAGENET or not names[0].startswith("tench") or not all(map(_SYNSET.fullmatch, folders)):
        return None
    from timm.data import ImageNetInfo

    known = number(ImageNetInfo("imagenet-1k").label_names())
    return {name: known[name] for name in folders} if known.keys() >= set(folders) else None


def _synonyms(names: Sequence[str]) -> dict[str, int]:
    """Return the labels of names that stand beside others, separated by commas, and belong to one class alone."""
    parts = [(part.strip(), label) for label, name in enumerate(names) if "," in name for part in name.split(",")]
    counts = Counter(part for part, _ in parts)
    return {part: label for part, label in parts if counts[part] == 1}
