"""Images of a folder or an .npz file, drawn at random and put through a model's transform."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor

from mpcompile.errors import InputError


def read_images(
    path: Path, transform: Callable[[Any], Tensor], samples: int, seed: int, classes: int | None
) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) and, where they are known, labels (N).

    Args:
        path: a folder of images, searched through; its sub-folders stand for the classes, in order, if there are as
            many as ``classes``. Or an .npz file with uint8 ``images`` (N, H, W, 3) and perhaps ``labels`` (N).
        samples: how many are drawn; all where there are fewer.

    Raises:
        InputError: nothing there, or no images.
    """
    if not path.exists():
        raise InputError(f"there is no {path}", expected="a folder of images or an .npz file")
    items, labels = _folder(path, classes) if path.is_dir() else _archive(path)
    if not len(items):
        raise InputError(f"{path} holds no images", expected="at least one", found="none")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(items), generator=generator)[:samples].tolist()
    tensors = torch.stack([transform(_open(items[i])) for i in chosen])
    return tensors, None if labels is None else torch.tensor([int(labels[i]) for i in chosen])


def _folder(path: Path, classes: int | None) -> tuple[list[Path], list[int] | None]:
    endings = get_img_extensions(as_set=True)
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in endings)
    folders = sorted(f for f in path.iterdir() if f.is_dir())
    if len(folders) != classes or any(f.parent == path for f in files):
        return files, None
    numbers = {folder.name: number for number, folder in enumerate(folders)}
    return files, [numbers[f.relative_to(path).parts[0]] for f in files]


def _archive(path: Path) -> tuple[Any, Any]:
    expected = "an .npz file with uint8 'images' (N, H, W, 3) and, if known, 'labels' (N)"
    try:
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["images"], file.get("labels")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"can't read {path}", expected=expected, found=str(error).splitlines()[0]) from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"{path} holds other images", expected=expected, found=f"{images.dtype} {images.shape}")
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(f"{path} holds other labels", expected=expected, found=f"{labels.dtype} {labels.shape}")
    return images, labels


def _open(item: Any) -> Any:
    if not isinstance(item, Path):
        return Image.fromarray(item)
    try:
        return Image.open(item).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"can't read {item}", expected="an image file", found=str(error).split(" '")[0]) from error
