"""Example inputs: any form that a user may pass, converted to the arguments of a call and to the inputs of a graph."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.capture.signature import flatten_inputs
from mpcompile.errors import InputError
from mpcompile.ir.nodes import fake_value, hint
from mpcompile.ir.numerics import ordinary

# Keys of a batch that hold what a model is to predict. A model computes its loss from them instead of, or beside, its
# outputs.
TARGETS = frozenset({"labels", "label", "label_ids", "mask_labels", "class_labels", "target", "targets", "return_loss"})
_TO_PASS_A_DICT = "to pass the dict itself as the one input, put it into a tuple: ({...},)"


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a model.

    Attributes:
        left_out: keys of a batch that are no inputs of the model, and labels.
        whole: True if a mapping is passed as the one input, because none of its keys is the name of an input.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    whole: bool = False


def call_for(model: nn.Module, example_inputs: Any) -> Call:
    """Return the arguments with which ``model`` is called.

    Args:
        model: the module or graph that is called.
        example_inputs: a tensor, a tuple or list of positional inputs, or a mapping of keyword inputs. Of a mapping,
            labels and entries that forward does not take are left out. If forward takes one input and none of the keys
            is its name, the mapping itself is that input.

    Raises:
        InputError: another type, or a mapping that lacks inputs.

    Example:
        >>> call_for(nn.Identity(), {"input": 1, "labels": 2})
        Call(args=(), kwargs={'input': 1}, left_out=('labels',), whole=False)
        >>> call_for(nn.Identity(), {"image": 1, "id": 2}).args
        ({'image': 1, 'id': 2},)
    """
    example_inputs = ordinary(as_dicts(example_inputs))
    if isinstance(example_inputs, Tensor):
        return Call((example_inputs,))
    if isinstance(example_inputs, dict):
        return _by_keyword(model, example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return Call(tuple(example_inputs))
    raise InputError(
        "example_inputs has the wrong type",
        expected="a tensor, a tuple of inputs, or a dict of keyword inputs",
        found=type(example_inputs).__name__,
    )


def as_dicts(value: Any) -> Any:
    """Return a value with every mapping that pytree does not know (``BatchFeature``) turned into a dict."""
    if isinstance(value, Mapping) and not isinstance(value, dict):
        value = dict(value)
    if type(value) is dict:
        return {key: as_dicts(entry) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(as_dicts(entry) for entry in value)
    return value


def _by_keyword(model: nn.Module, batch: dict[str, Any]) -> Call:
    signature = inspect.signature(model.forward)
    entries = taken(list(signature.parameters.values()), batch)
    if entries is None:
        return Call((batch,), whole=True)
    try:
        signature.bind(**entries)
    except TypeError as error:
        raise unfit(error) from error
    return Call((), entries, tuple(key for key in batch if key not in entries))


def taken(
    parameters: Sequence[inspect.Parameter], batch: Mapping[str, Any], *, extras: bool = True
) -> dict[str, Any] | None:
    """Return the entries of a batch that a forward takes by keyword; None if the batch itself is its one input.

    Targets are left out unless forward needs them. ``**kwargs`` take every other entry, or those of their annotation.

    Args:
        parameters: the parameters of forward.
        batch: name -> value; if none of the names is a parameter, and one input is needed, it is the batch.
        extras: let ``**kwargs`` take entries beside named ones; False for batches of loaders, which hold more than
            the inputs.

    Example:
        >>> parameters = list(inspect.signature(nn.Identity().forward).parameters.values())
        >>> taken(parameters, {"input": 1, "labels": 2}), taken(parameters, {"image": 1, "id": 2})
        ({'input': 1}, None)
    """
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    found = bool(named.keys() & batch.keys())
    if not found and len(needed(parameters)) == 1:
        return None
    rest = rest if extras or not found else None
    entries = {}
    for key, value in batch.items():
        optional = key not in named or named[key].default is not inspect.Parameter.empty
        if not (key in TARGETS and optional) and (key in named or (rest is not None and _accepts(rest, key))):
            entries[key] = value
    return entries


def needed(parameters: Sequence[inspect.Parameter]) -> list[str]:
    """Return the names of the parameters without a default."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in several]


def unfit(error: Exception) -> InputError:
    """Return the error for a mapping that does not bind to the parameters of forward."""
    return InputError(f"example_inputs do not fit forward: {error}", hint=_TO_PASS_A_DICT)


def _accepts(rest: inspect.Parameter, key: str) -> bool:
    """Return True if ``**kwargs`` may hold a key: any, unless it is annotated with the keys (``Unpack[TypedDict]``)."""
    inner = typing.get_args(rest.annotation)
    return not inner or not typing.is_typeddict(inner[0]) or key in inner[0].__annotations__


def arguments(model: nn.Module, example_inputs: Any) -> list[Any]:
    """Return example inputs as one value per input of a graph, in the order of its placeholders.

    Args:
        model: a graph, or a module whose symbolic trace has one placeholder per parameter of forward.
        example_inputs: as for :func:`call_for`.

    Raises:
        InputError: as :func:`call_for`, or inputs of another structure than those that the graph was captured with.
    """
    if isinstance(model, fx.GraphModule):
        return flatten_inputs(model, ordinary(as_dicts(example_inputs)))
    return by_parameter(model, call_for(model, example_inputs))


def by_parameter(model: nn.Module, call: Call) -> list[Any]:
    """Return the arguments of a call as one value per parameter of forward that is given, in their order."""
    if not call.kwargs:
        return list(call.args)
    bound = inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    values: list[Any] = []
    for name, value in bound.arguments.items():
        rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        values.extend(value.values() if rest else [value])
    return values


def example_of(node: fx.Node) -> Any:
    """Return an input with the shape and dtype of a placeholder's fake value."""
    value = fake_value(node)
    if isinstance(value, Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
    return hint(value)
