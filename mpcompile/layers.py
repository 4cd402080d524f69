"""Layers of our own: masked linear and convolution layers, whose weights keep their names, and helpers of a graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.errors import InputError
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern


class _Masked(nn.Module):
    """A weight, its N:M mask (a buffer, so that it is part of the state dict), and the pattern.

    Every forward pass computes ``weight * mask``: gradients of masked weights are exactly zero, and a state dict of
    the dense model loads without unmasking anything: if it holds no ``mask``, the layer keeps its own.
    """

    weight: Tensor
    bias: Tensor | None
    mask: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: Pattern) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_buffer("mask", mask)
        self.n, self.m = pattern

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.n, self.m)

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Set masked weights to exactly zero in storage."""
        self.weight.masked_fill_(~self.mask, 0)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "mask" not in state_dict:
            state_dict = {**state_dict, prefix + "mask": self.mask}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MaskedLinear(_Masked):
    """``nn.Linear`` with an N:M mask: weight (out, in), mask boolean of the same shape.

    Example:
        >>> mask = torch.tensor([[True, True, False, False]])
        >>> MaskedLinear(torch.ones(1, 4), None, mask, Pattern(2, 4))(torch.ones(1, 4)).item()
        2.0
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor, pattern: Pattern) -> MaskedLinear:
        layer = cls(linear.weight, linear.bias, mask, pattern)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.masked_linear(x, self.weight, self.mask, self.bias, self.n, self.m)

    def extra_repr(self) -> str:
        out, features = self.weight.shape
        return f"{features}, {out}, bias={self.bias is not None}, pattern={self.pattern}"


class MaskedConv2d(_Masked):
    """``nn.Conv2d`` (zero padding) with an N:M mask along the input channels of each tap.

    weight is (out, in / groups, kh, kw), mask boolean of the same shape.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        pattern: Pattern,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> None:
        super().__init__(weight, bias, mask, pattern)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Tensor, pattern: Pattern) -> MaskedConv2d:
        """Return the masked form of a convolution whose padding is zeros and given as numbers, not by name."""
        stride, padding, dilation = (list(map(int, axes)) for axes in (conv.stride, conv.padding, conv.dilation))
        layer = cls(conv.weight, conv.bias, mask, pattern, stride, padding, dilation, conv.groups)
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return ops.masked_conv2d(x, self.weight, self.mask, self.bias, *geometry, self.n, self.m)

    def extra_repr(self) -> str:
        out, cin, kh, kw = self.weight.shape
        return f"{cin * self.groups}, {out}, kernel_size={(kh, kw)}, stride={self.stride}, pattern={self.pattern}"


class ByMode(nn.Module):
    """A number that depends on the training flag, such as the ``dropout_p`` of fused attention.

    A model is traced in both modes; where the traces differ in a constant, a call of this module replaces it.
    """

    def __init__(self, training: float, evaluation: float) -> None:
        super().__init__()
        self.when_training, self.when_evaluating = training, evaluation

    def forward(self) -> float:
        return self.when_training if self.training else self.when_evaluating

    def extra_repr(self) -> str:
        return f"training={self.when_training}, evaluation={self.when_evaluating}"


def by_mode(gm: fx.GraphModule, value: Any) -> ByMode | None:
    """Return the :class:`ByMode` that a node calls; None for anything else."""
    if not isinstance(value, fx.Node) or value.op != "call_module":
        return None
    module = gm.get_submodule(str(value.target))
    return module if isinstance(module, ByMode) else None


def number(gm: fx.GraphModule, value: Any) -> Any:
    """Return a literal, or the value that a :class:`ByMode` yields in the graph's current mode; None if unknown."""
    if not isinstance(value, fx.Node):
        return value
    module = by_mode(gm, value)
    return None if module is None else module()


