"""How a model is called on a batch as a loader yields it: by position or keyword, without labels and other extras."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from torch import fx

from mpcompile.capture.inputs import TARGETS, needed, taken
from mpcompile.capture.signature import call_of, flatten_inputs, parameter_trees
from mpcompile.errors import InputError
from mpcompile.io.messages import warn_once

log = logging.getLogger(__name__)


def call_form(module: Any, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` with which to call a model on a batch.

    Args:
        module: the model: a module, a graph, or any callable.
        batch: a tensor; a mapping of inputs by name (a dict, a BatchFeature), or the one mapping that the model takes;
            or a tuple whose first item is one of these, such as (input, label). If the model needs several inputs, a
            tuple may hold all of them. Entries of a mapping that the model does not take are left out.

    Raises:
        InputError: the batch is empty, or an input is missing.

    Example:
        >>> args, kwargs = call_form(nn.Linear(2, 1), {"input": torch.ones(3, 2), "labels": torch.zeros(3)})
        >>> args, list(kwargs)
        ((), ['input'])
    """
    if isinstance(module, fx.GraphModule):
        return call_of(module, graph_inputs(module, batch), keywords=None)
    parameters = _parameters(module)
    names = needed(parameters)
    batch = _first(batch, len(names))
    if isinstance(batch, _Positional):
        return tuple(batch), {}
    given = taken(parameters, batch, extras=False) if isinstance(batch, Mapping) else None
    if given is None:
        return (batch,), {}
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"the input {missing[0]!r} is missing", expected=", ".join(names), found=", ".join(map(str, batch))
        )
    _tell(batch, given)
    return (), given


def graph_inputs(gm: fx.GraphModule, batch: Any) -> list[Any]:
    """Return the inputs in a batch as one value per placeholder of a graph; a batch is as in :func:`call_form`.

    Raises:
        InputError: the batch is empty, or an input is missing.
    """
    trees = parameter_trees(gm)
    if trees is not None:
        names = required = list(trees)
    else:
        nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
        names = [str(node.target) for node in nodes]
        required = [name for name, node in zip(names, nodes, strict=True) if not node.args]
    batch = _first(batch, len(required))
    if isinstance(batch, _Positional):
        return flatten_inputs(gm, tuple(batch))
    if not isinstance(batch, Mapping):
        return flatten_inputs(gm, (batch,))
    given = {key: value for key, value in batch.items() if key in names}
    if not given and len(names) == 1:
        return flatten_inputs(gm, (batch,))
    if not any(name.startswith("**") for name in names):
        _tell(batch, given)
    return flatten_inputs(gm, batch)


class _Positional(tuple[Any, ...]):
    """All inputs of a model that needs several."""


def _first(batch: Any, needed: int) -> Any:
    """Return the input in a batch, or all of them if the model needs several and a tuple holds as many."""
    if not isinstance(batch, (tuple, list)):
        return batch
    if not batch:
        raise InputError("a batch is empty", expected="a tuple whose first item is the input", found="no item")
    if len(batch) >= needed > 1 and not isinstance(batch[0], Mapping):
        return _Positional(batch[:needed])
    return batch[0]


def _parameters(module: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(getattr(module, "forward", module)).parameters.values())
    except (TypeError, ValueError):  # a function of C++
        return []


def _tell(batch: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Say once which entries of a batch, other than labels, are left out."""
    extra = [str(key) for key in batch if key not in given and key not in TARGETS]
    if extra:
        warn_once(log, f"the model does not take these entries of the batches, which are left out: {', '.join(extra)}")
