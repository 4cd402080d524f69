"""Batches of samples, with or without labels, in chunks that fit into memory."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from mpcompile.calibration.data import as_batches
from mpcompile.certificates.pair import trace
from mpcompile.data.batches import read as read_loader
from mpcompile.data.calls import call_form
from mpcompile.data.labels import Labels
from mpcompile.errors import InputError, MPCompileError
from mpcompile.layers import fixed_batch

_BYTES = 1 << 29  # maximum bytes of float64 activations in a chunk
_COPIES = 6  # an enclosure has up to five parts, in addition to the value itself
_MOST = 256  # maximum samples per chunk; small models gain nothing from more

Chunk = tuple[list[Tensor], Tensor | None]


def _inputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return the positional inputs in a batch."""
    module = getattr(model, "_orig_mod", model)
    args, kwargs = call_form(module, batch)
    values = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values()) if kwargs else list(args)
    if not values or not all(isinstance(v, Tensor) and v.dim() for v in values):
        raise InputError(
            "a batch has the wrong type",
            expected="a tensor, an (input, label) tuple, or a dict of tensors",
            found=type(batch).__name__,
        )
    if len({len(v) for v in values}) > 1:
        raise InputError("the inputs of a batch differ in length", found=[len(v) for v in values])
    return values


def read(model: nn.Module, batches: Any, labels: Any) -> Iterator[Chunk]:
    """Read batches with their labels, one at a time; empty batches are skipped.

    Raises:
        InputError: there is no batch, a batch has the wrong type, or labels do not fit.
    """
    known = Labels(labels)
    for batch in read_loader(as_batches(batches, "the data to certify"), "the samples"):
        values = _inputs(model, batch)
        if len(values[0]):
            yield [v.detach().cpu() for v in values], known.of(batch, len(values[0]))
    if not known.samples:
        raise InputError("there are no samples", expected="at least one sample", found="none")
    known.end()


def cut(batches: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """Cut batches into chunks of at most ``size`` samples."""
    for values, known in batches:
        labels = [None] * -(-len(values[0]) // size) if known is None else known.split(size)
        for parts, label in zip(zip(*(v.split(size) for v in values), strict=True), labels, strict=True):
            yield list(parts), label


def chunk_size(module: nn.Module, one: list[Tensor]) -> int:
    """Return how many samples' activations fit into memory, estimated from the float64 graph for one sample.

    A graph that was captured for one batch size takes chunks of that size alone.
    """
    fixed = fixed_batch(module)
    if fixed is not None:
        return fixed
    try:
        graph = trace(module, [v.double() if v.is_floating_point() else v for v in one]).graph
    except MPCompileError:
        return 1
    values = [n.meta.get("val") for n in graph.nodes if n.op == "call_function"]
    bytes_each = 8 * _COPIES * sum(v.numel() for v in values if isinstance(v, Tensor))
    return max(1, min(_MOST, _BYTES // max(1, bytes_each)))
