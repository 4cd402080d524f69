"""Image files in batches, resized and normalised as a model's data configuration says.

:func:`images_at` (a folder or an .npz file) and :func:`folder` return :class:`Images`: batches that are read from disk
each time they are iterated, and whose number is known beforehand; ``notes`` reports omissions.
:mod:`mpcompile.data.sources` decides which files are read.
"""

from __future__ import annotations

import dataclasses
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

from mpcompile.data.labels import check_range
from mpcompile.data.sources.archives import Archive, open_archive
from mpcompile.data.sources.labelled import class_labels, labelled_files, note_of, read_folder
from mpcompile.data.sources.pictures import SUFFIXES, open_image
from mpcompile.data.sources.regular import printable

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
_FIELDS = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return the size, mean, standard deviation and crop that a timm model was trained with, as JSON values."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    values = {key: config[key] for key in _FIELDS if key in config}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def preprocess(data: Mapping[str, Any], **augmentation: Any) -> Any:
    """Return timm's transform for a :func:`data_config`, from a PIL image to a tensor (3, H, W).

    Args:
        data: size, mean, standard deviation and crop.
        augmentation: options of timm's training transform; without any, this is the evaluation transform.
    """
    from timm.data import create_transform

    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return create_transform(**options, is_training=bool(augmentation), **augmentation)


def shown(image: Tensor, data: Mapping[str, Any]) -> np.ndarray:
    """Return a normalised image (3, H, W) as uint8 (H, W, 3), for display."""
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (255 * (image * std + mean)).clamp(0, 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


@dataclass(frozen=True)
class Images:
    """Images in batches, read from disk at every iteration; one batch is in memory at a time.

    Attributes:
        paths: the files, in order.
        data: see :func:`data_config`.
        batch: images per batch; the last one may be smaller.
        labels: class numbers, or None.
        notes: remarks to show beside results: files left out, and why there are no labels.
    """

    paths: list[Path]
    data: Mapping[str, Any]
    batch: int
    labels: list[int] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of batches."""
        return math.ceil(self.count / self.batch)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.paths)

    def first(self, count: int) -> Images:
        """Return the first ``count`` images."""
        labels = None if self.labels is None else self.labels[:count]
        return dataclasses.replace(self, paths=self.paths[:count], labels=labels)

    def pictures(self) -> Iterator[Any]:
        """Yield the images one by one, as PIL images in RGB."""
        return map(open_image, self.paths)

    def __iter__(self) -> Iterator[Any]:
        """Yield images (batch, 3, H, W), or pairs of them and int64 labels (batch,)."""
        transform, pictures = preprocess(self.data), self.pictures()
        for start in range(0, self.count, self.batch):
            images = torch.stack([transform(picture) for picture in itertools.islice(pictures, self.batch)])
            labels = None if self.labels is None else self.labels[start : start + self.batch]
            yield images if labels is None else (images, torch.tensor(labels))
        for _ in pictures:  # reading on to the end verifies an archive's checksum
            pass


@dataclass(frozen=True)
class Archived(Images):
    """Images in an .npz file; ``paths`` is empty."""

    archive: Archive | None = None
    chosen: Sequence[int] = ()

    @property
    def count(self) -> int:
        return len(self.chosen)

    def first(self, count: int) -> Images:
        return dataclasses.replace(self, labels=self.labels and self.labels[:count], chosen=self.chosen[:count])

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
    """Return the images of a folder, or of an .npz file with uint8 ``images`` (N, H, W, 3) and, optionally, ``labels``.

    Arguments are those of :func:`folder`; labels of an .npz file are integers (N,).

    Raises:
        InputError: the path does not exist, holds no images, is a damaged file, or has labels that the model has no
            classes for.
    """
    if path.suffix != ".npz":
        return folder(path, data, samples=samples, batch=batch, classes=classes, names=names, seed=seed)
    archive = open_archive(path)
    chosen: Sequence[int] = range(len(archive))
    if samples is not None:
        chosen = sorted(random.Random(seed).sample(chosen, min(samples, len(archive))))
    labels = None if archive.labels is None else [int(archive.labels[place]) for place in chosen]
    if labels is not None:
        check_range(torch.tensor(labels, dtype=torch.int64), classes or None, f"a label in {printable(path)}")
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
    """Return the images below a folder, or ``samples`` of them drawn with ``seed``.

    Args:
        path: holds images, or one folder of images per class, at any depth.
        data: see :func:`data_config`.
        samples: number of images to draw; None, or more than there are, takes all.
        batch: images per batch.
        classes: number of the model's classes; with 0, no labels are returned.
        names: names of the classes in the model's order, if known: they alone decide the labels, and classes may lack
            a folder. Without names, and with as many folders as classes, the order of the folders gives the labels,
            with 2 before 10, as timm's readers sort. Otherwise there are no labels, and ``notes`` says why.
        seed: seed of the random draw.

    Raises:
        InputError: the folder does not exist, holds no image, or holds several splits.
    """
    listing = read_folder(path, names)
    listing.check_not_empty()
    by_class, reason = class_labels(listing, classes, names) if classes else (None, None)
    label_of = {} if by_class is None else dict(labelled_files(listing, by_class))
    paths = listing.files if by_class is None else list(label_of)
    if samples is not None and samples < len(paths):
        paths = sorted(random.Random(seed).sample(paths, samples))
    labels = None if by_class is None else [label_of[path] for path in paths]
    notes = (note_of(listing, by_class is not None), reason)
    return Images(paths, data, batch, labels, tuple(filter(None, notes)))


def at_once(images: Images) -> tuple[Tensor, Tensor | None]:
    """Return all images (N, 3, H, W), and their labels (N,) or None."""
    batches = list(images)
    if isinstance(batches[0], Tensor):
        return torch.cat(batches), None
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def read_images(
    path: Path, data: Mapping[str, Any], *, samples: int, classes: int = 0, names: Sequence[str] = (), seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Return ``samples`` images (N, 3, H, W), or all if there are fewer, and their labels (N,) or None.

    Arguments are those of :func:`images_at`.

    Raises:
        InputError: as :func:`images_at`, or an image cannot be read.
    """
    return at_once(images_at(path, data, samples=samples, classes=classes, names=names, seed=seed))
