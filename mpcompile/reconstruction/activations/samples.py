"""Samples: the calibration images of a run, some of them held out, and their views."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.reconstruction.activations.rows import count_of
from mpcompile.reconstruction.options import Reconstruction
from mpcompile.reconstruction.views import Views

_HELD_OUT = 0.1  # share of the images
_EXAMPLES = 8  # images that a few timed steps run on
_HELD_VIEWS = 3  # rounds over the held-out images, at most


class Samples:
    """Images to train on and images held out, a tenth, each with its views on its own side.

    With several ranks, each takes its share of both; of fewer images than ranks, each takes all.

    Args:
        batches: lists of graph inputs; read once, and held.
        options: batch size, share of mixes and seed.
        fixed: the one batch size that the graph takes, or None. Images are repeated to fill the last batch.
        rank, world: number of this rank, and how many there are.

    Attributes:
        images: number of images, over all ranks.
        held: number of images held out, over all ranks.
        batch: images per batch.
        views: rounds over the images.
        notes: remarks for the Plan.

    Raises:
        InputError: there is no image.
    """

    def __init__(
        self,
        batches: Iterable[Sequence[Any]],
        options: Reconstruction,
        fixed: int | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        whole = _joined([list(batch) for batch in batches])
        self.images = count_of(whole)
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(options.seed)).tolist()
        self.held = max(1, round(self.images * _HELD_OUT)) if self.images > 1 else 0
        held, fitted = sorted(order[: self.held]), sorted(order[self.held :])
        whole_shares = max(len(fitted) // world, 1) * world  # ranks take equally many steps
        fitted, held = (part[rank::world] if len(part) >= world else part for part in (fitted[:whole_shares], held))
        self.notes = [] if self.held else ["one image: nothing is held out, the error on its views decides"]
        self._full = fixed is not None
        self.batch = size = fixed or max(1, options.batch // world)
        self._fitted = _batches(whole, fitted, size, self._full)
        self._held = _batches(whole, held, size, self._full)
        self.options, self.views = options, 1
        self._rounds(1)

    def _rounds(self, views: int) -> None:
        seed, mix = self.options.seed, self.options.mix
        self.fit_views = Views(self._fitted, views, seed, mix=mix)
        self.held_views = Views(self._held, min(views, _HELD_VIEWS), seed + 1, mix=mix) if self._held else None
        self.views = self.fit_views.rounds

    def multiply(self, views: int) -> None:
        """Use this number of rounds over the images; one where inputs are not images, which a note says."""
        self._rounds(views)
        if self.fit_views.note is not None:
            self.notes.append(self.fit_views.note)

    @property
    def train(self) -> int:
        """Number of samples to train on: views of images on this rank."""
        return len(self.fit_views)

    @property
    def count(self) -> int:
        """Number of samples, held-out ones included; these are the last."""
        return self.train + (0 if self.held_views is None else len(self.held_views))

    def __iter__(self) -> Iterator[list[Any]]:
        return itertools.chain(self.fit_views, self.held_views or ())

    def fresh(self, views: int, epoch: int) -> Iterator[list[Any]]:
        """Yield views of the training images that no round has, others in every epoch."""
        seed = self.options.seed + 7919 * (epoch + 1)
        return iter(Views(self._fitted, views, seed, mix=self.options.mix, first=False))

    def held_out(self) -> Iterator[list[Any]]:
        """Yield the held-out samples."""
        return iter(self.held_views or ())

    def example(self) -> Views:
        """Return two rounds over a few images; one if there are no views of the inputs."""
        few = slice(None if self._full else _EXAMPLES)
        batch = [value[few] if _batched(value) else value for value in self._fitted[0]]
        return Views([batch], 2, self.options.seed, mix=self.options.mix)

    def contents(self) -> Iterator[Any]:
        """Yield all inputs, without views."""
        return (value for batch in (*self._fitted, *self._held) for value in batch)


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _joined(batches: Sequence[Sequence[Any]]) -> list[Any]:
    """Return one value per graph input: all samples of a tensor, or the first batch's value of anything else."""
    if not batches:
        raise InputError("calibration is empty", expected="at least one batch", found="none")
    columns = list(zip(*batches, strict=True))
    return [torch.cat(column) if _batched(column[0]) else column[0] for column in columns]


def _batches(whole: Sequence[Any], places: Sequence[int], size: int, full: bool) -> list[list[Any]]:
    """Return the samples at some places in batches; if ``full``, places are repeated to fill the last batch."""
    if full and places:
        places = list(itertools.islice(itertools.cycle(places), -(-len(places) // size) * size))
    parts = [torch.tensor(places[i : i + size]) for i in range(0, len(places), size)]
    return [[v.index_select(0, p.to(v.device)) if _batched(v) else v for v in whole] for p in parts]
