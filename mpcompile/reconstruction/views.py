"""Views: unlabelled images multiplied by augmentation, so that a few hundred act as many more.

Round 0 has the images as they are. Every further round has one new view of each: a random crop, resized to the image's
size, perhaps mirrored, with other brightness, contrast and saturation, and perhaps mixed with another image. The
transforms are those of timm and torchvision. Only one batch of views is in memory at a time.

A view need not show what its image shows. The dense model's activations on the view itself are the targets, as in
function matching (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", arXiv 2106.05237).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.data.mixing import mixed
from mpcompile.data.seeding import seeded
from mpcompile.errors import ConfigError, InputError

_SMALLEST = 8  # pixels a side: a crop of anything smaller shows nothing
_SLACK = 0.02  # by how much pixels may leave [0, 1] when the normalisation is undone, after resizing with overshoot


class Views:
    """The images of a calibration set, and random views of them, in rounds.

    Inputs that are not images (several tensors per sample, integers, shapes other than (B, 1 or 3, H, W), fewer than 8
    pixels a side) get no views: there is one round, the inputs themselves, and ``note`` gives the reason.

    A round depends on the seed, its number and the batches, and not on the rounds made before it, so that a resumed
    run gets the same views again. The random states of Python, NumPy and torch are left as they were.

    Args:
        batches: lists of graph inputs, as :func:`mpcompile.calibration.data.batches` yields them, read again in every
            round. An iterator, which can be read only once, is held in memory.
        rounds: number of rounds.
        seed: seeds every random choice.
        first: True makes the images themselves the first round; False augments that too.
        mix: share of the views that are mixed with another one: half of them by a weighted mean (mixup), half by
            pasting a rectangle (CutMix). The other view is of the same batch or, in batches of one image, of the
            batch before.
        crop: smallest and largest share of the image's area in a crop.
        color: largest relative change of brightness, contrast and saturation.
        mean, std: the normalisation of the images, one value per channel. Without it, or if the images do not fit it,
            black and white are the smallest and largest value of each channel over all images.

    Attributes:
        images: number of images.
        rounds: number of rounds; 1 if there are no views.
        note: why there are no views, or None.

    Raises:
        ConfigError: an option is out of range.
        InputError: there is no batch.

    Example:
        >>> views = Views([[torch.rand(4, 3, 32, 32)], [torch.rand(1, 3, 32, 32)]], 3, seed=0)
        >>> views.images, len(views)
        (5, 15)
        >>> [tuple(images.shape) for (images,) in views.round(2)]
        [(4, 3, 32, 32), (1, 3, 32, 32)]
    """

    def __init__(
        self,
        batches: Iterable[list[Any]],
        rounds: int,
        seed: int,
        *,
        first: bool = True,
        mix: float = 0.0,
        crop: tuple[float, float] = (0.3, 1.0),
        color: float = 0.2,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        _check("the number of rounds", rounds, 1, math.inf)
        _check("the share of mixed views", mix, 0, 1)
        _check("the smallest share of an image in a crop", crop[0], 0.02, crop[1])
        _check("the largest share of an image in a crop", crop[1], crop[0], 1)
        _check("the change of colors", color, 0, 1)
        self.seed, self.mix, self.crop, self.color = seed, mix, crop, color
        self.batches = list(batches) if isinstance(batches, Iterator) else batches
        survey = _Survey()
        for batch in self.batches:
            survey.add(batch)
        if not survey.batches:
            raise InputError("there are no images", expected="at least one batch", found="none")
        self.images, self._place, self._scale = survey.images, survey.place, survey.scale(mean, std)
        wanted = rounds > 1 or not first
        self.note = f"no views: {survey.problem}" if wanted and survey.problem else None
        self.rounds = rounds if survey.problem is None else 1
        self._plain = first or survey.problem is not None

    def __len__(self) -> int:
        """Return the number of inputs in all rounds."""
        return self.images * self.rounds

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the batches of all rounds, round by round."""
        return itertools.chain.from_iterable(map(self.round, range(self.rounds)))

    def round(self, number: int) -> Iterator[list[Any]]:
        """Yield the batches of one round; views have the shape, dtype, device and memory layout of their images.

        Args:
            number: 0 to ``rounds - 1``.
        """
        before: Tensor | None = None
        for position, batch in enumerate(self.batches):
            if number == 0 and self._plain:
                yield batch
                continue
            leaves, structure = pytree.tree_flatten(batch)
            images = leaves[self._place]
            with torch.no_grad(), seeded(self.seed, number, position):
                leaves[self._place] = self._views(images, before)
            before = images
            yield pytree.tree_unflatten(leaves, structure)

    def _views(self, images: Tensor, before: Tensor | None) -> Tensor:
        """Return one view of each image; ``before`` is the batch before, for mixes with a single image."""
        views = self._augmented(images, images.shape[-2:])
        if self.mix:
            other = None
            if len(images) == 1 and before is not None:
                other = self._augmented(before[-1:], images.shape[-2:])
            views = mixed(views, self.mix, other)
        low, span = (part.to(views) for part in self._scale)
        views = (views * span + low).to(images.dtype)
        last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        return views.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _augmented(self, images: Tensor, size: Sequence[int]) -> Tensor:
        """Return a random crop of each image (B, C, ...), resized, perhaps mirrored, with other colors, in [0, 1]."""
        from timm.data.transforms import RandomResizedCropAndInterpolation
        from torchvision.transforms import ColorJitter, RandomHorizontalFlip

        crop = RandomResizedCropAndInterpolation(tuple(size), self.crop, interpolation="bilinear")
        steps = [crop, RandomHorizontalFlip(), ColorJitter(self.color, self.color, self.color)]
        unit = images.to(torch.promote_types(images.dtype, torch.float32))
        low, span = (part.to(unit) for part in self._scale)
        unit = ((unit - low) / span).clamp(0, 1)
        return torch.stack([functools.reduce(lambda image, step: step(image), steps, image) for image in unit])


