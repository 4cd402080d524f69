"""Folders of splits: which sub-folder holds the training images, and which the held-out ones, in any spelling."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from mpcompile.data.sources.folders import Listing, subfolders
from mpcompile.data.sources.regular import listed, printable
from mpcompile.errors import InputError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_PLAIN = {  # first come first, where a folder has several of them
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
_SHORT = {"tr": TRAIN, "va": VALIDATION, "vl": VALIDATION, "te": TEST, "ts": TEST}  # splits where all names are such
_FILLING = {"seg", "set", "data", "dataset", "split", "images", "image", "imgs", "img", "pictures", "pics", "photos"}
_FILLING |= {"folder", "dir", "files", "samples", "raw", "full", "the", "my", "new", "small", "part"}


def _parse(name: str) -> tuple[str | None, bool, str]:
    """Kind of split that a name may stand for, whether it says nothing else, and the rest of the name."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_a-zA-Z]+", name)]
    kinds = {_WORDS[word] for word in words if word in _WORDS}
    rest = [word for word in words if word not in _WORDS]
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind, all(word in _FILLING or word.isdigit() for word in rest), " ".join(rest)


def kinds(names: Iterable[str]) -> dict[str, str]:
    """Those of the names of folders side by side that are splits, and of which kind each is.

    ``Training``, ``seg_train`` and ``train2017`` are splits wherever they stand, ``flowers_train`` is one beside
    ``flowers_test``; ``train_station`` is none. ``tr`` is one where nothing but ``te`` or ``va`` is beside it.
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
    """The splits among names of folders, if they hold both training images and others; else none."""
    found = kinds(names)
    return sorted(found) if TRAIN in found.values() and len(set(found.values())) > 1 else []


def check_is_one(listing: Listing, known: Collection[str] = ()) -> None:
    """The folder is one set of images: nowhere in it lie training images beside those that are kept out.

    Args:
        listing: of the folder.
        known: names of classes: folders that are called so are no splits.

    Raises:
        InputError: it holds several splits.
    """
    beside: dict[str, list[str]] = {}
    for folder in listing.folders:
        beside.setdefault(os.path.dirname(folder), []).append(os.path.basename(folder))
    for parent, names in sorted(beside.items()):
        found = side_by_side(names)
        if found and not (parent == "" and set(names) <= set(known)):
            place = listing.root / parent
            raise InputError(
                f"{printable(place)} holds several splits",
                expected="images of one split",
                found=listed(found),
                hint=f"give one of them, such as {printable(place / found[0])}",
            )


def split_folder(root: str | Path, split: str, training: bool) -> Path:
    """The folder of a split: the sub-folder of that name, or of one that means the same, in any spelling.

    ``Training``, ``TRAIN`` and ``seg_train`` are the split ``train``, ``val`` is ``validation``. Folders that only hold
    another one are passed through (``images/train``, ``seg_train/seg_train``). A folder without splits is a training
    set.

    Raises:
        InputError: there is no such split, several folders may be it, or they hold no sub-folders.
    """
    place = Path(root)
    if not split:  # it would be the folder itself, with all that is in it
        raise InputError("the name of a split is empty", expected="the name of a folder, such as train")
    if place.is_file():
        raise InputError(
            f"{printable(root)} is a file",
            expected="a folder",
            hint="unpack it, or cut it into shards and read them with --reader wds/NAME",
        )
    while True:
        there = subfolders(place)
        chosen = _chosen(place, there, split)
        if chosen is not None:
            return _innermost(place / chosen, split, training)
        wrapped = there[0] if len(there) == 1 and not kinds(there) else None
        inner = _image_folder(place, there) if wrapped is None else wrapped
        if inner is None or not (side_by_side(subfolders(place / inner)) or _wraps(place / inner)):
            break
        place /= inner
    found = kinds(there)
    kept_out = _kept_out(place, there, found)
    if training and there and not kept_out:
        return place
    raise _missing(place, there, kept_out or found, split, training)


def _chosen(place: Path, there: list[str], split: str) -> str | None:
    """The sub-folder that is the split.

    Raises:
        InputError: several are as likely.
    """
    if subfolders(place / split):  # else it may be a class that is called like a split
        return split
    kind = _parse(split)[0] if _parse(split)[1] else None
    splits = kinds(there)
    apart = bool(side_by_side(there))
    ranked: dict[int, list[str]] = {}
    for name in there:
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
    """Through folders that hold nothing but one of the same kind, and through splits in splits.

    Raises:
        InputError: it holds no sub-folders.
    """
    there = subfolders(place)
    if not there:
        raise _missing(place.parent, subfolders(place.parent), (), split, training, flat=place)
    if side_by_side(there):
        return split_folder(place, split, training)
    same = len(there) == 1 and _parse(there[0])[0] is not None and _parse(there[0])[0] == _parse(place.name)[0]
    return _innermost(place / there[0], split, training) if same and subfolders(place / there[0]) else place


def _wraps(place: Path) -> bool:
    """Whether a folder holds nothing but a folder of splits."""
    there = subfolders(place)
    return len(there) == 1 and (bool(side_by_side(subfolders(place / there[0]))) or _wraps(place / there[0]))


def _image_folder(place: Path, there: list[str]) -> str | None:
    """The one sub-folder with splits in it, where each has the same ones (``images/train`` beside ``labels/train``)."""
    inner = [subfolders(place / name) for name in there]
    if len(there) < 2 or not all(side_by_side(names) for names in inner):
        return None
    likely = [name for name in there if {"images", "image", "imgs"} & set(re.findall("[a-z]+", name.lower()))]
    return likely[0] if len(likely) == 1 else None


def _kept_out(place: Path, there: list[str], found: dict[str, str]) -> list[str]:
    """Folders in a training set that are splits of their own: beside training images, or beside folders of classes."""
    if side_by_side(there):
        return sorted(found)
    if not any(subfolders(place / name) for name in there):  # a class may be called so
        return []
    likely = {name: kind for name in there if (kind := _parse(name)[0]) is not None}
    if len(likely) == len(there) and len(set(likely.values())) > 1:  # flowers_train beside plants_test
        return there
    return sorted(name for name, kind in found.items() if kind != TRAIN)


def _missing(
    place: Path, there: list[str], found: Iterable[str], split: str, training: bool, flat: Path | None = None
) -> InputError:
    what = listed(sorted(found)) or ("no splits" if there else "no sub-folders" if place.is_dir() else "no such folder")
    if flat is not None:
        what = f"no sub-folders in {printable(flat)}"
    wanted = f"a folder {printable(place / split)} with one sub-folder of images a class"
    return InputError(
        f"there are no images of split {split!r} in {printable(place)}",
        expected=wanted,
        found=what,
        hint=None if training else "--val-split none trains without evaluation",
    )
