"""Batches of images for a model, and digests of the image files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from mpcompile._moved import renamed
from mpcompile.data.images import Images
from mpcompile.io.reading import sha256
from mpcompile.sources.loaded import batch_of

__getattr__ = renamed(__name__, {"Moved": "cli.streams.DeviceBatches"})


class DeviceBatches:
    """Batches on the device and in the dtype of a model, one at a time; the files are read on every iteration.

    Args:
        images: the images, from :func:`mpcompile.data.images.images_at`.
        like: a tensor with the device and the dtype of the model.
        most: number of images to stop after, rounded up to whole batches; None uses all.
        input_name: keyword of the images in the batches; None yields tensors, or pairs with labels.
    """

    def __init__(self, images: Images, like: Tensor, most: int | None = None, input_name: str | None = None) -> None:
        self.images, self.like, self.input_name = images, like, input_name
        self.count = images.count if most is None else min(images.count, -(-most // images.batch) * images.batch)

    def __iter__(self) -> Iterator[Any]:
        """Yield images (batch, 3, H, W), with labels (batch,) if there are any, as the model takes them."""
        seen = 0
        for batch in self.images:
            pixels, labels = batch if isinstance(batch, tuple) else (batch, None)
            yield batch_of(pixels.to(self.like), labels, self.input_name)
            seen += len(pixels)
            if seen >= self.count:
                return


def digests(images: Images) -> list[str]:
    """Return a short digest per file: enough to find images that two sets share without keeping either set."""
    short = []
    for path in images.paths:
        with contextlib.suppress(OSError):  # deleted since it was read: not worth losing the computed result
            short.append(sha256(path)[:16])
    return short


def seen_before(images: Images, provenance: Mapping[str, Any]) -> str | None:
    """Return a note if some of the images calibrated the artifact with this provenance, else None."""
    known = provenance.get("calibration_files")
    if not isinstance(known, list):  # provenance is not checked on load: anyone may have written it
        return None
    count = len(set(map(str, known)).intersection(digests(images)))
    if not count:
        return None
    return f"{count} of the {images.count} images calibrated this artifact, which flatters accuracy: measure on others"