class InputGuard(nn.Module):
    """A check of a graph's inputs, called before anything else: a captured graph holds only for the sizes it records.

    torch.export and dynamo write sizes into a graph, such as the batch in ``expand(2, 1, 64)``. Other inputs would fail
    somewhere inside, or give wrong numbers. Sizes that are free are expressions: numbers, symbols, and tuples of an
    operation (a key of :data:`OPERATIONS`) and its operands, such as ``("mul", 2, "s0")``.

    Args:
        inputs: one entry per input. ``("tensor", name, dtype, sizes)``; ``("value", name, value)`` for a number, a text
            or None that the graph was captured with; ``("size", name, size)`` for a whole number that may vary; None
            for an input that is not checked. Of dtypes only the kind is checked, since weights may be cast.
        symbols: symbol -> where its value is read: ``(input, axis, scale, offset)``, with a size of
            ``scale * symbol + offset`` there; for an input that is a number, the axis is None.
        conditions: expressions of symbols that must be true.

    Example:
        >>> guard = InputGuard([("tensor", "x", torch.float32, (2, "s0"))], {"s0": (0, 1, 1, 0)}, [("ge", "s0", 3)])
        >>> guard(torch.ones(2, 8))
        >>> guard(torch.ones(5, 8))
        Traceback (most recent call last):
        mpcompile.errors.InputError: input x does not fit this graph; expected (batch 2, any) float, found (5, 8)...
    """

    _is_impure = True  # a node without users that fx may not remove

    def __init__(
        self, inputs: Sequence[Any], symbols: Mapping[str, Sequence[Any]] | None = None, conditions: Sequence[Any] = ()
    ) -> None:
        super().__init__()
        self.inputs, self.symbols, self.conditions = tuple(inputs), dict(symbols or {}), tuple(conditions)

    @property
    def batch(self) -> int | None:
        """The one batch size that the graph takes; None if it takes others."""
        sizes = [entry[3][0] for entry in self.inputs if entry is not None and entry[0] == "tensor" and entry[3]]
        return next((size for size in sizes if isinstance(size, int)), None)

    def forward(self, *inputs: Any) -> None:
        """Raise InputError for the first input that does not fit; it is named, with the expected sizes."""
        for entry, value in zip(self.inputs, inputs, strict=True):
            if entry is not None and not _same_kind(entry, value):
                self._refuse(entry, value, {})
        known = {name: self._read(source, inputs) for name, source in self.symbols.items()}
        for place, (entry, value) in enumerate(zip(self.inputs, inputs, strict=True)):
            if entry is not None and not _sizes_fit(entry, value, known):
                self._refuse(entry, value, {k: n for k, n in known.items() if self.symbols[k][0] != place})
        for condition in self.conditions:
            if not _evaluate(condition, known):
                self._refuse_condition(condition, inputs)

    def _read(self, source: Any, inputs: Sequence[Any]) -> Any:
        place, axis, scale, offset = source
        size = inputs[place] if axis is None else inputs[place].shape[axis]
        return size if scale == 1 and offset == 0 else (size - offset) // scale

    def _refuse(self, entry: Any, value: Any, known: Mapping[str, Any]) -> None:
        raise InputError(
            f"input {entry[1]} does not fit this graph", expected=_wanted(entry, known), found=_shown(value), hint=_HINT
        )

    def _refuse_condition(self, condition: Any, inputs: Sequence[Any]) -> None:
        used = {name: self.symbols[name] for name in sorted(_symbols(condition))}
        places = sorted({source[0] for source in used.values()})
        texts = {}
        for name, (place, axis, scale, offset) in used.items():
            size = self.inputs[place][1] + ("" if axis is None else f".shape[{axis}]")
            size = size if offset == 0 else f"({size} - {offset})"
            texts[name] = size if scale == 1 else f"({size} / {scale})"
        raise InputError(
            f"input {', '.join(self.inputs[place][1] for place in places)} does not fit this graph",
            expected=_text(condition, texts),
            found="; ".join(_shown(inputs[place]) for place in places),
            hint=_HINT,
        )

    def extra_repr(self) -> str:
        return "; ".join(f"{entry[1]} {_wanted(entry, {})}" for entry in self.inputs if entry is not None)


def fixed_batch(module: nn.Module) -> int | None:
    """Return the one batch size that a captured graph takes; None for modules that take others."""
    return next((child.batch for child in module.children() if isinstance(child, InputGuard)), None)


_HINT = (
    "these are the sizes that the graph was captured with: capture it with free ones (dynamic_shapes of "
    "torch.export.export), or with example inputs of this size"
)
OPERATIONS: dict[str, Any] = {
    "add": operator.add,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "max": torch.sym_max,
    "min": torch.sym_min,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
"""Operations on the sizes of an :class:`InputGuard`, each of two operands."""
_SIGNS = {"add": "+", "mul": "*", "floordiv": "//", "mod": "%", "eq": "==", "ne": "!="}
_SIGNS |= {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _same_kind(entry: Any, value: Any) -> bool:
    """Return True for a tensor with the right number of axes and kind of dtype, or the right value."""
    kind, wanted = entry[0], entry[2]
    if kind == "tensor":
        return isinstance(value, Tensor) and value.dim() == len(entry[3]) and _kind(value.dtype) == _kind(wanted)
    if kind == "size":
        return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if wanted is None or value is None or isinstance(value, Tensor):
        return wanted is None and value is None
    return bool(value == wanted or (value != value and wanted != wanted))


def _sizes_fit(entry: Any, value: Any, known: Mapping[str, Any]) -> bool:
    if entry[0] == "value":
        return True
    sizes, found = ([entry[2]], [value]) if entry[0] == "size" else (entry[3], value.shape)
    return all([bool(_evaluate(size, known) == n) for size, n in zip(sizes, found, strict=True)])


def _evaluate(expression: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(expression, str):
        return known[expression]
    if isinstance(expression, int):
        return expression
    name, *operands = expression
    left, right = [_evaluate(operand, known) for operand in operands]
    if name in ("floordiv", "mod") and right == 0:  # of an empty input
        return -1
    return OPERATIONS[name](left, right)


def _symbols(expression: Any) -> set[str]:
    if isinstance(expression, (tuple, list)):
        return set().union(*(_symbols(operand) for operand in expression[1:]))
    return {expression} if isinstance(expression, str) else set()


def _text(expression: Any, names: Mapping[str, Any]) -> str:
    """Return an expression as text, its symbols by the names given, others as ``any``."""
    if isinstance(expression, str):
        return str(names.get(expression, "any"))
    if isinstance(expression, int):
        return str(expression)
    name, *operands = expression
    parts = [_text(operand, names) for operand in operands]
    parts = [
        f"({p})" if isinstance(o, (tuple, list)) and name in _SIGNS else p for p, o in zip(parts, operands, strict=True)
    ]
    return f" {_SIGNS[name]} ".join(parts) if name in _SIGNS else f"{name}({', '.join(parts)})"


def _wanted(entry: Any, known: Mapping[str, Any]) -> str:
    """Return what an input should be, as text."""
    if entry[0] == "value":
        return repr(entry[2])
    if entry[0] == "size":
        return _text(entry[2], known)
    sizes = [_text(size, known) for size in entry[3]]
    return f"({', '.join([f'batch {sizes[0]}', *sizes[1:]] if sizes else [])}) {_kind(entry[2])}"


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return "float"
    return "complex" if dtype.is_complex else "bool" if dtype is torch.bool else "integer"


def _shown(value: Any) -> str:
    return f"{tuple(value.shape)} {_kind(value.dtype)}" if isinstance(value, Tensor) else f"{value!r}"[:80]
