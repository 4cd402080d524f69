"""Training batches: read in a repeatable order, checked, and run through the models."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile._moved import renamed
from mpcompile.data import ranks
from mpcompile.data.labels import LABELS, class_numbers
from mpcompile.data.outputs import logits_of
from mpcompile.data.seeding import seed_everything, set_random_state
from mpcompile.errors import InputError, MPCompileError, first_line

__getattr__ = renamed(__name__, {"check_are_logits": "data.outputs.logits_of"})
_IMAGES = ("pixel_values", "images", "image")  # keys of a batch under which loaders give the images


@dataclass
class Batch:
    """Images (B, ...), int64 labels (B,) or None if not needed, and the index (B,) of each image if known."""

    images: Tensor
    labels: Tensor | None
    index: Tensor | None


def length(train: Any) -> int:
    """Return the number of batches per epoch.

    Raises:
        InputError: the loader has no length, or is empty.
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
    """Yield the batches of one epoch without the first ``skip``.

    All generators are seeded for the epoch before its first batch is drawn, so that a DataLoader shuffles in the same
    order when the epoch is repeated.

    Args:
        train: the loader.
        seed, epoch, rank: seed the generators.
        skip: number of batches to leave out, those that the interrupted run has seen.
        state: generators' state when the run was interrupted, restored after skipping; or None.
        where: a hint for errors.

    Raises:
        InputError: a batch cannot be read, or the loader yields nothing.
    """
    seed_everything(seed, epoch, rank)
    batches = getattr(train, "batch_sampler", None)
    targets = [train, batches, getattr(batches, "sampler", None)]
    targets += [getattr(train, name, None) for name in ("sampler", "dataset")]
    for target in {id(target): target for target in targets}.values():
        set_epoch = getattr(target, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
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
            hint="pass a list or a DataLoader, which can be read again in every epoch",
        )


def read(source: Iterable[Any], what: str, where: str | None = None) -> Iterator[Any]:
    """Yield the batches of a loader; any error in it is raised as a one-line error.

    Args:
        source: the loader.
        what: name of the data, for the error.
        where: a hint for the error.

    Raises:
        InputError: a batch cannot be read.
    """
    count, iterator = 0, None
    while True:
        try:
            iterator = iter(source) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            text = _message(error)
            if not isinstance(error, MPCompileError):
                text = f"batch {count} of {what} cannot be read: {text}"
            raise InputError(f"{text}. {where}" if where else text) from error
        count += 1
        yield batch


def _message(error: Exception) -> str:
    """Return an error's own message, without the traceback that a DataLoader's worker wraps around it."""
    text = str(getattr(error, "message", error)).strip()  # with the line ends that str() of our own errors escapes
    if not text.startswith("Caught "):
        return first_line(error)
    lines = text.splitlines()
    return re.sub(r"^[\w.]*mpcompile\.errors\.\w+: ", "", lines[-1])


@contextlib.contextmanager
def enough_memory(images: Sized) -> Iterator[None]:
    """Turn an out-of-memory error into one that says what to change.

    Raises:
        InputError: the device ran out of memory on this batch of images.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        hint = "use a smaller batch; accumulate=N makes one step of N of them"
        raise InputError(f"there is too little memory for {len(images)} images", hint=hint) from error


def forward(module: Any, images: Any, who: str) -> Any:
    """Return the output of a model for a batch.

    Args:
        module: the model.
        images: images of the batch; or a tuple of positional inputs, or a dict of keyword inputs.
        who: name of the model, for errors.

    Raises:
        InputError: the forward pass fails, or runs out of memory.
    """
    try:
        with enough_memory(images):
            if isinstance(images, Mapping):
                return module(**images)
            return module(*images) if isinstance(images, tuple) else module(images)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        if ranks.lost(error):
            raise
        raise InputError(
            f"the {who} fails on a batch: {_message(error)}",
            expected="images that the model accepts",
            found=", ".join(
                f"{tuple(t.shape)}, {t.dtype}" for t in pytree.tree_leaves(images) if isinstance(t, Tensor)
            ),
        ) from error


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` batches; the last one holds the rest."""
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def unpack(item: Any, need_labels: bool) -> Batch:
    """Return the parts of a batch as a loader yields it: (images, labels), (images, labels, index), or images alone.

    A mapping, as of Hugging Face's loaders, holds images as the one entry besides labels and index. Labels are
    converted to int64 if they are needed, and dropped otherwise.

    Raises:
        InputError: the batch has another form, is empty, or lacks the labels that are needed.
    """
    if isinstance(item, Mapping):
        item = _parts(item)
    parts = [item] if isinstance(item, Tensor) else list(item) if isinstance(item, (tuple, list)) else []
    tensors = [part for place, part in enumerate(parts) if place != 1]  # labels may be NumPy's or Python's numbers
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
    numbers = class_numbers(labels, len(parts[0])) if need_labels else None
    return Batch(parts[0], numbers, parts[2] if len(parts) > 2 else None)


def _parts(item: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return images, labels and index of a batch that is a mapping.

    Raises:
        InputError: the images are not the only tensor besides labels and index.
    """
    found = {key: value for key, value in item.items() if isinstance(value, Tensor) and key not in (*LABELS, "index")}
    images = next((found[key] for key in _IMAGES if key in found), None)
    if images is None and len(found) != 1:
        raise InputError(
            "a batch does not say which of its entries are the images",
            expected=f"one tensor besides labels, or an entry {', '.join(_IMAGES)}",
            found=", ".join(map(str, item)),
        )
    images = next(iter(found.values())) if images is None else images
    labels = next((item[key] for key in LABELS if key in item), None)
    index = item.get("index")
    return (images,) if labels is None and index is None else (images, labels, index)[: 2 if index is None else 3]


def check_logits(student: Tensor, teacher: Tensor) -> int:
    """Check that logits (B, classes) of both models are of the same classes, and return the number of classes.

    Raises:
        InputError: they are not.
    """
    if student.shape != teacher.shape:
        raise InputError(
            "student and teacher have different classes",
            expected=f"{teacher.shape[1]}, as in the teacher",
            found=student.shape[1],
            hint="distil from the dense model that the student was made from",
        )
    return int(teacher.shape[1])


class Teacher:
    """Outputs of the dense model: computed or, for images seen before, from a cache."""

    def __init__(self, module: nn.Module, cache: bool) -> None:
        self.module = module
        self.rows: dict[int, Tensor] | None = {} if cache else None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Any:
        """Return the output for a batch.

        Raises:
            InputError: logits are to be cached, but the batch does not number its images.
        """
        if self.rows is None:
            return forward(self.module, batch.images, "teacher")
        if batch.index is None:
            raise InputError(
                "cache=True needs the index of each image",
                expected="batches (images, labels, index)",
                found="no index",
                hint="use cache=False, or a loader that also yields the index of each image",
            )
        numbers = batch.index.tolist()
        if not all(number in self.rows for number in numbers):
            logits = logits_of(forward(self.module, batch.images, "teacher"), "teacher").cpu()
            for number, row in zip(numbers, logits, strict=True):
                self.rows[number] = row
        return torch.stack([self.rows[number] for number in numbers]).to(batch.images.device)
