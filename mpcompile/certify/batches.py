"""Batches of samples, with or without labels, cut into chunks that fit into memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.calibration import as_batches
from mpcompile.certify.pair import trace
from mpcompile.errors import InputError, MPCompileError

_BYTES = 1 << 29  # of float64 activations that a chunk may hold at once
_COPIES = 6  # an enclosure has up to five parts, beside the value itself
_MOST = 256  # samples a chunk; small models gain nothing from more

Chunk = tuple[list[Tensor], Tensor | None]


def _inputs(model: nn.Module, batch: Any) -> tuple[list[Tensor], Any]:
    """Positional inputs, and what came along as labels."""
    if isinstance(batch, Mapping):
        try:
            bound = inspect.signature(getattr(model, "_orig_mod", model).forward).bind(**batch)
        except TypeError as error:
            raise InputError(f"a batch doesn't fit forward: {error}") from error
        values, labels = list(bound.arguments.values()), None
    elif isinstance(batch, (tuple, list)):
        values, labels = [batch[0]] if batch else [], batch[1] if len(batch) > 1 else None
    else:
        values, labels = [batch], None
    if not values or not all(isinstance(v, Tensor) and v.dim() for v in values):
        raise InputError(
            "a batch has the wrong type",
            expected="a tensor, an (input, label) tuple, or a dict of tensors",
            found=type(batch).__name__,
        )
    if len({len(v) for v in values}) > 1 or not len(values[0]):
        raise InputError("the inputs of a batch differ in length, or are empty", found=[len(v) for v in values])
    return values, labels


def read(model: nn.Module, batches: Any, labels: Any) -> Callable[[int], Iterator[Chunk]]:
    """All samples, checked; call the result with a size to get chunks.

    Raises:
        InputError: no batch, a batch of the wrong type, or labels that don't fit.
    """
    held = [_inputs(model, batch) for batch in as_batches(batches)]
    if not held:
        raise InputError("there are no samples", expected="at least one batch", found="none")
    count = sum(len(values[0]) for values, _ in held)
    known: Tensor | None = None
    if labels is not None:
        known = labels if isinstance(labels, Tensor) else torch.cat([torch.as_tensor(p).reshape(-1) for p in labels])
    elif all(isinstance(y, Tensor) and not y.is_floating_point() for _, y in held):
        known = torch.cat([y.reshape(-1) for _, y in held])
    if known is not None and (known.numel() != count or known.is_floating_point()):
        raise InputError("labels don't fit the samples", expected=f"{count} class numbers", found=known.numel())
    known = None if known is None else known.reshape(-1).long().cpu()

    def chunks(size: int) -> Iterator[Chunk]:
        start = 0
        for values, _ in held:
            for parts in zip(*(v.split(size) for v in values), strict=True):
                stop = start + len(parts[0])
                yield [p.detach().cpu() for p in parts], None if known is None else known[start:stop]
                start = stop

    return chunks


def chunk_size(module: nn.Module, one: list[Tensor]) -> int:
    """Samples whose activations fit into memory, from the graph of one; a float64 module."""
    try:
        graph = trace(module, [v.double() if v.is_floating_point() else v for v in one]).graph
    except MPCompileError:
        return 1
    values = [n.meta.get("val") for n in graph.nodes if n.op == "call_function"]
    bytes_each = 8 * _COPIES * sum(v.numel() for v in values if isinstance(v, Tensor))
    return max(1, min(_MOST, _BYTES // max(1, bytes_each)))
