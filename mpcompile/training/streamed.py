"""Streams of labelled images (WebDataset shards, streamed Hugging Face datasets) through timm's readers."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from mpcompile.errors import InputError
from mpcompile.training import ranks

log = logging.getLogger(__name__)


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

    def _read(self, reader: Any) -> Iterator[tuple[Any, int]]:
        for image, label in reader:
            yield (image if self.transform is None else self.transform(image)), int(label)
