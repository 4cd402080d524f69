"""Training batches: taken in an order that can be repeated, checked, and moved to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.errors import InputError, MPCompileError
from mpcompile.training.checkpoint import seed_everything, set_random_state


@dataclass
class Batch:
    """Images (B, ...), labels (B,) or None where none are needed, and the images' numbers (B,) where known."""

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
    for target in (train, getattr(train, "sampler", None), getattr(train, "dataset", None)):
        tell = getattr(target, "set_epoch", None)
        if tell is not None:
            tell(epoch)
    seen, iterator = 0, None
    while True:
        try:
            iterator = iter(train) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            break
        except MPCompileError as error:
            raise InputError(f"{error}. {where}") from error
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            last = str(error).strip().splitlines()
            raise InputError(
                f"batch {seen} of epoch {epoch + 1} can't be read: {last[-1] if last else type(error).__name__}",
                hint=where,
            ) from error
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

    Raises:
        InputError: anything else.
    """
    parts = [item] if isinstance(item, Tensor) else list(item) if isinstance(item, (tuple, list)) else []
    if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
        raise InputError(
            "a training batch has the wrong type",
            expected="(images, labels) or (images, labels, index), as tensors",
            found=type(item).__name__ if not parts else ", ".join(type(part).__name__ for part in parts),
        )
    if len(parts) == 1 and need_labels:
        raise InputError(
            "a training batch has no labels", expected="(images, labels)", found="images", hint="train with alpha=1"
        )
    return Batch(parts[0], parts[1] if len(parts) > 1 else None, parts[2] if len(parts) > 2 else None)


def check_labels(labels: Tensor, batch: int, classes: int) -> None:
    """Labels are whole numbers from 0 to classes - 1, one an image.

    Raises:
        InputError: they aren't.
    """
    if labels.is_floating_point() or labels.dim() != 1 or len(labels) != batch:
        raise InputError(
            "labels have the wrong shape or type",
            expected=f"{batch} class numbers",
            found=f"{tuple(labels.shape)}, {labels.dtype}",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise InputError(
            "a label is out of range",
            expected=f"0 to {classes - 1}, the classes of the teacher",
            found=low if low < 0 else high,
            hint="check the order of classes, and that data and model have the same ones",
        )


def check_logits(student: Any, teacher: Any) -> int:
    """Both models give logits (B, classes) of the same classes; returns how many.

    Raises:
        InputError: they don't.
    """
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor) or value.dim() != 2:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the {name} doesn't return logits", expected="a tensor (batch, classes)", found=found)
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
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Any:
        """What the module returns for the images.

        Raises:
            InputError: logits are to be kept, but the batch doesn't number its images.
        """
        if self.rows is None:
            return self.module(batch.images)
        if batch.index is None:
            raise InputError(
                "cache=True needs to know which image is which",
                expected="batches (images, labels, index)",
                found="no index",
                hint="use cache=False, or a loader that also yields the number of each image",
            )
        numbers = batch.index.tolist()
        if not all(number in self.rows for number in numbers):
            for number, row in zip(numbers, self.module(batch.images).cpu(), strict=True):
                self.rows[number] = row
        return torch.stack([self.rows[number] for number in numbers]).to(batch.images.device)
