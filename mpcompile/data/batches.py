"""Training batches: taken in an order that can be repeated, checked, and moved to the device."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.data import ranks
from mpcompile.data.labels import class_numbers
from mpcompile.errors import InputError, MPCompileError
from mpcompile.training.checkpoint import seed_everything, set_random_state


@dataclass
class Batch:
    """Images (B, ...), int64 labels (B,) or None where none are needed, and the images' numbers (B,) where known."""

    images: Tensor
    labels: Tensor | None
    index: Tensor | None


def length(train: Any) -> int:
    """Batches an epoch.

    Raises:
        InputError: the loader has no length, or none.
    """
    try:
        count = len(train)
    except TypeError as error:
        raise InputError(
            "train has no length", expected="a list of batches or a DataLoader", found=type(train).__name__
        ) from error
    if not count:
        raise InputError("there is nothing to train on", expected="at least one batch", found="none")
    return int(count)


def epoch_batches(train: Any, seed: int, epoch: int, rank: int, skip: int, state: Any, where: str) -> Iterator[Any]:
    """One epoch's batches, the first ``skip`` left out.

    All generators are seeded for the epoch before its first batch is drawn, so that a DataLoader shuffles alike when
    the epoch is repeated; after skipping they are set to ``state``, as they were when the run broke off.

    Raises:
        InputError: an item can't be read, or the loader yields nothing.
    """
    seed_everything(seed, epoch, rank)
    batches = getattr(train, "batch_sampler", None)
    targets = [train, batches, getattr(batches, "sampler", None)]
    targets += [getattr(train, name, None) for name in ("sampler", "dataset")]
    for target in {id(target): target for target in targets}.values():
        tell = getattr(target, "set_epoch", None)
        if tell is not None:
            tell(epoch)
    seen = 0
    for batch in read(train, f"epoch {epoch + 1}", where):
        seen += 1
        if seen == skip and state is not None:
            set_random_state(state)
        if seen > skip:
            yield batch
    if not seen:
        raise InputError(
            "the training loader yields nothing",
            expected=f"{len(train)} batches",
            found="none in this epoch",
            hint="give a list or a DataLoader, which can be read again every epoch",
        )


def read(source: Iterable[Any], what: str, where: str | None = None) -> Iterator[Any]:
    """Batches of a loader; whatever goes wrong in it is said in one line.

    Args:
        source: the loader.
        what: what is being read, for the error.
        where: a hint for the error.

    Raises:
        InputError: a batch can't be read.
    """
    count, iterator = 0, None
    while True:
        try:
            iterator = iter(source) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            told = _said(error)
            if not isinstance(error, MPCompileError):
                told = f"batch {count} of {what} can't be read: {told}"
            raise InputError(f"{told}. {where}" if where else told) from error
        count += 1
        yield batch


def _said(error: Exception) -> str:
    """An error's own words, without the traceback that a DataLoader's worker puts around them."""
    around = str(getattr(error, "message", error)).strip()  # with the line ends that str() of our own errors escapes
    if not around.startswith("Caught "):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    lines = around.splitlines()
    return re.sub(r"^[\w.]*mpcompile\.errors\.\w+: ", "", lines[-1])


@contextlib.contextmanager
def enough_memory(images: Sized) -> Iterator[None]:
    """Says how to go on where a device has too little memory for a batch of images.

    Raises:
        InputError: it has.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        hint = "take a smaller batch; accumulate=N makes one step of N of them"
        raise InputError(f"there is too little memory for {len(images)} images", hint=hint) from error


def forward(module: Any, images: Tensor, who: str) -> Any:
    """What a model returns for a batch.

    Raises:
        InputError: its forward pass fails, or there isn't enough memory for it.
    """
    try:
        with enough_memory(images):
            return module(images)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        if ranks.lost(error):
            raise
        raise InputError(
            f"the {who} fails on a batch: {_said(error)}",
            expected="images as the model takes them",
            found=f"{tuple(images.shape)}, {images.dtype}",
        ) from error


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` batches, the last one of what is left."""
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def unpack(item: Any, need_labels: bool) -> Batch:
    """A batch as a loader yields it: (images, labels), (images, labels, index), or images alone.

    Labels become int64 where they are needed, and are left out elsewhere.

    Raises:
        InputError: anything else.
    """
    parts = [item] if isinstance(item, Tensor) else list(item) if isinstance(item, (tuple, list)) else []
    tensors = [part for place, part in enumerate(parts) if place != 1]  # labels may be what NumPy or Python count with
    if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in tensors):
        raise InputError(
            "a batch has the wrong type",
            expected="(images, labels) or (images, labels, index), as tensors",
            found=type(item).__name__ if not parts else ", ".join(type(part).__name__ for part in parts),
        )
    labels = parts[1] if len(parts) > 1 else None
    if labels is None and need_labels:
        raise InputError(
            "a batch has no labels", expected="(images, labels)", found="images", hint="train with alpha=1"
        )
    if not parts[0].numel():
        raise InputError("a batch is empty", expected="at least one image", found=f"shape {tuple(parts[0].shape)}")
    known = class_numbers(labels, len(parts[0])) if need_labels else None
    return Batch(parts[0], known, parts[2] if len(parts) > 2 else None)


def check_are_logits(value: Any, who: str) -> None:
    """A model returned logits (B, classes).

    Raises:
        InputError: it didn't.
    """
    if not isinstance(value, Tensor) or value.dim() != 2:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"the {who} doesn't return logits", expected="a tensor (batch, classes)", found=found)


def check_logits(student: Any, teacher: Any) -> int:
    """Both models give logits (B, classes) of the same classes; returns how many.

    Raises:
        InputError: they don't.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        check_are_logits(value, name)
    if student.shape != teacher.shape:
        raise InputError(
            "student and teacher have different classes",
            expected=f"{teacher.shape[1]}, as the teacher",
            found=student.shape[1],
            hint="distil from the dense model that the student was made from",
        )
    return int(teacher.shape[1])


class Teacher:
    """The dense model's outputs, from the model or, for images seen before, from memory."""

    def __init__(self, module: nn.Module, cache: bool) -> None:
        self.module = module
        self.rows: dict[int, Tensor] | None = {} if cache else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Any:
        """What the module returns for the images.

        Raises:
            InputError: logits are to be kept, but the batch doesn't number its images.
        """
        if self.rows is None:
            return forward(self.module, batch.images, "teacher")
        if batch.index is None:
            raise InputError(
                "cache=True needs to know which image is which",
                expected="batches (images, labels, index)",
                found="no index",
                hint="use cache=False, or a loader that also yields the number of each image",
            )
        numbers = batch.index.tolist()
        if not all(number in self.rows for number in numbers):
            for number, row in zip(numbers, forward(self.module, batch.images, "teacher").cpu(), strict=True):
                self.rows[number] = row
        return torch.stack([self.rows[number] for number in numbers]).to(batch.images.device)
