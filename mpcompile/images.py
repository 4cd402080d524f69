"""Image files as a model takes them: one, or a folder in batches, resized and normalised as its data config says."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpcompile.errors import InputError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
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


def open_image(path: Path) -> Any:
    """A file as a PIL image in RGB.

    Raises:
        InputError: it is missing, no image, or damaged.
    """
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        found = getattr(error, "strerror", None) or str(error).split(" '")[0]
        raise InputError(f"can't read {path}", expected="an image file", found=found) from error


def shown(image: Tensor, data: Mapping[str, Any]) -> np.ndarray:
    """A normalised (3, H, W) image as (H, W, 3) uint8 to look at."""
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (255 * (image * std + mean)).clamp(0, 255).round().permute(1, 2, 0).numpy().astype(np.uint8)


@dataclass(frozen=True)
class Images:
    """A folder of images in batches, read anew each time it is iterated.

    Attributes:
        paths: the files, in order.
        data: see :func:`data_config`.
        batch: images a batch; the last one may be smaller.
        labels: class indices, or None.
    """

    paths: list[Path]
    data: Mapping[str, Any]
    batch: int
    labels: list[int] | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.paths) / self.batch)

    def __iter__(self) -> Iterator[Any]:
        """(batch, 3, H, W), or pairs of that and int64 labels (batch,)."""
        transform = preprocess(self.data)
        for start in range(0, len(self.paths), self.batch):
            chosen = slice(start, start + self.batch)
            images = torch.stack([transform(open_image(path)) for path in self.paths[chosen]])
            yield images if self.labels is None else (images, torch.tensor(self.labels[chosen]))


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
        path: holds images, or one folder of images for each class: then, if there are ``classes`` of them, their order
            gives the labels: 2 before 10, as timm's readers count.
        classes: classes that the model tells apart; 0 wants no labels.
        names: of the classes in the model's order, where they are known: labels go by them, and some may be missing.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else []
    if not paths:
        found = "no image" if path.is_dir() else "no such folder"
        raise InputError(f"there are no images in {path}", expected=" ".join(sorted(SUFFIXES)), found=found)
    from timm.utils.misc import natural_key

    there = sorted((p.name for p in path.iterdir() if p.is_dir()), key=natural_key)
    known = list(names) if names and set(there) <= set(names) else there
    if samples is not None and samples < len(paths):
        paths = sorted(random.Random(seed).sample(paths, samples))
    labelled = classes and len(known) == classes and there and all(p.parent != path for p in paths)
    number = {name: label for label, name in enumerate(known)}
    labels = [number[p.relative_to(path).parts[0]] for p in paths] if labelled else None
    return Images(paths, data, batch, labels)


def read_images(
    path: Path, data: Mapping[str, Any], *, samples: int, classes: int = 0, names: Sequence[str] = (), seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """``samples`` images, or all where there are fewer, at once: (N, 3, H, W), and labels (N,) where they are known.

    Args:
        path: a folder, as in :func:`folder`, or an .npz file with uint8 ``images`` (N, H, W, 3) and, if they are known,
            ``labels`` (N).

    Raises:
        InputError: nothing there, or no images.
    """
    if path.suffix != ".npz":
        batches = list(folder(path, data, samples=samples, classes=classes, names=names, seed=seed))
        if isinstance(batches[0], Tensor):
            return torch.cat(batches), None
        pixels, labels = zip(*batches, strict=True)
        return torch.cat(pixels), torch.cat(labels)
    items, numbers = _archive(path)
    chosen, transform = (
        sorted(random.Random(seed).sample(range(len(items)), min(samples, len(items)))),
        preprocess(data),
    )
    pictures = torch.stack([transform(_picture(items[i])) for i in chosen])
    return pictures, None if numbers is None else torch.tensor([int(numbers[i]) for i in chosen])


def _picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels)


def _archive(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    expected = "an .npz file with uint8 'images' (N, H, W, 3) and, if known, 'labels' (N)"
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file.get("labels")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"can't read {path}", expected=expected, found=str(error).splitlines()[0]) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise InputError(f"{path} holds other images", expected=expected, found=f"{images.dtype} {images.shape}")
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(f"{path} holds other labels", expected=expected, found=f"{labels.dtype} {labels.shape}")
    return images, labels
