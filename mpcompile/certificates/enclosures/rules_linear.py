"""Rules of operators that move elements or are linear in each of their arguments; see registry.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcompile.certificates.enclosures import functions as fn
from mpcompile.certificates.enclosures.enclosure import (
    Enclosure,
    add,
    joined,
    moved,
    multiplied,
    scaled,
    shifted,
    summed,
)
from mpcompile.certificates.enclosures.registry import RULES, NoRule, Rule, refuse, rule

# --- Operators that move elements: applied to every part of an enclosure ---


def _view(function: Callable[..., Tensor]) -> Rule:
    return lambda x, *args, **kwargs: moved(x, lambda t: function(t, *args, **kwargs))


_VIEWS: dict[str, Callable[..., Tensor]] = {
    "reshape": Tensor.reshape,
    "view": Tensor.reshape,
    "_unsafe_view": Tensor.reshape,
    "flatten": Tensor.flatten,
    "unflatten": Tensor.unflatten,
    "squeeze": Tensor.squeeze,
    "unsqueeze": Tensor.unsqueeze,
    "transpose": Tensor.transpose,
    "permute": Tensor.permute,
    "t": Tensor.t,
    "expand": Tensor.expand,
    "select": Tensor.select,
    "slice": torch.ops.aten.slice.Tensor,
    "narrow": Tensor.narrow,
    "roll": Tensor.roll,
    "flip": Tensor.flip,
    "pixel_unshuffle": F.pixel_unshuffle,
}
for _name, _function in _VIEWS.items():
    RULES[_name] = _view(_function)


def _identity(x: Enclosure, *args: Any, **kwargs: Any) -> Enclosure:
    return x


for _name in ("contiguous", "clone", "detach", "alias", "lift_fresh"):
    RULES[_name] = _identity


@rule("dropout", "feature_dropout")
def _dropout(x: Enclosure, p: float = 0.5, train: bool = False) -> Enclosure:
    refuse("dropout is random in training mode", train)
    return x


@rule("to", "_to_copy")
def _cast(x: Enclosure, *args: Any, **kwargs: Any) -> Enclosure:
    kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    refuse(f"it casts to {kinds[0] if kinds else ''}", any(k != torch.float64 for k in kinds))
    return x


@rule("pad", "constant_pad_nd")
def _pad(x: Enclosure, widths: list[int], mode: str = "constant", value: float | None = None) -> Enclosure:
    if isinstance(mode, (int, float)):  # constant_pad_nd has no mode
        mode, value = "constant", float(mode)
    refuse("it pads with a number other than 0", mode == "constant" and bool(value))
    return moved(x, lambda t: F.pad(t, widths, mode=mode))


def _split(function: Callable[..., Sequence[Tensor]]) -> Rule:
    def apply(x: Enclosure, *args: Any, **kwargs: Any) -> tuple[Enclosure, ...]:
        count = len(function(x.center, *args, **kwargs))
        return tuple(moved(x, lambda t, i=i: function(t, *args, **kwargs)[i]) for i in range(count))  # type: ignore[misc]

    return apply


RULES["unbind"] = _split(Tensor.unbind)
RULES["chunk"] = _split(Tensor.chunk)
RULES["split"] = RULES["split_with_sizes"] = _split(torch.split)


@rule("getitem")
def _getitem(values: Sequence[Any], index: int) -> Any:
    return values[index]


@rule("cat", "concat")
def _cat(parts: list[Enclosure], dim: int = 0) -> Enclosure:
    return joined(parts, lambda tensors: torch.cat(tensors, dim))


@rule("stack")
def _stack(parts: list[Enclosure], dim: int = 0) -> Enclosure:
    return joined(parts, lambda tensors: torch.stack(tensors, dim))


# --- Linear operators ---


def biased(y: Enclosure, bias: Enclosure | None, axis: int) -> Enclosure:
    """Add a bias (if any) along an axis."""
    if bias is None:
        return y
    shape = [1] * y.center.dim()
    shape[axis] = -1
    return add(y, moved(bias, lambda t: t.reshape(shape)))


@rule("linear")
def _linear(x: Enclosure, weight: Enclosure, bias: Enclosure | None = None) -> Enclosure:
    return biased(multiplied(x, weight, F.linear, weight.center.shape[1]), bias, -1)


@rule("conv2d", "conv1d", "conv3d")
def _conv(
    x: Enclosure,
    weight: Enclosure,
    bias: Enclosure | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Enclosure:
    convolve: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.center.dim()]

    def product(a: Tensor, b: Tensor) -> Tensor:
        return convolve(a, b, None, stride, padding, dilation, groups)

    return biased(multiplied(x, weight, product, math.prod(weight.center.shape[1:])), bias, 1)


@rule("matmul", "bmm", "mm")
def _matmul(a: Enclosure, b: Enclosure) -> Enclosure:
    return multiplied(a, b, torch.matmul, a.center.shape[-1])


@rule("addmm")
def _addmm(bias: Enclosure, a: Enclosure, b: Enclosure) -> Enclosure:
    return add(_matmul(a, b), bias)


def _operand(x: Any) -> Any:
    return float(x) if isinstance(x, (int, float)) else x


@rule("add")
def _add(a: Any, b: Any, alpha: float = 1) -> Enclosure:
    a, b = _operand(a), _operand(b)
    if isinstance(b, float):
        return shifted(a, alpha * b)
    if isinstance(a, float):
        return shifted(scaled(b, float(alpha)), a)
    return add(a, b, float(alpha))


@rule("sub", "subtract")
def _sub(a: Any, b: Any, alpha: float = 1) -> Enclosure:
    return _add(a, b, alpha=-alpha)


@rule("rsub")
def _rsub(a: Any, b: Any, alpha: float = 1) -> Enclosure:
    return _add(b, a, alpha=-alpha)


@rule("mul", "multiply")
def _mul(a: Any, b: Any) -> Enclosure:
    a, b = _operand(a), _operand(b)
    if isinstance(a, float):
        a, b = b, a
    return scaled(a, b) if isinstance(b, float) else multiplied(a, b, torch.mul)


@rule("div", "true_divide", "divide")
def _div(a: Any, b: Any, rounding_mode: str | None = None) -> Enclosure:
    refuse("a division that rounds is not continuous", rounding_mode is not None)
    a, b = _operand(a), _operand(b)
    if isinstance(b, float):
        return multiplied(a, Enclosure(torch.tensor(b, dtype=torch.float64)), torch.div) if b else _zero()
    inverse = fn.reciprocal(b)
    return scaled(inverse, a) if isinstance(a, float) else multiplied(a, inverse, torch.mul)


def _zero() -> Enclosure:
    raise NoRule("it divides by 0")


@rule("neg")
def _neg(x: Enclosure) -> Enclosure:
    return scaled(x, -1.0)


@rule("addcmul")
def _addcmul(x: Enclosure, a: Enclosure, b: Enclosure, value: float = 1) -> Enclosure:
    return add(x, multiplied(a, b, torch.mul), float(value))


@rule("square")
def _square(x: Enclosure) -> Enclosure:
    return multiplied(x, x, torch.mul)


@rule("pow")
def _pow(x: Any, exponent: Any) -> Enclosure:
    refuse(f"a power of {exponent!r}", not isinstance(x, Enclosure) or exponent not in (0.5, 1, 2, 3))
    if exponent == 0.5:
        return fn.square_root(x)
    power = x
    for _ in range(int(exponent) - 1):
        power = multiplied(power, x, torch.mul)
    return power


def over_axes(x: Enclosure, dim: Any) -> list[int]:
    """Return the axes that a reduction's ``dim`` stands for: all of them for None or an empty list."""
    if dim is None or dim == []:
        return list(range(x.center.dim()))
    return [dim] if isinstance(dim, int) else list(dim)


@rule("mean")
def _mean(x: Enclosure, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Enclosure:
    refuse(f"it casts to {dtype}", dtype not in (None, torch.float64))
    return fn.mean_over(x, over_axes(x, dim), keepdim)


@rule("sum")
def _sum(x: Enclosure, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Enclosure:
    refuse(f"it casts to {dtype}", dtype not in (None, torch.float64))
    return fn.mean_over(x, over_axes(x, dim), keepdim, average=False)


@rule("avg_pool2d")
def _avg_pool(x: Enclosure, kernel: Any, *args: Any, **kwargs: Any) -> Enclosure:
    terms = math.prod(kernel) if isinstance(kernel, (list, tuple)) else kernel**2
    return summed(x, lambda t: F.avg_pool2d(t, kernel, *args, **kwargs), terms)


@rule("adaptive_avg_pool2d", "adaptive_avg_pool1d")
def _adaptive_pool(x: Enclosure, size: Any) -> Enclosure:
    pool: Any = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool1d
    return summed(x, lambda t: pool(t, size), math.prod(x.center.shape[-len(size) :]))
