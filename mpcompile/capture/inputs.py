"""Example inputs: any form that a user may pass, converted to the positional inputs of a graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.capture.signature import flatten_inputs
from mpcompile.errors import InputError
from mpcompile.ir.nodes import fake_value, hint
from mpcompile.ir.numerics import ordinary


def arguments(model: nn.Module, example_inputs: Any) -> list[Any]:
    """Return example inputs as a list of positional arguments; a dict is bound to the signature of forward."""
    example_inputs = ordinary(example_inputs)
    if isinstance(model, fx.GraphModule):
        return flatten_inputs(model, example_inputs)
    if isinstance(example_inputs, Tensor):
        return [example_inputs]
    if isinstance(example_inputs, Mapping):
        try:
            bound = inspect.signature(model.forward).bind(**example_inputs)
        except TypeError as error:
            hint = "to pass the dict itself as the one input, put it into a tuple: ({...},)"
            raise InputError(f"example_inputs do not fit forward: {error}", hint=hint) from error
        values: list[Any] = []
        for name, value in bound.arguments.items():
            rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            values.extend(value.values() if rest else [value])
        return values
    if isinstance(example_inputs, (tuple, list)):
        return list(example_inputs)
    raise InputError(
        "example_inputs has the wrong type",
        expected="a tensor, a tuple of inputs, or a dict of keyword inputs",
        found=type(example_inputs).__name__,
    )


def example_of(node: fx.Node) -> Any:
    """Return an input with the shape and dtype of a placeholder's fake value."""
    value = fake_value(node)
    if isinstance(value, Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
    return hint(value)
