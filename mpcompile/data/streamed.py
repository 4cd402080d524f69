"""Streams of labelled images (WebDataset shards, streamed Hugging Face datasets) through timm's readers.

timm's readers choose the samples and their labels; pixels are decoded by :mod:`mpcompile.data.sources.pictures`, which
also decodes image files.
"""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from torch.utils.data import IterableDataset, get_worker_info

from mpcompile.data import ranks
from mpcompile.data.sources.pictures import EXPECTED, SUFFIXES, Unreadable, decode
from mpcompile.data.sources.regular import open_regular, printable
from mpcompile.errors import InputError

log = logging.getLogger(__name__)
_BLANK = b"P5 1 1 255\n\0"  # the smallest image, for readers that have to decode one
_patching = threading.Lock()


class Streamed(IterableDataset):
    """Pairs (image, label) of one split, in an order that depends only on seed and epoch.

    After its first pass, a timm reader keeps its pipeline, the state of that pipeline's random numbers and its share of
    the shards, in the process that made the pass. Every pass here starts from an unused copy, so that a pass can be
    repeated, and reading some images beforehand (for calibration) has no side effects.

    In training every rank and worker reads shards of its own, and all read the same number of images. In evaluation
    every rank decodes all images and takes its share, so that each image counts once whatever the shards' sizes.

    Args:
        reader: one of timm's streaming readers, unused so far.
        training: shuffle, and divide the shards among ranks and workers.
        seed: seed of the order.
        transform: applied to every image, or None.
    """

    def __init__(self, reader: Any, training: bool, seed: int = 0, transform: Any = None) -> None:
        self.reader, self.training, self.seed, self.transform = reader, training, seed, transform
        self.epoch = 0
        self.samples = int(reader.num_samples)
        if hasattr(reader, "split_info"):  # WebDataset: the suffixes that a sample's image may have
            reader.input_key = ";".join(["jpg", *sorted(suffix[1:] for suffix in SUFFIXES - {".jpg"})])
        else:
            reader.input_img_mode = None  # no conversion: decode() does that
        if not training:
            reader.dist_rank, reader.dist_num_replicas = 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def prepare(self, batch: int, workers: int) -> int:
        """Set up the reader so that each worker yields a whole number of this process's batches in an epoch.

        Args:
            batch: images per batch of this process.
            workers: requested number of workers.

        Returns:
            The number of workers to use: as requested, but no more than there are shards for.

        Raises:
            InputError: there are fewer shards than ranks.
        """
        most = self._shards() if self.training else None
        if most is not None and workers > most:
            message = "there are shards for only %d workers per process: data.workers becomes %d, not %d"
            log.warning(message, most, most, workers)
            workers = most
        self.reader.batch_size = batch
        self.reader.set_loader_cfg(num_workers=max(1, workers))
        return workers

    def _shards(self) -> int | None:
        """Return the number of shards that each rank reads, or None if unknown."""
        files = getattr(getattr(self.reader, "split_info", None), "filenames", None)
        if files is not None:
            if len(files) < ranks.world():
                raise InputError(
                    "there are fewer shards than processes",
                    expected=f"at least {ranks.world()} shards",
                    found=len(files),
                    hint="cut the data into more shards, or start fewer processes",
                )
            return len(files) // ranks.world()
        if not hasattr(self.reader, "builder"):
            return None
        count = int(self.reader.builder.as_streaming_dataset(split=self.reader.split).num_shards)
        # If the shards do not divide evenly, every rank reads all of them and skips the images of the others.
        return count if count % ranks.world() else count // ranks.world()

    def __len__(self) -> int:
        """Return the number of images that this rank reads in a pass."""
        return len(self.reader) if self.training else -(-self.samples // ranks.world())

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        first = (ranks.rank() + (0 if worker is None else worker.id)) % ranks.world()
        items = self._read(self._copy())
        return items if self.training else itertools.islice(items, first, None, ranks.world())

    def drawn(self, count: int) -> Iterator[tuple[Any, int]]:
        """Yield at most ``count`` shuffled images of all shards, the same for any number of ranks."""
        reader = self._copy()
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        reader.set_loader_cfg(num_workers=1)
        return itertools.islice(self._read(reader), min(count, self.samples))

    def _copy(self) -> Any:
        reader = copy.copy(self.reader)
        reader.common_seed = reader.worker_seed = self.seed + self.epoch
        return reader

    def _open(self, reader: Any) -> Any:
        """Build the reader's pipeline so that it leaves decoding to this module, and return the reader."""
        if hasattr(reader, "split_info"):
            from timm.data.readers import reader_wds

            with _patching:
                original: Any = reader_wds._decode
                ours: Any = _Decoder(original)
                reader_wds._decode = ours  # looked up while the pipeline is built
                try:
                    reader._lazy_init()
                finally:
                    reader_wds._decode = original
        elif hasattr(reader, "builder"):
            stored = importlib.import_module("datasets").Image(decode=False)
            reader._lazy_init()
            reader.ds = reader.ds.cast_column(reader.input_key, stored)
        return reader

    def _read(self, reader: Any) -> Iterator[tuple[Any, int]]:
        for place, (image, label) in enumerate(self._open(reader)):
            if isinstance(image, Mapping):
                image = _decoded(image, f"image {place} of {printable(reader.split)!r}")
            yield (image if self.transform is None else self.transform(image)), int(label)


class _Decoder:
    """Replaces timm's decoding of a sample in a shard: timm decodes the label, this module the pixels."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, sample: Any, image_key: str = "jpg", **options: Any) -> Any:
        key = next(name for name in image_key.split(";") if name in sample)
        decoded = self.original({**sample, key: _BLANK}, image_key=image_key, **options)
        if decoded is not None:
            name = f"{sample.get('__key__')}.{key} in {sample.get('__url__')}"
            decoded["jpg"] = _decoded({"bytes": sample[key]}, f"image {printable(name)}")
        return decoded


def _decoded(image: Mapping[str, Any], name: str) -> Any:
    """Decode an image to RGB, given as in Hugging Face datasets: as bytes or as a path.

    Raises:
        InputError: it cannot be read; the message starts with ``name``.
    """
    if not image.get("bytes") and image.get("path"):
        name = f"image {printable(image['path'])}"
    try:
        with _source(image) as file:
            return decode(file)
    except (Unreadable, OSError, ValueError) as error:
        raise InputError(
            f"{name} cannot be read", expected=EXPECTED, found=error, hint="replace or remove it"
        ) from error


def _source(image: Mapping[str, Any]) -> BinaryIO:
    if image.get("bytes"):
        return io.BytesIO(image["bytes"])
    path = str(image.get("path"))
    if "://" not in path:
        return open_regular(path, EXPECTED)
    with importlib.import_module("fsspec").open(path, "rb") as remote:  # a dependency of datasets
        return io.BytesIO(remote.read())
