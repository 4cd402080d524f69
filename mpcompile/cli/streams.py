"""Batches of images on their way from files to a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from mpcompile.images import Images


class Moved:
    """Batches as a model takes them, one at a time; read anew each time they are iterated.

    Args:
        images: from :func:`mpcompile.images.images_at`.
        like: a tensor with the device and the dtype of the model.
        most: images to stop after, in whole batches; None takes all.
    """

    def __init__(self, images: Images, like: Tensor, most: int | None = None) -> None:
        self.images, self.like = images, like
        self.count = images.count if most is None else min(images.count, -(-most // images.batch) * images.batch)

    def __iter__(self) -> Iterator[Any]:
        """Images (batch, 3, H, W), or pairs of them and labels (batch,)."""
        seen = 0
        for batch in self.images:
            pixels, labels = batch if isinstance(batch, tuple) else (batch, None)
            moved = pixels.to(self.like)
            yield moved if labels is None else (moved, labels)
            seen += len(pixels)
            if seen >= self.count:
                return
