"""One graph for both modes, from two captures of a model: one in ``train()`` and one in ``eval()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from mpcompile.layers import ByMode


def unify_modes(root: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> bool:
    """Make ``evaluation`` follow the training flag, if the two graphs differ only in numbers.

    Args:
        root: the module that holds the layers of both graphs; it gets a :class:`ByMode` for each difference.
        training: the graph that was captured in ``train()``.
        evaluation: the graph that was captured in ``eval()``; it is changed in place.

    Returns:
        False if they differ in anything else; ``evaluation`` is then unchanged.
    """
    if len(training.nodes) != len(evaluation.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    switches: list[tuple[fx.Node, int | str, Any, Any]] = []
    for t, e in zip(training.nodes, evaluation.nodes, strict=True):
        if (t.op, t.target) != (e.op, e.target):
            return False
        twin[t] = e
        of_training, of_evaluation = _arguments(t), _arguments(e)
        if of_training.keys() != of_evaluation.keys():
            return False
        for key, a in of_training.items():
            b = of_evaluation[key]
            if _same(a, b, twin):
                continue
            if not (isinstance(a, (bool, int, float)) and isinstance(b, (bool, int, float))):
                return False
            switches.append((e, key, a, b))
    for node, key, a, b in switches:
        name = f"{node.name}_{key if isinstance(key, str) else f'arg{key}'}"
        root.add_module(name, ByMode(a, b).train(root.training))
        with evaluation.inserting_before(node):
            value = evaluation.create_node("call_module", name)
        if isinstance(key, str):
            node.update_kwarg(key, value)
        else:
            _set_argument(node, key, value)
    return True


def _arguments(node: fx.Node) -> dict[int | str, Any]:
    """Return the arguments of a node by position or keyword, with the defaults that an aten node leaves out."""
    given: dict[int | str, Any] = dict(enumerate(node.args))
    given.update(node.kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        for place, argument in enumerate(node.target._schema.arguments):
            key = argument.name if argument.kwarg_only else place
            if argument.has_default_value() and key not in given and argument.name not in given:
                given[key] = argument.default_value
    return given


def _set_argument(node: fx.Node, place: int, value: Any) -> None:
    """Set a positional argument, after filling in the defaults of those before it."""
    before = _arguments(node)
    args = [before[i] for i in range(max(place + 1, len(node.args)))]
    args[place] = value
    node.args = tuple(args)


def _same(a: Any, b: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(a, fx.Node):
        return twin.get(a) is b
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y, twin) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], twin) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step), twin)
    return type(a) is type(b) and bool(a == b)
