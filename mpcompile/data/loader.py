"""Loading training images: options, timm's augmentation, batches for each rank, and images for calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from mpcompile._moved import renamed
from mpcompile.config import only_fields
from mpcompile.data import ranks
from mpcompile.data.batches import read
from mpcompile.data.datasets import labels_of
from mpcompile.data.images import data_config, preprocess
from mpcompile.data.labels import draw
from mpcompile.data.mixing import MixedBatches
from mpcompile.data.streamed import Streamed
from mpcompile.errors import ConfigError, InputError
from mpcompile.io.fields import check_fields

__getattr__ = renamed(__name__, {"Images": "data.loader.ImageOptions"})


@dataclass(frozen=True)
class ImageOptions:
    """Options for reading and augmenting images; the ``data`` part of a recipe.

    Attributes:
        batch: images per optimiser step, over all ranks.
        size: side length in pixels, or None for the model's own.
        auto_augment: a policy by timm's name, such as ``"rand-m9-mstd0.5-inc1"``, or None.
        reprob: probability of random erasing.
        color_jitter: strength, or None; a policy replaces it.
        scale: smallest and largest share of the image area in a random crop.
        hflip: probability of a horizontal flip.
        mix: share of the training images that are mixed with another one; labels do not apply to these, so it needs
            ``train.alpha=1``.
        augment: False preprocesses every image as in evaluation (needed for cached logits).
        workers: processes that read images.

    Raises:
        ConfigError: an unknown option or an invalid value.
    """

    batch: int = 32
    size: int | None = None
    auto_augment: str | None = None
    reprob: float = 0.0
    color_jitter: float | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.5
    mix: float = 0.0
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
            ("mix", 0, 1),
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
    def from_options(cls, options: Mapping[str, Any] | None) -> ImageOptions:
        """Return the options in a mapping.

        Raises:
            ConfigError: an unknown option or an invalid value.
        """
        only_fields(cls, options or {}, "data has no option")
        return cls(**dict(options or {}))

    def augmentation(self) -> dict[str, Any]:
        """Return the options of timm's training transform; empty without augmentation."""
        if not self.augment:
            return {}
        return {
            "auto_augment": self.auto_augment,
            "re_prob": self.reprob,
            "color_jitter": self.color_jitter or 0.0,
            "scale": self.scale,
            "hflip": self.hflip,
        }


class Order(Sampler[int]):
    """A new order every epoch, cut into batches that the ranks take in turn.

    A step thus has the same images for any number of processes.

    Args:
        count: number of items.
        batch: items per batch of one rank.
        seed: seed of the order.
        dealt: batches per step, over all ranks; an epoch is a whole number of steps.
    """

    def __init__(self, count: int, batch: int, seed: int, dealt: int) -> None:
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, 0
        self.mine = count // (batch * dealt) * dealt // ranks.world() * batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.mine

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)[: self.mine * ranks.world()]
        return iter(order.view(-1, self.batch)[ranks.rank() :: ranks.world()].flatten().tolist())


def loader(
    source: Any, model: nn.Module, images: ImageOptions, training: bool, accumulate: int = 1, seed: int = 0
) -> DataLoader[Any]:
    """Return a loader of this rank's share of a dataset.

    Args:
        source: from :func:`mpcompile.data.datasets.dataset`.
        model: the model, whose data configuration (size, mean, interpolation; see timm) applies.
        images: options for reading and augmenting images.
        training: shuffled, augmented batches of equal size; otherwise all images once, in order.
        accumulate: batches per optimiser step.
        seed: seed of the order.

    Raises:
        ConfigError: the batch is not a multiple of ranks times accumulated batches.
        InputError: there are fewer images than make a batch.
    """
    parts = ranks.world() * accumulate
    if training and images.batch % parts:
        raise ConfigError(
            "the batch does not divide evenly",
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
    augmentation = images.augmentation() if training else {}
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
        collate_fn=MixedBatches(images.mix) if training and images.mix else None,
    )  # no persistent workers: their random numbers would depend on earlier epochs


def data_config_of(model: nn.Module, images: ImageOptions) -> dict[str, Any]:
    """Return the model's data configuration, at the size that ``images`` asks for."""
    config = data_config(model)
    if images.size is not None:
        config["input_size"] = [config["input_size"][0], images.size, images.size]
    return config


def calibration(
    source: Any, model: nn.Module, images: ImageOptions, count: int, batch: int, seed: int = 0
) -> list[Tensor]:
    """Return class-balanced images of a dataset, preprocessed as in evaluation, in batches.

    Args:
        source: from :func:`mpcompile.data.datasets.dataset`.
        model: the model, whose data configuration applies.
        images: options, of which only the size is used.
        count: number of images.
        batch: images per batch.
        seed: seed of the sample.

    Raises:
        InputError: the dataset has fewer images.
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
    if len(pixels) < count:  # shards that hold fewer than their description says
        raise InputError("there are too few images to calibrate on", expected=count, found=len(pixels))
    return list(torch.stack(pixels).split(batch))
