"""Folders of splits: which sub-folder holds the training images and which the held-out ones, in any spelling."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from mpcompile.data.sources.folders import Listing, subfolders
from mpcompile.data.sources.regular import listed, printable
from mpcompile.errors import InputError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_PLAIN = {  # in order of preference, for a folder that has several of them
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "val", "valid", "eval", "evaluation", "dev"),
    TEST: ("test", "testing"),
}
_WORDS = {word: kind for kind, words in _PLAIN.items() for word in words} | {
    "trn": TRAIN,
    "trainset": TRAIN,
    "traindata": TRAIN,
    "valset": VALIDATION,
    "validate": VALIDATION,
    "tst": TEST,
    "testset": TEST,
    "testdata": TEST,
    "holdout": TEST,
    "heldout": TEST,
}
_SHORT = {"tr": TRAIN, "va": VALIDATION, "vl": VALIDATION, "te": TEST, "ts": TEST}  # only if all siblings are such
_FILLERS = {"seg", "set", "data", "dataset", "split", "images", "image", "imgs", "img", "pictures", "pics", "photos"}
_FILLERS |= {"folder", "dir", "files", "samples", "raw", "full", "the", "my", "new", "small", "part"}


def _parse(name: str) -> tuple[str | None, bool, str]:
    """Return the kind of split that a name may mean, True if it says nothing else, and the rest of the name."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+", name)]
    kinds = {_WORDS[word] for word in words if word in _WORDS}
    rest = [word for word in words if word not in _WORDS]
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind, all(word in _FILLERS or word.isdigit() for word in rest), " ".join(rest)


def kinds(names: Iterable[str]) -> dict[str, str]:
    """Return the splits among the names of sibling folders -> their kinds.

    ``Training``, ``seg_train`` and ``train2017`` are splits in any company, ``flowers_train`` is one beside
    ``flowers_test``; ``train_station`` is not. ``tr`` is one if its only siblings are ``te`` or ``va``.
    """
    parsed = {name: _parse(name) for name in names}
    short = {name: _SHORT[name.lower()] for name in parsed if name.lower() in _SHORT}
    if len(short) == len(parsed) and TRAIN in short.values() and len(set(short.values())) > 1:
        return short
    by_rest: dict[str, set[str]] = {}
    for kind, _, rest in parsed.values():
        if kind is not None:
            by_rest.setdefault(rest, set()).add(kind)
    return {
        name: kind
        for name, (kind, alone, rest) in parsed.items()
        if kind is not None and (alone or (TRAIN in by_rest[rest] and len(by_rest[rest]) > 1))
    }


def side_by_side(names: Iterable[str]) -> list[str]:
    """Return the splits among the names of sibling folders, if one is for training and another is not; else none."""
    splits = kinds(names)
    return sorted(splits) if TRAIN in splits.values() and len(set(splits.values())) > 1 else []


def check_is_one(listing: Listing, known: Collection[str] = ()) -> None:
    """Check that a folder is one set of images: nowhere below it are training images beside held-out ones.

    Args:
        listing: listing of the folder.
        known: names of classes: folders with such a name are not splits.

    Raises:
        InputError: it holds several splits.
    """
    beside: dict[str, list[str]] = {}
    for folder in listing.folders:
        beside.setdefault(os.path.dirname(folder), []).append(os.path.basename(folder))
    for parent, names in sorted(beside.items()):
        splits = side_by_side(names)
        if splits and not (parent == "" and set(names) <= set(known)):
            place = listing.root / parent
            raise InputError(
                f"{printable(place)} holds several splits",
                expected="images of one split",
                found=listed(splits),
                hint=f"pass one of them, such as {printable(place / splits[0])}",
            )


