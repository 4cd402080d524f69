"""The check of inputs that a captured graph begins with, made from the sizes that torch recorded on its inputs.

torch.export checks inputs in a module of its own, ``GuardsFn``: compiled code that no file can hold, whose errors name
no input. A :class:`mpcompile.layers.InputGuard` takes its place, and stays with every copy, lowering and file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy import functions

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import dynamo_name, fake_value, hint
from mpcompile.layers import InputGuard

_NAME = "input_guard"


def is_torch_guard(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return True for a node that only checks inputs, as torch.export inserts them."""
    if node.op != "call_module" or node.users:
        return False
    cls = type(gm.get_submodule(str(node.target)))
    return cls.__name__ == "GuardsFn" and cls.__module__.startswith("torch.export")


def guard_inputs(gm: IRModule, *, captured: bool = False) -> bool:
    """Begin a captured graph with a check of its inputs, in place of torch's own.

    A graph is captured if torch.export, dynamo or make_fx made it: its inputs carry fake values whose sizes are
    numbers, where they are fixed, or symbols. Graphs of symbolic tracing fix no size and stay as they are.

    Args:
        captured: the graph is known to be captured; otherwise its nodes show it.

    Returns:
        True if the graph has changed.
    """
    for node in [n for n in gm.graph.nodes if is_torch_guard(gm, n)]:
        gm.graph.erase_node(node)
        gm._modules.pop(str(node.target), None)
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if not inputs or not (captured or _captured(gm.graph)) or any(isinstance(m, InputGuard) for m in gm.children()):
        return False
    sizes = _Sizes()
    entries = [sizes.entry(place, node) for place, node in enumerate(inputs)]
    if all(entry is None for entry in entries):
        return False
    name = _NAME
    while hasattr(gm, name):
        name += "_"
    gm.add_module(name, InputGuard(entries, sizes.sources, sizes.conditions()).train(gm.training))
    with gm.graph.inserting_after(inputs[-1]):
        gm.graph.call_module(name, tuple(inputs))
    gm.recompile()
    return True


def _captured(graph: fx.Graph) -> bool:
    """Return True if torch recorded a graph from one run, with the sizes of that run."""
    if any(getattr(n, "_dynamo_source", None) is not None for n in graph.nodes if n.op == "placeholder"):
        return True
    if any(n.op in ("call_method", "call_module") for n in graph.nodes):
        return False
    return any(getattr(n.target, "namespace", "") == "aten" for n in graph.nodes if n.op == "call_function")


class _Sizes:
    """Turns fake values into entries of an :class:`InputGuard`, and their symbols into names.

    Attributes:
        sources: name of a symbol -> the input and axis that give its value.
    """

    def __init__(self) -> None:
        self.sources: dict[str, tuple[int, int | None, int, int]] = {}
        self._names: dict[Any, str] = {}
        self._examples: dict[str, int] = {}
        self._env: Any = None

    def entry(self, place: int, node: fx.Node) -> Any:
        """Return the entry of one input; None for one that carries no fake value, or is a weight."""
        if dynamo_name(node) is not None or not {"val", "example_value"} & node.meta.keys():
            return None
        value, name = fake_value(node), str(node.target)
        if isinstance(value, Tensor):
            sizes = tuple(self._size(size, place, axis) for axis, size in enumerate(value.shape))
            return ("tensor", name, value.dtype, sizes)
        if isinstance(value, torch.SymInt):
            return ("size", name, self._size(value, place, None))
        if value is None or type(value) in (bool, int, float, str):
            return ("value", name, value)
        return None

    def _size(self, size: Any, place: int, axis: int | None) -> Any:
        """Return a size as an expression; a symbol that no input so far has given is read here."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression, self._env = size.node.expr, size.node.shape_env
        unknown = [symbol for symbol in expression.free_symbols if symbol not in self._names]
        if len(unknown) == 1 and len(expression.free_symbols) == 1:
            scale = expression.coeff(unknown[0], 1)
            offset = sympy.expand(expression - scale * unknown[0])
            if scale.is_Integer and scale > 0 and offset.is_Integer:
                name = self._names[unknown[0]] = f"s{len(self._names)}"
                self.sources[name] = (place, axis, int(scale), int(offset))
                self._examples[name] = (hint(size) - int(offset)) // int(scale)
        try:
            return self._expression(expression)
        except _Unknown:  # as in the example
            return int(hint(size))

    def conditions(self) -> list[Any]:
        """Return what torch assumed of the symbols, beyond the sizes themselves.

        A symbol in an assumption of an unknown form has to keep the value of the example.
        """
        found: list[Any] = []
        for symbol, name in self._names.items():
            limits = self._env.var_to_range[symbol]
            if limits.lower.is_Integer and limits.lower > 2:  # torch assumes 2 or more of every size; 1 works, too
                found.append(("ge", name, int(limits.lower)))
            if limits.upper.is_Integer:
                found.append(("le", name, int(limits.upper)))
        for guard in () if self._env is None else self._env.guards:
            condition = self._env.replace(guard.expr)  # of symbols that turned out to be expressions of others
            try:
                found.extend([] if condition == sympy.true else [self._expression(condition)])
            except _Unknown:
                names = [self._names[symbol] for symbol in condition.free_symbols if symbol in self._names]
                found.extend(("eq", name, self._examples[name]) for name in names)
        return list(dict.fromkeys(found))

    def _expression(self, value: sympy.Basic) -> Any:
        """Return an expression of sympy in the form of an :class:`InputGuard`.

        Raises:
            _Unknown: it has symbols that no input gives, or an operation that the guard lacks.
        """
        if isinstance(value, sympy.Integer):
            return int(value)
        if value in self._names:
            return self._names[value]
        if isinstance(value, sympy.Pow) and value.exp.is_Integer and 1 < value.exp <= _HIGHEST:
            return self._chain("mul", [value.base] * int(value.exp))
        name = next((name for kind, name in _OPERATIONS.items() if isinstance(value, kind)), None)
        if name is None or len(value.args) < 2:
            raise _Unknown
        return self._chain(name, value.args)

    def _chain(self, name: str, operands: Sequence[sympy.Basic]) -> Any:
        parts = [self._expression(operand) for operand in operands]
        return functools.reduce(lambda left, right: (name, left, right), parts)


class _Unknown(Exception):
    """Raised for an expression that an InputGuard cannot hold."""


_HIGHEST = 4  # power of a size that is written as a product
_OPERATIONS: dict[Any, str] = {
    sympy.Add: "add",
    sympy.Mul: "mul",
    functions.FloorDiv: "floordiv",
    functions.Mod: "mod",
    functions.PythonMod: "mod",
    functions.Max: "max",
    functions.Min: "min",
    sympy.Eq: "eq",
    sympy.Ne: "ne",
    sympy.StrictLessThan: "lt",
    sympy.LessThan: "le",
    sympy.StrictGreaterThan: "gt",
    sympy.GreaterThan: "ge",
}
