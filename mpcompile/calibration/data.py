"""Calibration data: any form of batches that a user may pass, converted to the inputs of a graph."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpcompile._moved import renamed
from mpcompile.capture.signature import takes_trees
from mpcompile.data.calls import graph_inputs
from mpcompile.data.labels import LABELS
from mpcompile.errors import InputError
from mpcompile.io.messages import warn_once
from mpcompile.ir.module import Imported
from mpcompile.ir.nodes import fake_value, hint
from mpcompile.ir.numerics import ordinary
from mpcompile.ir.parts import device_of

log = logging.getLogger(__name__)
__getattr__ = renamed(__name__, {"draw": "data.labels.draw"})


def as_batches(data: Any, what: str = "calibration") -> Iterable[Any]:
    """Return data as an iterable of batches: one tensor or one dict is one batch.

    Raises:
        InputError: ``data`` is not iterable; the message calls it ``what``.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not isinstance(data, Iterable):
        raise InputError(
            f"{what} has the wrong type",
            expected="an iterable of batches (tensors, tuples whose first item is the input, or dicts)",
            found=type(data).__name__,
        )
    return data


def peek(data: Any) -> tuple[Any, Iterable[Any]]:
    """Return the first batch and an iterable that still starts with it: the data itself if it can be read again.

    Raises:
        InputError: there is no batch.
    """
    data = as_batches(data)
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise InputError("calibration is empty", expected="at least one batch", found="none") from None
    return first, itertools.chain([first], iterator) if iterator is data else data


def model_inputs(batch: Any, names: list[str], examples: Sequence[Any] = ()) -> list[Any]:
    """Return the inputs in a batch: the entries of a mapping in the order of ``names``, else only the first item.

    Other entries of a mapping, such as labels, are left out.

    Args:
        examples: example inputs; if there is one, and it is a dict or a tuple, then the input in each batch is too.
    """
    nested = len(examples) == 1 and isinstance(examples[0], (Mapping, tuple, list))
    if isinstance(batch, Mapping):
        if batch.keys() >= set(names):
            return [batch[name] for name in names]
        if nested:
            return [batch]
        raise InputError("a calibration batch has the wrong keys", expected=", ".join(names), found=list(batch))
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise InputError("a calibration batch is empty", expected="a tuple whose first item is the input")
        batch = batch[0]
    if not isinstance(batch, Tensor) and not (nested and isinstance(batch, (Mapping, tuple, list))):
        raise InputError(
            "a calibration batch has the wrong type",
            expected="a tensor, a tuple whose first item is the input, or a dict",
            found=type(batch).__name__,
        )
    return [batch]


def batches(model: Imported, calibration: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield each calibration batch as the full list of graph inputs, its shape checked against the examples.

    Raises:
        InputError: a batch differs from the example inputs in shape or type, or is not finite.
    """
    placeholders = [n for n in model.gm.graph.nodes if n.op == "placeholder"]
    data = [n for n in placeholders if n.name not in model.lifted.tensors]
    device = device_of(model.gm)
    examples = [fake_value(node) for node in data]
    for index, batch in enumerate(calibration):
        values = _inputs(model, index, batch, [str(n.target) for n in data], examples)
        if len(values) != len(data):
            raise InputError(
                f"calibration batch {index} has the wrong number of inputs",
                expected=f"{len(data)} ({', '.join(str(n.target) for n in data)}), as a dict",
                found=len(values),
            )
        values = [_like(example, value) for example, value in zip(examples, values, strict=True)]
        for example, value in zip(examples, values, strict=True):
            _check_input(index, example, value)
        if any(isinstance(v, Tensor) and v.dim() and not len(v) for v in pytree.tree_leaves(values)):
            continue  # no samples: no statistics, and a reshape with a free axis would be ambiguous
        moved = dict(zip(data, (_moved(v, device) for v in values), strict=True))
        yield [moved[n] if n in moved else model.lifted.tensors[n.name] for n in placeholders]


def _inputs(model: Imported, index: int, batch: Any, names: list[str], examples: Sequence[Any]) -> list[Any]:
    """Return the inputs in a batch, one per placeholder that holds data."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    named = isinstance(first, Mapping) or (isinstance(batch, (tuple, list)) and len(batch) >= len(names) > 1)
    if model.lifted.tensors or (len(names) == 1 and not named):
        return model_inputs(batch, names, examples)
    if isinstance(first, Mapping) and not first.keys() & set(names) and not _takes_trees(model, names, examples):
        raise InputError("a calibration batch has the wrong keys", expected=", ".join(names), found=list(first))
    left_out = [key for key in first if key in LABELS and key not in names] if isinstance(first, Mapping) else []
    if left_out:
        warn_once(log, f"calibration uses no labels: {', '.join(left_out)} in the batches left out")
    try:
        return graph_inputs(model.gm, batch)
    except InputError as error:
        text = f"calibration batch {index} has a different structure from example_inputs: {error.message}"
        raise InputError(text, expected=error.expected, found=error.found) from error


def _takes_trees(model: Imported, names: list[str], examples: Sequence[Any]) -> bool:
    """Return True if an input of a graph may be a mapping itself, or hold inputs of any name."""
    trees = any(isinstance(example, (Mapping, tuple, list)) for example in examples)
    return trees or takes_trees(model.gm) or any(name.startswith("**") for name in names)


def _like(example: Any, value: Any) -> Any:
    """Return ``value`` as plain dicts, lists and tuples, without keys (such as labels) that the example lacks."""
    if isinstance(example, Mapping) and isinstance(value, Mapping):
        return {key: _like(example[key], value[key]) for key in example if key in value}
    if isinstance(example, (tuple, list)) and isinstance(value, (tuple, list)) and len(example) == len(value):
        items = [_like(a, b) for a, b in zip(example, value, strict=True)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _moved(value: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), ordinary(value))


def _check_input(index: int, example: Any, value: Any) -> None:
    """Refuse an input of a calibration batch that differs from the example in structure or shape, or is not finite."""
    expected, found = (pytree.tree_leaves_with_path(tree) for tree in (example, value))
    if [path for path, _ in expected] != [path for path, _ in found]:
        raise InputError(
            f"calibration batch {index} has a different structure from example_inputs",
            expected=_outline(example),
            found=_outline(value),
        )
    for (_, fake), (_, tensor) in zip(expected, found, strict=True):
        if not isinstance(tensor, Tensor):
            continue
        shape = tuple(int(hint(s)) for s in fake.shape) if isinstance(fake, Tensor) else None
        if shape is not None and tuple(tensor.shape[1:]) != shape[1:]:
            raise InputError(
                f"calibration batch {index} has the wrong shape",
                expected=f"(batch, {', '.join(map(str, shape[1:]))}), as in example_inputs",
                found=tuple(tensor.shape),
                hint="calibrate with the transform and the resolution of inference",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"calibration batch {index} is not finite", expected="no NaN and no infinity")


def _outline(value: Any) -> str:
    """Return the type of an input, and its keys or length."""
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value))}"[:100]
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