def split_folder(root: str | Path, split: str, training: bool) -> Path:
    """Return the folder of a split: the sub-folder of that name, or of one that means the same, in any spelling.

    ``Training``, ``TRAIN`` and ``seg_train`` are the split ``train``, ``val`` is ``validation``. Folders that only
    contain another folder are skipped (``images/train``, ``seg_train/seg_train``). A folder without splits is a
    training set.

    Args:
        root: the folder that contains the splits.
        split: name of the split.
        training: True if the split is for training; a folder without splits may then be it.

    Raises:
        InputError: the split does not exist, several folders may be it, or it has no sub-folders.
    """
    place = Path(root)
    if not split:  # it would match the folder itself, with everything in it
        raise InputError("the name of a split is empty", expected="the name of a folder, such as train")
    if place.is_file():
        raise InputError(
            f"{printable(root)} is a file",
            expected="a folder",
            hint="unpack it, or split it into shards and read them with --reader wds/NAME",
        )
    while True:
        names = subfolders(place)
        chosen = _chosen(place, names, split)
        if chosen is not None:
            return _innermost(place / chosen, split, training)
        wrapped = names[0] if len(names) == 1 and not kinds(names) else None
        inner = _image_folder(place, names) if wrapped is None else wrapped
        if inner is None or not (side_by_side(subfolders(place / inner)) or _wraps(place / inner)):
            break
        place /= inner
    splits = kinds(names)
    held_out = _held_out(place, names, splits)
    if training and names and not held_out:
        return place
    raise _missing(place, names, held_out or splits, split, training)


def _chosen(place: Path, names: list[str], split: str) -> str | None:
    """Return the sub-folder that is the split, or None.

    Raises:
        InputError: several are equally likely.
    """
    if subfolders(place / split):  # otherwise it may be a class with the name of a split
        return split
    kind = _parse(split)[0] if _parse(split)[1] else None
    splits = kinds(names)
    apart = bool(side_by_side(names))
    ranked: dict[int, list[str]] = {}
    for name in names:
        plain = _PLAIN.get(kind or "", ())
        same = name.lower() == split.lower()
        if not (same or splits.get(name) == kind) or not (apart or subfolders(place / name)):
            continue
        rank = 0 if same else 1 + plain.index(name.lower()) if name.lower() in plain else 1 + len(plain)
        if same or kind is not None:
            ranked.setdefault(rank, []).append(name)
    if not ranked:
        return None
    best = ranked[min(ranked)]
    if len(best) > 1:
        raise InputError(
            f"several folders in {printable(place)} may be the split {printable(split)!r}",
            expected="one",
            found=listed(best),
            hint="name the folder with --train-split or --val-split",
        )
    return best[0]


def _innermost(place: Path, split: str, training: bool) -> Path:
    """Descend through folders that contain only one of the same kind, and through splits in splits.

    Raises:
        InputError: a folder has no sub-folders.
    """
    names = subfolders(place)
    if not names:
        raise _missing(place.parent, subfolders(place.parent), (), split, training, flat=place)
    if side_by_side(names):
        return split_folder(place, split, training)
    same = len(names) == 1 and _parse(names[0])[0] is not None and _parse(names[0])[0] == _parse(place.name)[0]
    return _innermost(place / names[0], split, training) if same and subfolders(place / names[0]) else place


def _wraps(place: Path) -> bool:
    """Return True if a folder contains only a folder of splits."""
    names = subfolders(place)
    return len(names) == 1 and (bool(side_by_side(subfolders(place / names[0]))) or _wraps(place / names[0]))


def _image_folder(place: Path, names: list[str]) -> str | None:
    """Return the image folder among sub-folders that all contain splits (``images/train``, ``labels/train``)."""
    inner = [subfolders(place / name) for name in names]
    if len(names) < 2 or not all(map(side_by_side, inner)):
        return None
    likely = [name for name in names if {"images", "image", "imgs"} & set(re.findall("[a-z]+", name.lower()))]
    return likely[0] if len(likely) == 1 else None


def _held_out(place: Path, names: list[str], splits: dict[str, str]) -> list[str]:
    """Return the sub-folders of a training set that are held-out splits: beside training images or class folders."""
    if side_by_side(names):
        return sorted(splits)
    if not any(subfolders(place / name) for name in names):  # a class may have such a name
        return []
    likely = {name: kind for name in names if (kind := _parse(name)[0]) is not None}
    if len(likely) == len(names) and len(set(likely.values())) > 1:  # flowers_train beside plants_test
        return names
    return sorted(name for name, kind in splits.items() if kind != TRAIN)


def _missing(
    place: Path, names: list[str], splits: Iterable[str], split: str, training: bool, flat: Path | None = None
) -> InputError:
    nothing = "no splits" if names else "no sub-folders" if place.is_dir() else "no such folder"
    found = listed(sorted(splits)) or nothing
    if flat is not None:
        found = f"no sub-folders in {printable(flat)}"
    expected = f"a folder {printable(place / split)} with one sub-folder of images per class"
    return InputError(
        f"there are no images of split {split!r} in {printable(place)}",
        expected=expected,
        found=found,
        hint=None if training else "--val-split none trains without evaluation",
    )
