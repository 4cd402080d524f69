"""Rows: the values of one node for all samples, as one tensor whose axis 0 counts samples.

They are in memory up to a budget, and in memory-mapped files of a temporary folder beyond it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpcompile.errors import GraphError

Index = slice | Tensor


class Shelf:
    """Memory for tensors: up to ``budget`` bytes of RAM, then files in a temporary folder, gone when it is closed.

    Example:
        >>> with Shelf(budget=0) as shelf:
        ...     shelf.new((2, 3), torch.float32).fill_(1).sum().item(), shelf.used
        (6.0, 0)
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.used = budget, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, Path] = {}
        self._count = 0

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def new(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an empty tensor on the CPU."""
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        if not size or self.used + size <= self.budget:
            self.used += size
            return torch.empty(tuple(shape), dtype=dtype)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mpcompile-")
        self._count += 1
        path = Path(self._folder.name) / str(self._count)
        tensor = torch.from_file(str(path), shared=True, size=count, dtype=dtype).reshape(tuple(shape))
        self._files[tensor.data_ptr()] = path
        return tensor

    def release(self, tensor: Tensor) -> None:
        """Give back the memory of a tensor of :meth:`new`, which nothing reads any more."""
        path = self._files.pop(tensor.data_ptr(), None)
        if path is None:
            self.used -= tensor.numel() * tensor.element_size()
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Layout:
    """Where the samples are in a value: ``factor`` consecutive entries of axis ``axis`` belong to each.

    A number has no axis: it is ``base + factor * samples``. A value without samples has factor 0.
    """

    axis: int = 0
    factor: int = 0
    base: int = 0


def layout_of(value: Any, other: Any, samples: int, fewer: int) -> Layout:
    """Return the layout of a value, from what the same node yields for another number of samples.

    Args:
        value: a tensor or another value, for ``samples`` samples.
        other: the same for ``fewer`` samples. If the two numbers are equal (a graph that takes one batch size),
            samples are on the first axis of a multiple of that size.

    Raises:
        GraphError: the size of no single axis is proportional to the number of samples.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        slope = 0 if fewer == samples else (value - other) // (samples - fewer)
        return Layout(factor=slope, base=value - slope * samples)
    if not isinstance(value, Tensor):
        return Layout()
    if fewer == samples:
        axes = [a for a, size in enumerate(value.shape) if size == samples]
        axes = axes or [a for a, size in enumerate(value.shape) if size and size % samples == 0]
        return Layout(axes[0], value.shape[axes[0]] // samples) if axes else Layout()
    axes = [a for a, sizes in enumerate(zip(value.shape, other.shape, strict=True)) if sizes[0] != sizes[1]]
    if not axes:
        return Layout()
    if len(axes) > 1 or value.shape[axes[0]] * fewer != other.shape[axes[0]] * samples:
        raise GraphError(
            "a value of the graph mixes the samples of a batch",
            expected="one axis that is proportional to the batch",
            found=f"{tuple(value.shape)} for {samples} samples, {tuple(other.shape)} for {fewer}",
        )
    return Layout(axes[0], value.shape[axes[0]] // samples)


class Rows:
    """A value of one node for ``count`` samples: a tensor, a number, or a tree of these.

    Args:
        shelf: where tensors are held.
        count: number of samples.
        value, other, samples, fewer: the value for two numbers of samples; see :func:`layout_of`.

    Example:
        >>> with Shelf(1 << 20) as shelf:
        ...     rows = Rows(shelf, 5, torch.zeros(2, 3), torch.zeros(1, 3), 2, 1)
        ...     rows.write(0, torch.ones(3, 3)), rows.write(3, torch.zeros(2, 3))
        ...     rows.take(torch.tensor([4, 0])).sum(1)
        (None, None)
        tensor([0., 3.])
    """

    def __init__(self, shelf: Shelf, count: int, value: Any, other: Any, samples: int, fewer: int) -> None:
        self.shelf, self.count = shelf, count
        leaves, self.tree = pytree.tree_flatten(value)
        others = pytree.tree_leaves(other)
        self.layouts = [layout_of(a, b, samples, fewer) for a, b in zip(leaves, others, strict=True)]
        self.leaves: list[Any] = []
        for leaf, layout in zip(leaves, self.layouts, strict=True):
            if not isinstance(leaf, Tensor):
                self.leaves.append(leaf)
            elif not layout.factor:
                self.leaves.append(leaf.clone())
            else:
                shape = by_sample(leaf, layout).shape[1:]
                self.leaves.append(shelf.new((count, *shape), leaf.dtype))

    def like(self) -> Rows:
        """Return room for another value of the same form."""
        other = copy.copy(self)
        other.leaves = [
            self.shelf.new(own.shape, own.dtype) if isinstance(own, Tensor) and layout.factor else own
            for own, layout in zip(self.leaves, self.layouts, strict=True)
        ]
        return other

    @torch.no_grad()
    def write(self, start: int, value: Any) -> None:
        """Store the value of the samples from ``start`` on."""
        for own, leaf, layout in zip(self.leaves, pytree.tree_leaves(value), self.layouts, strict=True):
            if isinstance(own, Tensor) and layout.factor:
                part = by_sample(leaf, layout)
                own[start : start + len(part)].copy_(part)

    def samples(self, value: Tensor) -> Tensor:
        """Return a tensor of this node with its samples on axis 0."""
        return by_sample(value, self.layouts[0]) if self.layouts[0].factor else value[None]

    @torch.no_grad()
    def normalise(self, index: slice) -> None:
        """Divide the values of each sample at an index by their mean. Only for a single tensor."""
        own = self.leaves[0][index] if self.layouts[0].factor else self.leaves[0][None]
        own /= own.flatten(1).mean(1).clamp(min=1e-30).reshape(-1, *[1] * (own.dim() - 1))

    def take(self, index: Index, device: torch.device | None = None) -> Any:
        """Return the value of the samples at an index, a slice or a tensor of places."""
        count = len(range(*index.indices(self.count))) if isinstance(index, slice) else len(index)
        leaves = []
        for own, layout in zip(self.leaves, self.layouts, strict=True):
            if not isinstance(own, Tensor):
                number = isinstance(own, int) and not isinstance(own, bool)
                leaves.append(layout.base + layout.factor * count if number else own)
                continue
            if layout.factor:
                part = own[index] if isinstance(index, slice) else own.index_select(0, index)
                part = part.flatten(0, 1) if layout.factor > 1 else part
                own = part.movedim(0, layout.axis)
            leaves.append(own if device is None else own.to(device))
        return pytree.tree_unflatten(leaves, self.tree)

    def release(self) -> None:
        """Give the memory back."""
        for own, layout in zip(self.leaves, self.layouts, strict=True):
            if isinstance(own, Tensor) and layout.factor:
                self.shelf.release(own)
        self.leaves = []


def count_of(values: Iterable[Any]) -> int:
    """Return the number of samples in the inputs of a graph: the length of the first tensor that has axes."""
    return next(len(value) for value in values if isinstance(value, Tensor) and value.dim())


def by_sample(value: Tensor, layout: Layout) -> Tensor:
    """Return a value with its samples on axis 0, followed by an axis of the entries of each if there are several."""
    value = value.detach().movedim(layout.axis, 0)
    return value.unflatten(0, (-1, layout.factor)) if layout.factor > 1 else value
