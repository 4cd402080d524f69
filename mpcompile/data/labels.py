"""Labels: class numbers in whatever whole-number type a dataset keeps them -> int64, checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpcompile.errors import InputError

_WHOLE = frozenset(
    (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    + (torch.int8, torch.int16, torch.int32, torch.int64)
)
_LARGEST = torch.iinfo(torch.int64).max


def whole_numbers(labels: Any) -> Tensor:
    """Labels as int64 in the shape they have: a tensor, a numpy array, a number, or a sequence of any of these.

    Raises:
        InputError: they are fractions, texts, or nothing that holds numbers.

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
        raise _out_of_range(int(values.max()), None)
    return torch.from_numpy(values.astype(np.int64))


def _wrong(found: str) -> InputError:
    return InputError(
        "labels have the wrong type",
        expected="class numbers: whole numbers, one per sample",
        found=found,
        hint="labels.argmax(1) makes them of one-hot or soft labels, labels.long() of whole numbers kept as floats",
    )


def _out_of_range(found: int, classes: int | None) -> InputError:
    return InputError(
        "a label is out of range",
        expected="a class number" if classes is None else f"0 to {classes - 1}, the classes of the model",
        found=found,
        hint="check the order of classes, and that data and model have the same ones",
    )


def class_numbers(labels: Any, count: int, classes: int | None = None) -> Tensor:
    """Labels as int64 (count,), from anything that :func:`whole_numbers` takes; (count, 1) is taken as (count,).

    Args:
        labels: of the samples.
        count: samples.
        classes: of the model; None checks no range.

    Raises:
        InputError: another type or number of labels, or one outside 0 to classes - 1.

    Example:
        >>> class_numbers(np.array([[3], [0]], dtype=np.int16), 2, classes=4)
        tensor([3, 0])
    """
    found = whole_numbers(labels)
    column = found.dim() == 2 and found.shape[1] == 1
    if found.numel() != count or not (found.dim() < 2 or column):
        raise _misfit(
            f"{count} labels",
            found.numel() if found.dim() < 2 else f"shape {tuple(found.shape)}",
            "labels.argmax(1) makes class numbers of one-hot labels" if found.dim() == 2 else None,
        )
    found = found.reshape(-1)
    if classes is not None:
        check_range(found, classes)
    return found


def check_range(labels: Tensor, classes: int) -> None:
    """Labels lie between 0 and classes - 1.

    Raises:
        InputError: one doesn't.
    """
    if labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise _out_of_range(low if low < 0 else high, classes)


class Labels:
    """Labels beside a stream of batches: given apart, or as the second item of each (input, label) batch.

    Args:
        given: labels of all samples, at once or in parts of any size (a generator is read as far as it is needed);
            None takes those in the batches.
    """

    def __init__(self, given: Any = None) -> None:
        if isinstance(given, Tensor) and (given.is_meta or given.layout is not torch.strided):
            whole_numbers(given)  # raises: these can't be cut into batches
        self.whole = given if isinstance(given, (Tensor, np.ndarray)) else None
        self.parts: Iterator[Any] | None = None
        if given is not None and self.whole is None:
            self.parts = iter(given) if _is_sequence(given) else iter([given])
        self.held = torch.empty(0, dtype=torch.int64)
        self.labelled: bool | None = None
        self.samples = 0

    def of(self, batch: Any, count: int) -> Tensor | None:
        """The labels of the next batch, int64 on the CPU, or None where there are none; not checked against classes.

        Args:
            batch: as the stream yields it.
            count: its samples.

        Raises:
            InputError: they are no class numbers, too few, or there in some batches alone.
        """
        own = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        given = self.whole is not None or self.parts is not None
        labelled = given or own is not None
        if self.labelled not in (None, labelled):
            raise InputError(
                "some batches have labels and others have none",
                expected="(input, label) batches throughout, or inputs alone",
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
        parts, there = [self.held], len(self.held)
        while there < count:
            try:
                part = whole_numbers(next(self.parts))
            except StopIteration:
                raise _misfit(f"{self.samples} labels or more", self.samples - count + there) from None
            parts.append(class_numbers(part, len(part) if part.dim() else 1).cpu())
            there += len(parts[-1])
        self.held = torch.cat(parts)
        found, self.held = self.held[:count], self.held[count:]
        return found

    def end(self) -> None:
        """No labels are left when the batches are.

        Raises:
            InputError: some are.
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
    return InputError("labels don't fit the inputs", expected=expected, found=found, hint=hint)
