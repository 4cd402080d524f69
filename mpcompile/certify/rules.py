"""Rules: what each operator of an aten graph does to enclosures. An operator without a rule ends a certificate.

Graphs come from ``make_fx`` before decomposition, so that a linear layer, a normalisation or an attention is one node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpcompile.certify import functions as fn
from mpcompile.certify.enclosure import (
    Enclosure,
    add,
    joined,
    moved,
    multiplied,
    scaled,
    shifted,
    summed,
)
from mpcompile.certify.functions import Unbounded

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


class NoRule(Exception):
    """No rule encloses this operator; the message names it and says why, where that is known."""


WHY = {
    "topk": "which tokens it picks depends on values",
    "sort": "the order depends on values",
    "argsort": "the order depends on values",
    "argmax": "it is not continuous",
    "embedding": "its index depends on values",
}


def operator_name(target: Any) -> str:
    """``"linear"`` for ``aten.linear.default``, ``"mpcompile.token_merge"`` for an operator of ours."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return str(getattr(target, "__name__", target))
    return str(packet).removeprefix("aten.")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of aten operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def enclose(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The enclosure of a node's value; arguments are enclosures where the node takes tensors.

    Raises:
        NoRule: the operator, or these arguments of it, can't be enclosed.
        Unbounded: it can, but on these values nothing bounds it.
    """
    name = operator_name(node.target)
    if name not in RULES:
        why = WHY.get(name, "which tokens become one depends on values" if "token_" in name else "")
        raise NoRule(f"no rule encloses {name}" + (f": {why}" if why else ""))
    return RULES[name](*args, **kwargs)


def _refuse(reason: str, refused: bool) -> None:
    if refused:
        raise NoRule(reason)


# --- Views: the same on every part of an enclosure ---


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
    _refuse("dropout is random in training mode", train)
    return x


@rule("to", "_to_copy")
def _cast(x: Enclosure, *args: Any, **kwargs: Any) -> Enclosure:
    kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    _refuse(f"it casts to {kinds[0] if kinds else ''}", any(k != torch.float64 for k in kinds))
    return x


@rule("pad", "constant_pad_nd")
def _pad(x: Enclosure, widths: list[int], mode: str = "constant", value: float | None = None) -> Enclosure:
    if isinstance(mode, (int, float)):  # constant_pad_nd has no mode
        mode, value = "constant", float(mode)
    _refuse("it pads with a number other than 0", mode == "constant" and bool(value))
    return moved(x, lambda t: F.pad(t, widths, mode=mode))


def _apart(function: Callable[..., Sequence[Tensor]]) -> Rule:
    def apply(x: Enclosure, *args: Any, **kwargs: Any) -> tuple[Enclosure, ...]:
        count = len(function(x.center, *args, **kwargs))
        return tuple(moved(x, lambda t, i=i: function(t, *args, **kwargs)[i]) for i in range(count))  # type: ignore[misc]

    return apply


RULES["unbind"] = _apart(Tensor.unbind)
RULES["chunk"] = _apart(Tensor.chunk)
RULES["split"] = RULES["split_with_sizes"] = _apart(torch.split)


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


def _biased(y: Enclosure, bias: Enclosure | None, axis: int) -> Enclosure:
    if bias is None:
        return y
    shape = [1] * y.center.dim()
    shape[axis] = -1
    return add(y, moved(bias, lambda t: t.reshape(shape)))


@rule("linear")
def _linear(x: Enclosure, weight: Enclosure, bias: Enclosure | None = None) -> Enclosure:
    return _biased(multiplied(x, weight, F.linear, weight.center.shape[1]), bias, -1)


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

    return _biased(multiplied(x, weight, product, math.prod(weight.center.shape[1:])), bias, 1)


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
    _refuse("a division that rounds is not continuous", rounding_mode is not None)
    a, b = _operand(a), _operand(b)
    if isinstance(b, float):
        return multiplied(a, Enclosure(torch.tensor(b, dtype=torch.float64)), torch.div) if b else _refuse_zero()
    inverse = fn.reciprocal(b)
    return scaled(inverse, a) if isinstance(a, float) else multiplied(a, inverse, torch.mul)


def _refuse_zero() -> Enclosure:
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
    _refuse(f"a power of {exponent!r}", not isinstance(x, Enclosure) or exponent not in (0.5, 1, 2, 3))
    if exponent == 0.5:
        return fn.square_root(x)
    power = x
    for _ in range(int(exponent) - 1):
        power = multiplied(power, x, torch.mul)
    return power


def _axes(x: Enclosure, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(x.center.dim()))
    return [dim] if isinstance(dim, int) else list(dim)


@rule("mean")
def _mean(x: Enclosure, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Enclosure:
    _refuse(f"it casts to {dtype}", dtype not in (None, torch.float64))
    return fn.mean_over(x, _axes(x, dim), keepdim)


@rule("sum")
def _sum(x: Enclosure, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Enclosure:
    _refuse(f"it casts to {dtype}", dtype not in (None, torch.float64))
    return fn.mean_over(x, _axes(x, dim), keepdim, average=False)


@rule("avg_pool2d")
def _avg_pool(x: Enclosure, kernel: Any, *args: Any, **kwargs: Any) -> Enclosure:
    terms = math.prod(kernel) if isinstance(kernel, (list, tuple)) else kernel**2
    return summed(x, lambda t: F.avg_pool2d(t, kernel, *args, **kwargs), terms)


@rule("adaptive_avg_pool2d", "adaptive_avg_pool1d")
def _adaptive_pool(x: Enclosure, size: Any) -> Enclosure:
    pool: Any = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool1d
    return summed(x, lambda t: pool(t, size), math.prod(x.center.shape[-len(size) :]))


# --- Nonlinear operators ---


@rule("max_pool2d")
def _max_pool(x: Enclosure, *args: Any, **kwargs: Any) -> Enclosure:
    return fn.max_pooled(x, lambda t: F.max_pool2d(t, *args, **kwargs))


@rule("relu")
def _relu(x: Enclosure) -> Enclosure:
    return fn.relu(x)


@rule("hardtanh", "clamp")
def _clamp(x: Enclosure, low: Any = -1.0, high: Any = 1.0) -> Enclosure:
    _refuse("a clamp without two numbers", not all(isinstance(v, (int, float)) for v in (low, high)))
    return fn.clamped(x, float(low), float(high))


@rule("relu6")
def _relu6(x: Enclosure) -> Enclosure:
    return fn.clamped(x, 0.0, 6.0)


@rule("hardsigmoid")
def _hardsigmoid(x: Enclosure) -> Enclosure:
    return scaled(fn.clamped(shifted(x, 3.0), 0.0, 6.0), 1 / 6)


@rule("hardswish")
def _hardswish(x: Enclosure) -> Enclosure:
    return multiplied(x, _hardsigmoid(x), torch.mul)


@rule("leaky_relu")
def _leaky(x: Enclosure, slope: float = 0.01) -> Enclosure:
    _refuse("a leaky ReLU that is no contraction", not 0 <= slope <= 1)
    return fn.leaky(x, slope)


@rule("gelu")
def _gelu(x: Enclosure, approximate: str = "none") -> Enclosure:
    return fn.smooth(x, fn.GELU if approximate == "none" else fn.TANH_GELU)


for _name, _smooth in {"silu": fn.SILU, "tanh": fn.TANH, "sigmoid": fn.SIGMOID, "exp": fn.EXP}.items():
    RULES[_name] = lambda x, f=_smooth: fn.smooth(x, f)


@rule("sqrt")
def _sqrt(x: Enclosure) -> Enclosure:
    return fn.square_root(x)


@rule("rsqrt")
def _rsqrt(x: Enclosure) -> Enclosure:
    return fn.reciprocal(fn.square_root(x))


@rule("reciprocal")
def _reciprocal(x: Enclosure) -> Enclosure:
    return fn.reciprocal(x)


@rule("linalg_vector_norm")
def _vector_norm(x: Enclosure, order: float = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Enclosure:
    _refuse(f"a norm of order {order}", order != 2)
    _refuse("a norm that casts", kwargs.get("dtype") not in (None, torch.float64))
    return fn.vector_norm(x, _axes(x, dim), keepdim)


@rule("softmax", "_softmax")
def _softmax(x: Enclosure, dim: int, dtype: Any = None) -> Enclosure:
    _refuse(f"it casts to {dtype}", dtype not in (None, False, torch.float64))
    return fn.softmax(x, dim)


@rule("scaled_dot_product_attention")
def _attention(
    q: Enclosure,
    k: Enclosure,
    v: Enclosure,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **kwargs: Any,
) -> Enclosure:
    _refuse("attention with a mask", mask is not None or causal or enable_gqa or bool(dropout))
    return fn.attention(q, k, v, q.center.shape[-1] ** -0.5 if scale is None else scale)


@rule("layer_norm")
def _layer_norm(
    x: Enclosure,
    shape: list[int],
    weight: Enclosure | None = None,
    bias: Enclosure | None = None,
    eps: float = 1e-5,
    cudnn: bool = False,
) -> Enclosure:
    _refuse("layer norm over several axes", len(shape) != 1)
    y = fn.normalised(x, eps)
    y = y if weight is None else multiplied(y, weight, torch.mul)
    return y if bias is None else add(y, bias)


@rule("batch_norm")
def _batch_norm(
    x: Enclosure,
    weight: Enclosure | None,
    bias: Enclosure | None,
    mean: Enclosure | None,
    variance: Enclosure | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = False,
) -> Enclosure:
    if training or mean is None or variance is None:
        raise NoRule("batch norm takes its statistics from the batch")
    parameters = [p for p in (weight, bias, mean, variance) if p is not None]
    _refuse("batch norm whose parameters depend on the input", not all(p.exact for p in parameters))
    scale = fn.smooth(fn.square_root(Enclosure(variance.center + eps)), fn.RECIPROCAL)
    scale = scale if weight is None else multiplied(scale, weight, torch.mul)
    shape = [1, -1] + [1] * (x.center.dim() - 2)
    wide = [moved(p, lambda t: t.reshape(shape)) for p in (mean, scale)]
    y = multiplied(add(x, wide[0], -1.0), wide[1], torch.mul)
    return _biased(y, bias, 1)


__all__ = ["RULES", "NoRule", "Unbounded", "enclose", "operator_name"]
