"""Images from a folder, a Hugging Face dataset or WebDataset shards, through timm's readers, transforms and loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import ImageDataset, create_dataset, create_loader
from torch import Tensor, nn

from mpcompile.calibration import draw
from mpcompile.errors import ConfigError, InputError
from mpcompile.images import data_config, preprocess
from mpcompile.training import ranks
from mpcompile.training.streamed import Streamed

READERS = ("hfds", "hfids", "wds")


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
        ConfigError: a batch without images.
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
        object.__setattr__(self, "scale", tuple(self.scale))
        if self.batch < 1 or self.workers < 0:
            raise ConfigError("data needs a batch of at least 1 image, and workers from 0 on", found=self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Images:
        """From a mapping.

        Raises:
            ConfigError: a key that is no option.
        """
        valid = [f.name for f in dataclasses.fields(cls)]
        for key in options or {}:
            if key not in valid:
                raise ConfigError(f"data has no option {key!r}", expected=f"one of {', '.join(valid)}")
        return cls(**dict(options or {}))


class Readable(ImageDataset):
    """timm's dataset, except that an image that can't be read is an error that names it, and items are numbered.

    Items are (image, label, number).
    """

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        from PIL import Image

        try:
            source, label, *_ = self.reader[index]
            image = Image.open(source).convert(self.input_img_mode)
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(
                f"image {self.reader.filename(index)} can't be read",
                expected="a whole image file",
                found=str(error).split(" <")[0] or type(error).__name__,
                hint="replace or remove it",
            ) from error
        return (image if self.transform is None else self.transform(image)), -1 if label is None else int(label), index


def dataset(root: str, split: str, training: bool, reader: str = "", seed: int = 0) -> Any:
    """A dataset of labelled images.

    Args:
        root: folder of an image folder (its sub-folder ``split`` where there is one) or of shards, or a cache.
        split: name of the split; ``"NAME|COUNT"`` says how many images a streamed Hugging Face split has.
        training: shuffle a streamed dataset.
        reader: ``""`` for folders, ``"hfds/NAME"`` (Hugging Face datasets), ``"hfids/NAME"`` (streamed), ``"wds/NAME"``
            (WebDataset), as timm spells them.
        seed: of a streamed dataset's shuffling.

    Raises:
        InputError: nothing is there, or what it takes to read it isn't installed.
        ConfigError: no such reader.
    """
    kind = reader.partition("/")[0].lower()
    if kind and kind not in READERS:
        expected = "hfds/NAME, hfids/NAME, wds/NAME, or none: a folder"
        raise ConfigError(f"there is no reader {reader!r}", expected=expected)
    options: dict[str, Any] = {"is_training": training, "seed": seed}
    name = split
    if kind == "hfids":
        name, _, count = split.partition("|")
        options["num_samples"] = int(count) if count.isdecimal() else None
    try:
        found = create_dataset(reader, root, split=name, **options)
    except (ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
        raise _unreadable(root, name, reader, error) from error
    if isinstance(found, ImageDataset):
        return Readable(root, reader=found.reader)
    return Streamed(found.reader, training, seed)


def _unreadable(root: str, split: str, reader: str, error: Exception) -> InputError:
    """What to say where timm's reader gave up."""
    told = str(error).splitlines()[0] if str(error) else "no such folder"
    if isinstance(error, ImportError) or "install webdataset" in told:
        package = "webdataset" if reader.startswith("wds") else error.name if isinstance(error, ImportError) else None
        return InputError(f"{reader} can't be read without {package}", hint="pip install 'mpcompile[streams]'")
    if "length is unknown" in told:
        hint = f"say it: '{split}|50000'; or take hfds, which fetches all data first"
        return InputError(f"it isn't known how many images split {split!r} of {reader} has", hint=hint)
    expected = "shards and timm's _info.json" if reader.startswith("wds") else "a split of this name"
    if not reader:
        expected = "a folder with one sub-folder of images a class, itself or in a sub-folder named like the split"
    return InputError(f"there are no images of split {split!r} in {root}", expected=expected, found=told)


def _labels(source: Any) -> list[int] | None:
    samples = getattr(getattr(source, "reader", None), "samples", None)
    return None if samples is None else [int(label) for _, label in samples]


def check_classes(source: Any, classes: int) -> None:
    """The dataset has no more classes than the model.

    Raises:
        InputError: it has.
    """
    named = getattr(getattr(source, "reader", None), "class_to_idx", None)
    labels = _labels(source)
    count = len(named) if named else 1 + max(labels) if labels else 0
    if count > classes:
        raise InputError(
            "the data has more classes than the model",
            expected=f"at most {classes}",
            found=count,
            hint="use a model that was trained on these classes",
        )


def loader(source: Any, model: nn.Module, images: Images, training: bool, accumulate: int = 1) -> Any:
    """Batches of a dataset, this rank's share.

    Args:
        source: from :func:`dataset`.
        model: whose size, mean and interpolation count (timm's data configuration).
        images: how they are augmented.
        training: shuffled, augmented batches of equal size; else all images in order, once.
        accumulate: batches an optimiser step.

    Raises:
        ConfigError: the batch doesn't divide by ranks and accumulated batches.
    """
    parts = ranks.world() * accumulate
    if training and images.batch % parts:
        raise ConfigError(
            "the batch doesn't divide evenly",
            expected=f"a multiple of {parts} ({ranks.world()} ranks, {accumulate} accumulated batches)",
            found=images.batch,
        )
    whole = source
    size, workers = max(1, images.batch // parts), images.workers
    if isinstance(source, Streamed):
        workers = source.prepare(size, workers)
    elif not training and ranks.active():
        source = torch.utils.data.Subset(source, range(ranks.rank(), len(source), ranks.world()))
    config = _config(model, images)
    shape: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    augmented = training and images.augment
    found = create_loader(
        source,
        batch_size=size,
        is_training=training,
        no_aug=not augmented,
        use_prefetcher=False,
        auto_augment=images.auto_augment if augmented else None,
        re_prob=images.reprob if augmented else 0.0,
        color_jitter=images.color_jitter or 0.0,
        scale=images.scale,
        hflip=images.hflip,
        num_workers=workers,
        persistent_workers=False,  # their random numbers would depend on the epochs before
        distributed=training and ranks.active(),
        **shape,
    )
    if not augmented:
        whole.transform = preprocess(config)  # of evaluation
    return found


def _config(model: nn.Module, images: Images) -> dict[str, Any]:
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
    transform = preprocess(_config(model, images))
    source.transform = transform
    drawn: Iterable[Any]
    if isinstance(source, Streamed):
        drawn = source.drawn(count)
    else:
        labels = _labels(source)
        chosen = draw(labels if labels is not None else [0] * len(source), count, seed)
        drawn = (source[index] for index in chosen)
    pixels = [item[0] for item in drawn]
    if len(pixels) < count:  # shards that hold fewer than they say
        raise InputError("there are too few images to calibrate on", expected=count, found=len(pixels))
    return list(torch.stack(pixels).split(batch))
