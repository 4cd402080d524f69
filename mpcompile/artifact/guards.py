"""Checks before operators that torch runs without validating all of their sizes or numbers.

A loaded graph calls a function of this module in place of such an operator; files still hold the operator's own name.
The checks are plain Python on sizes, so a tracer sees only the operator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import InputError

_A: Any = torch.ops.aten
_Check = Callable[[dict[str, Any]], "str | None"]


# --- Checks. Each takes an operator's arguments by name; returns None if valid, else what the operator expects ---


def _batch_norm(arguments: dict[str, Any]) -> str | None:
    x = arguments["input"]
    if x.dim() < 2:
        return "an input with channels"
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = arguments.get(name)
        if tensor is not None and tuple(tensor.shape) != (x.shape[1],):
            return f"{name} of {x.shape[1]} values, one per channel"
    statistics = arguments.get("running_mean") is None or arguments.get("running_var") is None
    return "running statistics" if statistics and not arguments.get("training", False) else None


def _attention(arguments: dict[str, Any]) -> str | None:
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    if not query.dim() == key.dim() == value.dim() == 4:
        return "queries, keys and values of 4 axes"
    same = key.shape[:3] == value.shape[:3] and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3]
    if not same or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return "keys and values that match the queries in batch size, heads (or a divisor of them) and head size"
    whole = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask is not None:
        pairs = list(zip(reversed(mask.shape), reversed(whole), strict=False))
        if mask.dim() not in (2, 4) or any(size not in (1, full) for size, full in pairs):
            return f"a mask that broadcasts to {whole}"
    return None


def _smooth_resize(arguments: dict[str, Any]) -> str | None:
    sizes = arguments.get("output_size")
    scales = arguments.get("scale_factors") or [arguments.get("scales_h"), arguments.get("scales_w")]
    spatial = arguments["input"].shape[2:]
    if len(spatial) != 2 or (sizes is not None and len(sizes) != 2) or len(scales) != 2:
        return "an image batch of 4 axes, and two sizes"
    for size, before, scale in zip(sizes or [None, None], spatial, scales, strict=True):
        if scale is None:
            continue
        if not math.isfinite(scale) or scale <= 0:
            return "positive, finite scales"
        if size is not None and not size - 1 <= math.floor(before * scale) <= size + 1:
            return "scales that give the output's size"
    return None


def _resize(arguments: dict[str, Any]) -> str | None:
    scales = [arguments.get(name) for name in ("scales", "scales_d", "scales_h", "scales_w")]
    for scale in (*scales, *(arguments.get("scale_factors") or ())):
        # A pixel's position, divided by the scale, becomes a 64-bit integer before it is clamped to the image.
        if scale is not None and not 2**-30 <= scale <= 2**30:
            return "scales from 2**-30 to 2**30"
    return None


def _folding(arguments: dict[str, Any]) -> str | None:
    for name in ("output_size", "kernel_size", "dilation", "padding", "stride"):
        value = arguments.get(name, 0)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if not 0 <= number < 2**31:
                return f"{name} from 0 to 2**31 - 1"
    return None


_UPSAMPLING = ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d")
_OVERLOADS: dict[_Check, tuple[Any, ...]] = {  # check -> the overloads that need it
    _batch_norm: (
        _A.native_batch_norm.default,
        _A._native_batch_norm_legit.default,
        _A._native_batch_norm_legit.no_stats,
        _A._native_batch_norm_legit_functional.default,
        _A._native_batch_norm_legit_no_training.default,
    ),
    _folding: (_A.im2col.default, _A.col2im.default),
    _attention: (
        _A._scaled_dot_product_flash_attention_for_cpu.default,
        _A._scaled_dot_product_flash_attention.default,
        _A._scaled_dot_product_efficient_attention.default,
    ),
    _resize: tuple(
        getattr(getattr(_A, f"upsample_{kind}"), overload) for kind in _UPSAMPLING for overload in ("default", "vec")
    ),
    _smooth_resize: (
        _A._upsample_bilinear2d_aa.default,
        _A._upsample_bilinear2d_aa.vec,
        _A._upsample_bicubic2d_aa.default,
        _A._upsample_bicubic2d_aa.vec,
    ),
}
_CHECKS: tuple[tuple[Any, Any, _Check], ...] = (  # the function in a graph, the overload whose schema it has, the check
    (torch.native_batch_norm, _A.native_batch_norm.default, _batch_norm),
    (torch.nn.functional.unfold, _A.im2col.default, _folding),
    (torch.nn.functional.fold, _A.col2im.default, _folding),
    *((overload, overload, check) for check, overloads in _OVERLOADS.items() for overload in overloads),
)


# --- The functions that a graph calls ---


def _checked(function: Callable[..., Any], overload: Any, check: _Check) -> Callable[..., Any]:
    """Return the function with a check of its arguments before it."""
    names = [argument.name.replace("self", "input") for argument in overload._schema.arguments]
    title = str(overload)

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if "self" in arguments:
            arguments["input"] = arguments.pop("self")
        expected = check(arguments)
        if expected is not None:
            shapes = [tuple(value.shape) for value in arguments.values() if isinstance(value, Tensor)]
            raise InputError(f"{title} cannot take these tensors", expected=expected, found=str(shapes)[:200])
        return function(*args, **kwargs)

    return call


def _is_integer(value: Any) -> bool:
    return not value.is_floating_point() and not value.is_complex() if isinstance(value, Tensor) else type(value) is int


def _quotient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a division whose rounding towards zero does not overflow for integers."""

    @functools.wraps(function, updated=())
    def call(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
        if rounding_mode != "trunc" or not (_is_integer(a) and _is_integer(b)):
            return function(a, b, rounding_mode=rounding_mode)
        # The lowest integer divided by -1 overflows: processors raise a signal (SIGFPE), while negation wraps around.
        if not isinstance(b, Tensor):
            return -a if b == -1 else function(a, b, rounding_mode=rounding_mode)
        quotient = function(a, torch.where(b == -1, torch.ones_like(b), b), rounding_mode=rounding_mode)
        negative = -torch.as_tensor(a, dtype=quotient.dtype, device=quotient.device)
        return torch.where(b == -1, negative, quotient)

    return call


def _dense(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its input made contiguous first: on the result of expand() torch reads past the end."""

    @functools.wraps(function, updated=())
    def call(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(input.contiguous(), *args, **kwargs)

    return call


def _published(function: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Give a guard a name in this module, by which generated source refers to it."""
    name = str(function).replace(".", "_") if isinstance(function, torch._ops.OpOverload) else function.__name__
    call.__name__ = call.__qualname__ = f"checked_{name}"
    call.__module__ = __name__
    globals()[call.__name__] = call
    return call


_DIVISIONS = (
    *(torch.div, torch.divide),
    *(_A.div.Tensor_mode, _A.div.Scalar_mode, _A.divide.Tensor_mode, _A.divide.Scalar_mode),
)
GUARDED: dict[Any, Callable[..., Any]] = {f: _published(f, _checked(f, o, c)) for f, o, c in _CHECKS}
GUARDED |= {f: _published(f, _dense(f)) for f in (torch.median, _A.median.dim)}
METHODS = {"median": GUARDED[torch.median]}  # a method of this name is replaced by the function
TRUNCATING: dict[Any, Callable[..., Any]] = {f: _published(f, _quotient(f)) for f in _DIVISIONS}
_ORIGINALS = {call: function for table in (GUARDED, TRUNCATING) for function, call in table.items()}


def original(target: Any) -> Any:
    """Return the operator that a function of this module replaces; anything else is returned unchanged."""
    try:
        return _ORIGINALS.get(target, target)
    except TypeError:  # not hashable
        return target
