"""Rules of nonlinear operators; see registry.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mpcompile.certificates.enclosures import functions as fn
from mpcompile.certificates.enclosures.enclosure import Enclosure, add, moved, multiplied, scaled, shifted
from mpcompile.certificates.enclosures.registry import RULES, NoRule, refuse, rule
from mpcompile.certificates.enclosures.rules_linear import biased, over_axes


@rule("max_pool2d")
def _max_pool(x: Enclosure, *args: Any, **kwargs: Any) -> Enclosure:
    return fn.max_pooled(x, lambda t: F.max_pool2d(t, *args, **kwargs))


@rule("relu")
def _relu(x: Enclosure) -> Enclosure:
    return fn.relu(x)


@rule("hardtanh", "clamp")
def _clamp(x: Enclosure, low: Any = -1.0, high: Any = 1.0) -> Enclosure:
    refuse("a clamp without two numbers", not all(isinstance(v, (int, float)) for v in (low, high)))
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
    refuse("a leaky ReLU that is not a contraction", not 0 <= slope <= 1)
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
    refuse(f"a norm of order {order}", order != 2)
    refuse("a norm that casts", kwargs.get("dtype") not in (None, torch.float64))
    return fn.vector_norm(x, over_axes(x, dim), keepdim)


@rule("softmax", "_softmax")
def _softmax(x: Enclosure, dim: int, dtype: Any = None) -> Enclosure:
    refuse(f"it casts to {dtype}", dtype not in (None, False, torch.float64))
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
    refuse("attention with a mask", mask is not None or causal or enable_gqa or bool(dropout))
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
    refuse("layer norm over several axes", len(shape) != 1)
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
    refuse("batch norm whose parameters depend on the input", not all(p.exact for p in parameters))
    scale = fn.smooth(fn.square_root(Enclosure(variance.center + eps)), fn.RECIPROCAL)
    scale = scale if weight is None else multiplied(scale, weight, torch.mul)
    shape = [1, -1] + [1] * (x.center.dim() - 2)
    wide = [moved(p, lambda t: t.reshape(shape)) for p in (mean, scale)]
    y = multiplied(add(x, wide[0], -1.0), wide[1], torch.mul)
    return biased(y, bias, 1)
