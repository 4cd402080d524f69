"""Streams of labelled images (WebDataset shards, streamed Hugging Face datasets) through timm's readers.

timm's readers choose the samples and their labels; pixels are decoded by :mod:`mpcompile.data.sources.pictures`, as
those of files are.
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
_BLANK = b"P5 1 1 255\n\0"  # the smallest image, for a reader that insists on decoding one
_patching = threading.Lock()


class Streamed(IterableDataset):
    """(image, label) of one split, in an order that depends on seed and epoch alone.

    timm's readers keep their pipeline, its random numbers and their share of the shards from the first pass on, in
    whichever process that took place. Every pass here starts from an untouched copy, so that a pass can be repeated,
    and reading a few images beforehand (to calibrate on) changes nothing.

    In training every rank and worker reads shards of its own, and all the same number of images. In evaluation every
    rank decodes all images and takes its share of them, so that each is counted once however shards are cut.

    Args:
        reader: one of timm's streaming readers, which nothing was read from yet.
        training: shuffle, and share shards out.
        seed: of the order.
        transform: what is done with an image, or None.
    """

    def __init__(self, reader: Any, training: bool, seed: int = 0, transform: Any = None) -> None:
        self.reader, self.training, self.seed, self.transform = reader, training, seed, transform
        self.epoch = 0
        self.samples = int(reader.num_samples)
        if hasattr(reader, "split_info"):  # of shards, a sample's files by their suffixes
            reader.input_key = ";".join(["jpg", *sorted(suffix[1:] for suffix in SUFFIXES - {".jpg"})])
        else:
            reader.input_img_mode = None  # pixels as they are stored, for us to convert
        if not training:
            reader.dist_rank, reader.dist_num_replicas = 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Which order the next pass has."""
        self.epoch = epoch

    def prepare(self, batch: int, workers: int) -> int:
        """Lay out an epoch: a whole number of batches of this process for each worker.

        Args:
            batch: images a batch of this process.
            workers: how many are wanted.

        Returns:
            As many workers as find shards to read.

        Raises:
            InputError: there are fewer shards than ranks.
        """
        most = self._shards() if self.training else None
        if most is not None and workers > most:
            log.warning("shards keep %d workers a process busy: data.workers is %d, not %d", most, most, workers)
            workers = most
        self.reader.batch_size = batch
        self.reader.set_loader_cfg(num_workers=max(1, workers))
        return workers

    def _shards(self) -> int | None:
        """Shards that each rank reads, or None if that isn't known."""
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
        # Every rank reads all shards, and leaves out the others' images, where shards can't be dealt evenly.
        return count if count % ranks.world() else count // ranks.world()

    def __len__(self) -> int:
        """Images this rank reads in a pass."""
        return len(self.reader) if self.training else -(-self.samples // ranks.world())

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        worker = get_worker_info()
        first = (ranks.rank() + (0 if worker is None else worker.id)) % ranks.world()
        items = self._read(self._copy())
        return items if self.training else itertools.islice(items, first, None, ranks.world())

    def drawn(self, count: int) -> Iterator[tuple[Any, int]]:
        """Shuffled images of all shards, at most ``count``, whatever the number of ranks."""
        reader = self._copy()
        reader.dist_rank, reader.dist_num_replicas = 0, 1
        reader.set_loader_cfg(num_workers=1)
        return itertools.islice(self._read(reader), min(count, self.samples))

    def _copy(self) -> Any:
        reader = copy.copy(self.reader)
        reader.common_seed = reader.worker_seed = self.seed + self.epoch
        return reader

    def _open(self, reader: Any) -> Any:
        """The reader, its pipeline laid out, so that it leaves decoding to this module."""
        if hasattr(reader, "split_info"):
            from timm.data.readers import reader_wds

            with _patching:
                original: Any = reader_wds._decode
                ours: Any = _Decoder(original)
                reader_wds._decode = ours  # which the reader's pipeline is laid out with
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
    """In place of timm's function for a sample of a shard: labels are its, pixels ours."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, sample: Any, image_key: str = "jpg", **options: Any) -> Any:
        key = next(name for name in image_key.split(";") if name in sample)
        found = self.original({**sample, key: _BLANK}, image_key=image_key, **options)
        if found is not None:
            name = f"{sample.get('__key__')}.{key} in {sample.get('__url__')}"
            found["jpg"] = _decoded({"bytes": sample[key]}, f"image {printable(name)}")
        return found


def _decoded(image: Mapping[str, Any], name: str) -> Any:
    """An image as Hugging Face datasets store it, its bytes or where they are, in RGB.

    Raises:
        InputError: it can't be read.
    """
    if not image.get("bytes") and image.get("path"):
        name = f"image {printable(image['path'])}"
    try:
        with _source(image) as file:
            return decode(file)
    except (Unreadable, OSError, ValueError) as error:
        raise InputError(
            f"{name} can't be read", expected=EXPECTED, found=error, hint="replace or remove it"
        ) from error


def _source(image: Mapping[str, Any]) -> BinaryIO:
    if image.get("bytes"):
        return io.BytesIO(image["bytes"])
    path = str(image.get("path"))
    if "://" not in path:
        return open_regular(path, EXPECTED)
    with importlib.import_module("fsspec").open(path, "rb") as remote:  # datasets brings it
        return io.BytesIO(remote.read())
