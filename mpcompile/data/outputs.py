"""What a model returns: its class scores, wherever they are among its outputs, and all of its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import InputError

_SCORES = "logits"  # the field of class scores in transformers, and by custom in dicts


def class_scores(output: Any) -> Tensor | None:
    """Return the class scores (batch, classes) among the outputs of a model; None if it returns none.

    They are the output itself, its field ``logits``, or else the first floating-point tensor of two axes.

    Args:
        output: a tensor, or nested tuples, mappings (such as a ModelOutput) and dataclasses of tensors.

    Example:
        >>> scores = torch.randn(2, 10)
        >>> class_scores({"features": torch.randn(2, 5, 8), "logits": scores}) is scores
        True
        >>> class_scores((torch.randn(2, 3, 8, 8), scores)) is scores
        True
        >>> class_scores({"logits": torch.randn(2, 3, 8, 8), "pooled": scores}) is None  # of pixels, not of images
        True
    """
    if isinstance(output, Tensor):
        return output if _is_table(output) else None
    named = dict(_fields(output)).get(_SCORES)
    if isinstance(named, Tensor):
        return named if _is_table(named) else None
    return next((tensor for tensor in tensors_of(output) if _is_table(tensor)), None)


def logits_of(output: Any, who: str = "model") -> Tensor:
    """Return the class scores (batch, classes) among the outputs of a model; see :func:`class_scores`.

    Args:
        who: name of the model, for the error.

    Raises:
        InputError: it returns none; the message lists what it returns.

    Example:
        >>> logits_of({"boxes": torch.zeros(2, 8, 4)}, "teacher")
        Traceback (most recent call last):
        mpcompile.errors.InputError: the teacher does not return logits; expected ..., found boxes (2, 8, 4)
    """
    scores = class_scores(output)
    if scores is None:
        raise InputError(
            f"the {who} does not return logits", expected="a tensor (batch, classes)", found=described(output)
        )
    return scores


def numbers_of(output: Any) -> Tensor:
    """Return the output of a model as one tensor to compare: class scores, a single tensor, or all numbers in a row.

    A row (one axis) holds every floating-point tensor of outputs without class scores: boxes, masks, features. If there
    is none, it holds the integers.

    Raises:
        InputError: there is no tensor.
    """
    scores = output if isinstance(output, Tensor) else class_scores(output)
    if scores is not None:
        return scores
    tensors = tensors_of(output)
    chosen = [tensor for tensor in tensors if tensor.is_floating_point()] or tensors
    if not chosen:
        raise InputError("the model returns no tensor", expected="logits (batch, classes)", found=described(output))
    return torch.cat([tensor.reshape(-1).float() for tensor in chosen])


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors among the outputs of a model, in order."""
    return [tensor for _, tensor in _tensors(output)]


def described(output: Any) -> str:
    """Return names and shapes of the tensors that a model returns, as text."""
    texts = [f"{name} {tuple(tensor.shape)}".strip() for name, tensor in _tensors(output)]
    return ", ".join(texts)[:300] or type(output).__name__


def _is_table(value: Tensor) -> bool:
    return value.dim() == 2 and value.is_floating_point()


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the parts of an output."""
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        yield from ((str(name), part) for name, part in zip(names, value, strict=True))


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every tensor in an output, in order."""
    if isinstance(value, Tensor):
        yield name, value
    for key, part in _fields(value):
        yield from _tensors(part, f"{name}.{key}" if name else key)
