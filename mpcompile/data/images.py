"""Image files as a model takes them: one, or a folder in batches, resized and normalised as its data config says.

:func:`images_at` (a folder or an .npz file) and :func:`folder` give :class:`Images`: batches that are read while
they are iterated, anew each time, and whose number is known beforehand; ``notes`` says what was left out. Which files
are read is decided in :mod:`mpcompile.data`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpcompile.data.sources.archives import Archive, open_archive
from mpcompile.data.sources.folders import Listing, list_images, matched, natural_key, number
from mpcompile.data.sources.pictures import SUFFIXES, open_image
from mpcompile.data.sources.regular import listed, printable
from mpcompile.data.sources.splits import check_is_one
from mpcompile.errors import InputError

__all__ = [
    "SUFFIXES",
    "Images",
    "at_once",
    "data_config",
    "folder",
    "images_at",
    "open_image",
    "preprocess",
    "read_images",
    "shown",
]
_KEPT = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def data_config(model: nn.Module) -> dict[str, Any]:
    """Size, mean, deviation and crop that a timm model was trained with, as JSON values."""
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model)
    return {key: list(found[key]) if isinstance(found[key], tuple) else found[key] for key in _KEPT if key in found}


def preprocess(data: Mapping[str, Any], **augmentation: Any) -> Any:
    """timm's transform for a :func:`data_config`: a PIL image -> (3, H, W).

    Args:
        data: size, mean, deviation and crop.
        augmentation: options of timm's training transform; without any it is that of evaluation.
    """
    from timm.data import create_transform

    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return create_transform(**options, is_training=bool(augmentation), **augmentation)


def shown(image: Tensor, data: Mapping[str, Any]) -> np.ndarray:
    """A normalised (3, H, W) image as (H, W, 3) uint8 to look at."""
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (255 * (image * std + mean)).clamp(0, 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


@dataclass(frozen=True)
class Images:
    """Images in batches, read anew each time it is iterated: a batch is all that is held.

    Attributes:
        paths: the files, in order.
        data: see :func:`data_config`.
        batch: images a batch; the last one may be smaller.
        labels: class indices, or None.
        notes: what whoever reads the figures has to know: what was left out, and why there are no labels.
    """

    paths: list[Path]
    data: Mapping[str, Any]
    batch: int
    labels: list[int] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Batches."""
        return math.ceil(self.count / self.batch)

    @property
    def count(self) -> int:
        """Images."""
        return len(self.paths)

    def pictures(self) -> Iterator[Any]:
        """One after another, as PIL images in RGB."""
        return map(open_image, self.paths)

    def __iter__(self) -> Iterator[Any]:
        """(batch, 3, H, W), or pairs of that and int64 labels (batch,)."""
        transform, pictures = preprocess(self.data), self.pictures()
        for start in range(0, self.count, self.batch):
            images = torch.stack([transform(picture) for picture in itertools.islice(pictures, self.batch)])
            labels = None if self.labels is None else self.labels[start : start + self.batch]
            yield images if labels is None else (images, torch.tensor(labels))
        for _ in pictures:  # an archive is checked at its end
            pass


@dataclass(frozen=True)
class Archived(Images):
    """Images in an .npz file; ``paths`` is empty."""

    archive: Archive | None = None
    chosen: Sequence[int] = ()

    @property
    def count(self) -> int:
        return len(self.chosen)

    def pictures(self) -> Iterator[Any]:
        assert self.archive is not None
        return self.archive.pictures(self.chosen)


