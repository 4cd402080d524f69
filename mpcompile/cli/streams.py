"""Batches of images on their way from files to a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mpcompile.data.images import Images
from mpcompile.io.reading import sha256


class Moved:
    """Batches as a model takes them, one at a time; read anew each time they are iterated.

    Args:
        images: from :func:`mpcompile.data.images.images_at`.
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


def digests(images: Images) -> list[str]:
    """A short digest of each file: whether two sets share images can be told without keeping either."""
    found = []
    for path in images.paths:
        with contextlib.suppress(OSError):  # gone since it was read: no reason to lose what was computed from it
            found.append(sha256(path)[:16])
    return found


def seen_before(images: Images, made: Mapping[str, Any]) -> str | None:
    """A remark where some of the images calibrated the artifact with this provenance; None where none did."""
    known = made.get("calibration_files")
    if not isinstance(known, list):  # anyone can have written it
        return None
    count = len(set(map(str, known)).intersection(digests(images)))
    if not count:
        return None
    return f"{count} of the {images.count} images calibrated this artifact, which flatters accuracy: measure on others"
