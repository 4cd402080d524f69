"""How training images are read: options, augmentation by timm, batches for each rank, images to calibrate on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from mpcompile.calibration.data import draw
from mpcompile.config import only_fields
from mpcompile.data import ranks
from mpcompile.data.batches import read
from mpcompile.data.datasets import labels_of
from mpcompile.data.images import data_config, preprocess
from mpcompile.data.streamed import Streamed
from mpcompile.errors import ConfigError, InputError
from mpcompile.training.options import check_fields


@dataclass(frozen=True)
class Images:
    """How images are read and augmented; the ``data`` of a recipe.

    Attributes:
        batch: images an optimiser step, over all ranks.
        size: pixels of each side, or None for the model's own.
        auto_augment: timm's name of a policy, such as ``"rand-m9-mstd0.5-inc1"``, or None.
        reprob: probability of random erasing.
        color_jitter: strength, or None; a policy takes its place.
        scale: smallest and largest share of an image that a random crop takes.
        hflip: probability of mirroring.
        augment: False shows every image as in evaluation (needed for cached logits).
        workers: processes that read images.

    Raises:
        ConfigError: an unknown option or a value that an option can't take.
    """

    batch: int = 32
    size: int | None = None
    auto_augment: str | None = None
    reprob: float = 0.0
    color_jitter: float | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    augment: bool = True
    workers: int = 2

    def __post_init__(self) -> None:
        check_fields(
            self,
            ("batch", 1, math.inf),
            ("size", 1, math.inf),
            ("reprob", 0, 1),
            ("color_jitter", 0, math.inf),
            ("hflip", 0, 1),
            ("workers", 0, math.inf),
        )
        object.__setattr__(self, "scale", tuple(self.scale))
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError("option 'scale' is out of range", expected="0 < low <= high <= 1", found=self.scale)
        try:
            create_transform(32, is_training=True, auto_augment=self.auto_augment)
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(
                "timm knows no such augmentation",
                expected="auto_augment such as rand-m9-mstd0.5-inc1, augmix-m3 or original",
                found=repr(self.auto_augment),
            ) from error

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Images:
        """From a mapping.

        Raises:
            ConfigError: a key that is no option.
        """
        only_fields(cls, options or {}, "data has no option")
        return cls(**dict(options or {}))


class Order(Sampler[int]):
    """A new order every epoch, cut into batches that are dealt to the ranks in turn.

    The images of a step are then the same on one process and on many.

    Args:
        count: items there are.
        batch: items a batch of one rank.
        seed: of the order.
        dealt: batches that make a step, over all ranks; an epoch is a whole number of steps.
    """

    def __init__(self, count: int, batch: int, seed: int, dealt: int) -> None:
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, 0
        self.mine = count // (batch * dealt) * dealt // ranks.world() * batch

    def set_epoch(self, epoch: int) -> None:
        """Which order the next pass has."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.mine

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)[: self.mine * ranks.world()]
        return iter(order.view(-1, self.batch)[ranks.rank() :: ranks.world()].flatten().tolist())


def loader(
    source: Any, model: nn.Module, images: Images, training: bool, accumulate: int = 1, seed: int = 0
) -> DataLoader[Any]:
    """Batches of a dataset, this rank's share.

    Args:
        source: from :func:`dataset`.
        model: whose size, mean and interpolation count (timm's data configuration).
        images: how they are augmented.
        training: shuffled, augmented batches of equal size; else all images in order, once.
        accumulate: batches an optimiser step.
        seed: of the order.

    Raises:
        ConfigError: the batch doesn't divide by ranks and accumulated batches.
        InputError: the data makes no batch.
    """
    parts = ranks.world() * accumulate
    if training and images.batch % parts:
        raise ConfigError(
            "the batch doesn't divide evenly",
            expected=f"a multiple of {parts} ({ranks.world()} ranks, {accumulate} accumulated batches)",
            found=images.batch,
        )
    streamed = isinstance(source, Streamed)
    count = source.samples if streamed else len(source)
    if training and count < images.batch:
        raise InputError(
            "there are fewer training images than make a batch",
            expected=f"at least {images.batch}",
            found=count,
            hint=f"data.batch={count}",
        )
    size, workers = max(1, images.batch // parts), images.workers
    if streamed:
        workers = source.prepare(size, workers)
    augmentation: dict[str, Any] = {}
    if training and images.augment:
        augmentation = {
            "auto_augment": images.auto_augment,
            "re_prob": images.reprob,
            "color_jitter": images.color_jitter or 0.0,
            "scale": images.scale,
            "hflip": images.hflip,
        }
    source.transform = preprocess(data_config_of(model, images), **augmentation)
    order: Any = None
    if training and not streamed:
        order = Order(count, size, seed, parts)
    elif ranks.active() and not streamed:
        order = range(ranks.rank(), count, ranks.world())
    return DataLoader(
        source,
        size,
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=training,
    )  # no persistent workers: their random numbers would depend on the epochs before


def data_config_of(model: nn.Module, images: Images) -> dict[str, Any]:
    """The model's data configuration, at the size that ``images`` asks for."""
    config = data_config(model)
    if images.size is not None:
        config["input_size"] = [config["input_size"][0], images.size, images.size]
    return config


def calibration(source: Any, model: nn.Module, images: Images, count: int, batch: int, seed: int = 0) -> list[Tensor]:
    """Class-balanced images of a dataset, as in evaluation, in batches.

    Raises:
        InputError: there are fewer images.
    """
    available = source.samples if isinstance(source, Streamed) else len(source)
    if count > available:
        raise InputError(
            "there are too few images to calibrate on",
            expected=count,
            found=available,
            hint=f"calibration.images={available}",
        )
    drawn: Iterable[Any]
    if isinstance(source, Streamed):
        drawn = source.drawn(count)
    else:
        labels = labels_of(source)
        chosen = draw(labels if labels is not None else [0] * len(source), count, seed)
        drawn = (source[index] for index in chosen)
    before, source.transform = source.transform, preprocess(data_config_of(model, images))
    try:
        pixels = [item[0] for item in read(drawn, "calibration")]
    finally:
        source.transform = before
    if len(pixels) < count:  # shards that hold fewer than they say
        raise InputError("there are too few images to calibrate on", expected=count, found=len(pixels))
    return list(torch.stack(pixels).split(batch))