def images_at(
    path: Path,
    data: Mapping[str, Any],
    *,
    samples: int | None = None,
    batch: int = 32,
    classes: int = 0,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Images:
    """The images of a folder, as in :func:`folder`, or of an .npz file with uint8 ``images`` (N, H, W, 3) and, if
    known, ``labels`` (N).

    Raises:
        InputError: nothing there, no images, a damaged file, or labels that the model has no classes for.
    """
    if path.suffix != ".npz":
        return folder(path, data, samples=samples, batch=batch, classes=classes, names=names, seed=seed)
    archive = open_archive(path)
    chosen: Sequence[int] = range(len(archive))
    if samples is not None:
        chosen = sorted(random.Random(seed).sample(chosen, min(samples, len(archive))))
    labels = None if archive.labels is None else [int(archive.labels[place]) for place in chosen]
    odd = next((label for label in labels or () if label < 0 or (classes and label >= classes)), None)
    if odd is not None:
        expected = f"0 to {classes - 1}, the classes of the model" if classes else "0 or more"
        raise InputError(f"a label in {printable(path)} is out of range", expected=expected, found=odd)
    return Archived([], data, batch, labels, (), archive, chosen)


def folder(
    path: Path,
    data: Mapping[str, Any],
    *,
    samples: int | None = None,
    batch: int = 32,
    classes: int = 0,
    names: Sequence[str] = (),
    seed: int = 0,
) -> Images:
    """The images below a folder, or ``samples`` of them drawn by ``seed``.

    Args:
        path: holds images, or one folder of images for each class, in which they may lie deeper.
        classes: classes that the model tells apart; 0 wants no labels.
        names: of the classes in the model's order, where they are known: labels go by them alone, and some may be
            missing. Where they aren't, and there are as many folders as classes, the order of the folders gives the
            labels: 2 before 10, as timm's readers count. Else there are no labels, and ``notes`` says why.

    Raises:
        InputError: there is no such folder, no image in it, or it holds several splits.
    """
    listing = list_images(path, names)
    listing.check_not_empty()
    check_is_one(listing, names)
    paths, more = listing.files, []
    labels_by, why = _numbered(listing, classes, names) if classes else (None, None)
    if labels_by is not None and listing.without_class():
        paths = [path for path in paths if listing.class_of(path) is not None]
        more = [listing.beside()]
    if samples is not None and samples < len(paths):
        paths = sorted(random.Random(seed).sample(paths, samples))
    labels = None if labels_by is None else [labels_by[str(listing.class_of(path))] for path in paths]
    return Images(paths, data, batch, labels, tuple(filter(None, (listing.told(*more), why))))


def _numbered(listing: Listing, classes: int, names: Sequence[str]) -> tuple[dict[str, int] | None, str | None]:
    """Label of each folder; or None and the reason, where there is one to tell."""
    if not listing.classes:
        return None, None
    if not names:
        for likely in (listing.classes, sorted([*listing.classes, *listing.empty], key=natural_key)):
            if len(likely) == classes:
                return number(likely), None
        there = f"{len(listing.classes)} folders of images" if len(listing.classes) > 1 else "one folder of images"
        return None, f"no labels: {there} ({listed(listing.classes)}), but {classes} classes"
    if len(set(names)) != len(names) or len(names) != classes:
        return None, f"no labels: {len(set(names))} names of classes are known, the model has {classes} classes"
    labels = matched(listing.classes, number(names))
    unknown = [name for name, label in labels.items() if label is None]
    if unknown:
        missing = [name for name in names if name not in labels]
        absent = f", and no folder is called {listed(missing)}" if missing else ""
        return None, f"no labels: the model has no classes that are called {listed(unknown)}{absent}"
    return {name: label for name, label in labels.items() if label is not None}, None


def at_once(images: Images) -> tuple[Tensor, Tensor | None]:
    """All of them: (N, 3, H, W), and labels (N,) where they are known."""
    batches = list(images)
    if isinstance(batches[0], Tensor):
        return torch.cat(batches), None
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def read_images(
    path: Path, data: Mapping[str, Any], *, samples: int, classes: int = 0, names: Sequence[str] = (), seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """``samples`` images, or all where there are fewer, at once: (N, 3, H, W), and labels (N,) where they are known.

    Args:
        path: as :func:`images_at` takes it.

    Raises:
        InputError: as :func:`images_at`, or an image can't be read.
    """
    return at_once(images_at(path, data, samples=samples, classes=classes, names=names, seed=seed))