class _Survey:
    """What all batches have in common: whether they are images, how many, and the range of each channel."""

    def __init__(self) -> None:
        self.batches = self.images = self.place = 0
        self.problem: str | None = None
        self.low = self.high = torch.zeros(0)

    def add(self, batch: list[Any]) -> None:
        """Take a batch of graph inputs into account."""
        leaves = pytree.tree_leaves(batch)
        # A graph of dynamo takes its parameters as inputs too.
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)]
        tensors = [leaves[place] for place in places]
        self.images += next((len(tensor) for tensor in tensors if tensor.dim()), 1)
        self.batches += 1
        self.problem = self.problem or _problem(tensors)
        if self.problem is not None:
            return
        self.place = places[0]
        low, high = (edge(tensors[0].detach().double(), (0, 2, 3)).cpu() for edge in (torch.amin, torch.amax))
        if self.batches == 1:
            self.low, self.high = low, high
        elif len(low) != len(self.low):
            self.problem = "the images differ in their number of channels"
        else:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def scale(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
        """Return the value of black in each channel (C, 1, 1), and its distance to that of white."""
        low, span = self.low, self.high - self.low
        if mean is not None and std is not None and len(mean) == len(std) == len(low):
            spread = 1 / torch.tensor(std, dtype=torch.float64)
            black = -torch.tensor(mean, dtype=torch.float64) * spread
            slack = _SLACK * spread
            if bool((low >= black - slack).all() and (self.high <= black + spread + slack).all()):
                low, span = black, spread
        return low.view(-1, 1, 1), torch.where(span > 0, span, 1).view(-1, 1, 1)


def _problem(tensors: Sequence[Tensor]) -> str | None:
    """Return why the tensors of a batch are not images, or None if they are."""
    if len(tensors) != 1:
        return f"a batch has {len(tensors)} tensors, not images alone"
    shape, dtype = tuple(tensors[0].shape), tensors[0].dtype
    if not dtype.is_floating_point:
        return f"the inputs are {str(dtype).removeprefix('torch.')}, not images in floating point"
    if len(shape) != 4 or shape[1] not in (1, 3) or min(shape[2:]) < _SMALLEST:
        return f"the inputs {shape} are not images (batch, 1 or 3, {_SMALLEST} or more, {_SMALLEST} or more)"
    return None


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is out of range", expected=f"{low:g} to {high:g}", found=value)
