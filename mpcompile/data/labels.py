"""Labels: class numbers of any integer type, converted to int64 and checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpcompile.errors import InputError

_WHOLE = frozenset(
    (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    + (torch.int8, torch.int16, torch.int32, torch.int64)
)
LABELS = ("labels", "label", "targets", "target")  # keys of a batch under which loaders give the classes
_LARGEST = torch.iinfo(torch.int64).max


def whole_numbers(labels: Any) -> Tensor:
    """Return labels as int64, in the shape they have.

    Args:
        labels: a tensor, a NumPy array, a number, or a sequence of any of these.

    Raises:
        InputError: they are floats, text, or anything else that is not whole numbers.

    Example:
        >>> whole_numbers(torch.tensor([255, 0], dtype=torch.uint8))
        tensor([255,   0])
        >>> whole_numbers([True, False])
        tensor([1, 0])
    """
    if isinstance(labels, Tensor):
        if labels.dtype not in _WHOLE or labels.layout is not torch.strided or labels.is_meta:
            raise _wrong(f"{tuple(labels.shape)}, {labels.dtype}, {_form(labels)}")
        if labels.dtype is torch.uint64:
            return _from_numpy(labels.detach().cpu().numpy()).to(labels.device)
        return labels.detach().long()
    if isinstance(labels, (bool, int, np.generic, np.ndarray)):
        return _from_numpy(np.asarray(labels))
    if not _is_sequence(labels):
        raise _wrong(type(labels).__name__)
    items = list(labels)
    if not items:
        return torch.empty(0, dtype=torch.int64)
    if all(isinstance(item, (bool, int, np.generic)) for item in items):
        return _from_numpy(np.array(items))
    parts = [whole_numbers(item) for item in items]
    return torch.stack(parts) if all(part.dim() == 0 for part in parts) else torch.cat([p.reshape(-1) for p in parts])


def _form(labels: Tensor) -> str:
    return "on the meta device" if labels.is_meta else str(labels.layout).removeprefix("torch.")


def _from_numpy(values: np.ndarray) -> Tensor:
    if values.dtype.kind not in "biu":
        raise _wrong(f"{values.shape}, {values.dtype}")
    if values.dtype.kind == "u" and values.size and int(values.max()) > _LARGEST:
        raise _out_of_range(int(values.max()), "a class number")
    return torch.from_numpy(values.astype(np.int64))


def _wrong(found: str) -> InputError:
    return InputError(
        "labels have the wrong type",
        expected="class numbers: whole numbers, one per sample",
        found=found,
        hint="labels.argmax(1) converts one-hot or soft labels, labels.long() whole numbers stored as floats",
    )


def _out_of_range(label: int, expected: str, what: str = "a label") -> InputError:
    return InputError(
        f"{what} is out of range",
        expected=expected,
        found=label,
        hint="check the order of the classes, and that data and model have the same ones",
    )


def class_numbers(labels: Any, count: int, classes: int | None = None) -> Tensor:
    """Return labels as int64 (count,).

    Args:
        labels: anything that :func:`whole_numbers` accepts; (count, 1) is read as (count,).
        count: number of samples.
        classes: number of the model's classes; None checks no range.

    Raises:
        InputError: labels have the wrong type or number, or one is outside 0 to classes - 1.

    Example:
        >>> class_numbers(np.array([[3], [0]], dtype=np.int16), 2, classes=4)
        tensor([3, 0])
    """
    numbers = whole_numbers(labels)
    column = numbers.dim() == 2 and numbers.shape[1] == 1
    if numbers.numel() != count or not (numbers.dim() < 2 or column):
        raise _misfit(
            f"{count} labels",
            numbers.numel() if numbers.dim() < 2 else f"shape {tuple(numbers.shape)}",
            "labels.argmax(1) converts one-hot labels to class numbers" if numbers.dim() == 2 else None,
        )
    numbers = numbers.reshape(-1)
    if classes is not None:
        check_range(numbers, classes)
    return numbers


def check_range(labels: Tensor, classes: int | None, what: str = "a label") -> None:
    """Check that labels are between 0 and classes - 1.

    Args:
        labels: class numbers, of any shape.
        classes: number of the model's classes; None sets no upper bound.
        what: name of a label in the error.

    Raises:
        InputError: a label is not.
    """
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            expected = "0 or more" if classes is None else f"0 to {classes - 1}, the classes of the model"
            raise _out_of_range(low if low < 0 else high, expected, what)


def draw(labels: Iterable[int], count: int, seed: int = 0) -> list[int]:
    """Draw a class-balanced, shuffled sample of a labelled dataset, and return its indices.

    Args:
        labels: label of every item, in the dataset's order.
        count: size of the sample; class counts differ by at most one, as long as classes have enough items.
        seed: the same seed draws the same sample.

    Raises:
        InputError: there are fewer items than ``count``, or labels are not integers.

    Example:
        >>> sorted(draw([0, 0, 0, 0, 1, 1], 4))[-2:]
        [4, 5]
    """
    values = whole_numbers(labels)
    if not 0 < count <= len(values):
        raise InputError("cannot draw a calibration sample", expected=f"1 to {len(values)} items", found=count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(values), generator=generator)
    turn = torch.zeros(len(values), dtype=torch.long)
    for label in values.unique():
        members = order[values[order] == label]
        turn[members] = torch.arange(len(members))
    ranked = order[turn[order].argsort(stable=True)]  # one item of every class, then a second one of each, ...
    chosen = ranked[:count]
    return chosen[torch.randperm(count, generator=generator)].tolist()


def labels_in(batch: Any, count: int) -> Any:
    """Return the class numbers in a batch, or None: the second item of a tuple, or an entry of a mapping.

    An entry that does not hold one whole number per sample (boxes, masks of pixels) is no class number.

    Example:
        >>> labels_in({"pixel_values": torch.ones(2, 3), "labels": torch.tensor([4, 5])}, 2)
        tensor([4, 5])
    """
    if isinstance(batch, (tuple, list)):
        if len(batch) > 1:
            return batch[1]
        batch = batch[0] if batch else None
    if not isinstance(batch, Mapping):
        return None
    value = next((batch[key] for key in LABELS if key in batch), None)
    if isinstance(value, Tensor):
        one_each = value.numel() == count and not value.is_floating_point() and not value.is_complex()
        return value if one_each else None
    if isinstance(value, Sequence) and len(value) == count and all(isinstance(item, int) for item in value):
        return value
    return value if getattr(value, "size", None) == count and getattr(value, "dtype", None) is not None else None


class Labels:
    """Labels of a stream of batches: passed separately, or those in each batch (see :func:`labels_in`).

    Args:
        given: labels of all samples, at once or in parts of any size (a generator is read only as far as needed);
            None uses those in the batches.
    """

    def __init__(self, given: Any = None) -> None:
        if isinstance(given, Tensor) and (given.is_meta or given.layout is not torch.strided):
            whole_numbers(given)  # raises: these cannot be cut into batches
        self.whole = given if isinstance(given, (Tensor, np.ndarray)) else None
        self.parts: Iterator[Any] | None = None
        if given is not None and self.whole is None:
            self.parts = iter(given) if _is_sequence(given) else iter([given])
        self.held = torch.empty(0, dtype=torch.int64)
        self.labelled: bool | None = None
        self.samples = 0

    def of(self, batch: Any, count: int) -> Tensor | None:
        """Return the labels of the next batch, int64 on the CPU and without a range check, or None without labels.

        Args:
            batch: the batch, in the form that the stream yields.
            count: number of samples in it.

        Raises:
            InputError: they are not class numbers, too few, or missing in some batches.
        """
        own = labels_in(batch, count)
        given = self.whole is not None or self.parts is not None
        labelled = given or own is not None
        if self.labelled not in (None, labelled):
            raise InputError(
                "some batches have labels and others have none",
                expected="(input, label) batches throughout, or only inputs",
                found=f"{'labels' if labelled else 'none'} after {self.samples} samples",
            )
        self.labelled = labelled
        self.samples += count
        if not labelled:
            return None
        return class_numbers(self._next(count) if given else own, count).cpu()

    def _next(self, count: int) -> Any:
        if self.whole is not None:
            flat = self.whole.reshape(1) if self.whole.ndim == 0 else self.whole
            if len(flat) < self.samples:
                raise _misfit(f"{self.samples} labels or more", len(flat))
            return flat[self.samples - count : self.samples]
        assert self.parts is not None
        parts, ready = [self.held], len(self.held)
        while ready < count:
            try:
                part = whole_numbers(next(self.parts))
            except StopIteration:
                raise _misfit(f"{self.samples} labels or more", self.samples - count + ready) from None
            parts.append(class_numbers(part, len(part) if part.dim() else 1).cpu())
            ready += len(parts[-1])
        self.held = torch.cat(parts)
        labels, self.held = self.held[:count], self.held[count:]
        return labels

    def end(self) -> None:
        """Check that no labels are left after the last batch.

        Raises:
            InputError: there are labels left.
        """
        left = len(self.held)
        if self.whole is not None and self.whole.ndim:
            left = len(self.whole) - self.samples
        elif self.parts is not None:
            left += sum(whole_numbers(part).numel() for part in itertools.islice(self.parts, 1))
        if left:
            raise _misfit(f"{self.samples} labels", self.samples + left)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, np.generic))


def _misfit(expected: str, found: object, hint: str | None = None) -> InputError:
    return InputError("labels do not fit the inputs", expected=expected, found=found, hint=hint)
