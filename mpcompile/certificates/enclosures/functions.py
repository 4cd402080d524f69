"""Nonlinear functions of enclosures: activations, normalisation, softmax, attention.

Each function takes, for every element, the tighter of two enclosures: its expansion around the center, which keeps the
slope, and its range over the box. Values of exp, erf and similar functions may be off by ``_ULPS`` units in the last
place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcompile.certificates.enclosures.enclosure import (
    EPS,
    Enclosure,
    Map,
    add,
    boxed,
    chosen,
    moved,
    multiplied,
    scaled,
    shifted,
    summed,
    widened,
)

_ULPS = 32


class Unbounded(Exception):
    """No bound exists on this enclosure; the message says why."""


Bound = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Smooth:
    """A smooth function f of one number, with bounds on its derivatives and its errors.

    Attributes:
        value: f.
        derivative: f'.
        slope: largest \\|f'\\| between two bounds.
        curvature: largest \\|f''\\| between two bounds.
        lowest: position and value (rounded down) of the only minimum of a function that falls before it and rises after
            it; None for a monotone function.
        scale: values are off by less than ``_ULPS`` units in the last place of the value or of this multiple of the
            argument (x times a small number has the error of x).
        cancels: derivatives are off by less than ``_ULPS`` units in the last place of their magnitude plus this number.
    """

    value: Map
    derivative: Map
    slope: Bound
    curvature: Bound
    lowest: tuple[float, float] | None = None
    scale: float = 0.0
    cancels: float = 1.0


def _constant(number: float) -> Bound:
    return lambda low, high: torch.full_like(low, number)


def _gelu_derivative(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)


def _tanh_gelu_derivative(x: Tensor) -> Tensor:
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x)


# Largest slopes and curvatures, rounded up; tests/certificates/test_enclosures.py checks them on samples.
GELU = Smooth(
    F.gelu, _gelu_derivative, _constant(1.1290), _constant(0.7980), (-0.7517915246935, -0.16997120747991), 1.0
)
TANH_GELU = Smooth(
    lambda x: F.gelu(x, approximate="tanh"),
    _tanh_gelu_derivative,
    _constant(1.1291),
    _constant(0.7985),
    (-0.7524614220710, -0.17004075057126),
    1.0,
)
SILU = Smooth(F.silu, _silu_derivative, _constant(1.0999), _constant(0.5001), (-1.278464542761, -0.27846454276108), 1.0)
TANH = Smooth(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, _constant(1.0), _constant(0.7699))
SIGMOID = Smooth(
    torch.sigmoid, lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x)), _constant(0.25), _constant(0.09623)
)
EXP = Smooth(
    torch.exp,
    torch.exp,
    lambda low, high: high.exp() * (1 + 1024 * EPS),
    lambda low, high: high.exp() * 1.01,
    cancels=0.0,
)
SQRT = Smooth(
    torch.sqrt,
    lambda x: 0.5 / x.sqrt(),
    lambda low, high: 0.5 / low.sqrt() * (1 + 64 * EPS),
    lambda low, high: 0.2501 * low**-1.5,
    cancels=0.0,
)
RECIPROCAL = Smooth(
    torch.reciprocal,
    lambda x: -1 / x**2,
    lambda low, high: 1 / low**2 * (1 + 64 * EPS),
    lambda low, high: 2.0001 / low**3,
    cancels=0.0,
)


def smooth(x: Enclosure, f: Smooth) -> Enclosure:
    """f(x): f(c) + f'(c) (x - c) with a remainder of at most max \\|f''\\| (x - c)**2 / 2, or the range of f.

    Source: the mean value form of interval analysis (Moore, Kearfott and Cloud, Introduction to Interval Analysis,
    2009, chapter 6).
    """
    center = f.value(x.center)
    error = _ULPS * EPS * (center.abs() + f.scale * x.center.abs())
    if x.exact:
        return Enclosure(center, None, widened(error, center))
    low, high = x.bounds
    reach = x.reach
    rate = f.derivative(x.center)
    rounding = _ULPS * EPS * (rate.abs() + f.cancels)
    curvature = f.curvature(low, high)
    slope = None if x.slope is None else rate * x.slope
    radius = (rate.abs() + rounding) * x.spread + rounding * reach + 0.5 * curvature * reach.square() + error
    bound = torch.minimum(f.slope(low, high), rate.abs() + rounding + curvature * reach * (1 + 8 * EPS))
    tangents = tuple(bound * t * (1 + 8 * EPS) for t in x.tangents)
    sizes = [center, reach * rate.abs()]
    return chosen(Enclosure(center, slope, widened(radius, *sizes), tangents), _range(low, high, f))


def _range(low: Tensor, high: Tensor, f: Smooth) -> Enclosure:
    """The range of f between two bounds."""
    ends = [f.value(low), f.value(high)]
    bottom, top = torch.minimum(*ends), torch.maximum(*ends)
    if f.lowest is not None:
        place, value = f.lowest
        inside = (low <= place + 1e-6) & (high >= place - 1e-6)
        bottom = torch.where(inside, torch.full_like(bottom, value), bottom)
    sizes = f.scale * torch.maximum(low.abs(), high.abs())
    result = boxed(bottom, top)
    return replace(result, radius=widened(result.spread, _ULPS * bottom, _ULPS * top, _ULPS * sizes))


def relu(x: Enclosure) -> Enclosure:
    """max(x, 0): exact where the sign is fixed, elsewhere a line of slope high / (high - low) or the box [0, high].

    Source of the line: Singh et al., Fast and effective robustness certification, NeurIPS 2018 (DeepZ).
    """
    if x.exact:
        return Enclosure(x.center.relu())
    low, high = x.bounds
    on, off = low >= 0, high <= 0
    share = (high / (high - low)).nan_to_num(0.0).clamp(0, 1)
    # relu(t) - share * t lies in [0, max(-share * low, (1 - share) * high)] for any share in [0, 1]
    gap = torch.maximum(-share * low, (1 - share) * high).clamp(min=0) * (1 + 8 * EPS)
    share = torch.where(on, 1.0, torch.where(off, 0.0, share))
    gap = torch.where(on | off, 0.0, gap)
    slope = None if x.slope is None else share * x.slope
    center = share * x.center + 0.5 * gap
    radius = widened(share * x.spread + 0.5 * gap, share * x.magnitude)
    radius = torch.where(on, x.spread, torch.where(off, 0.0, radius))
    active = (~off).to(x.center)
    line = Enclosure(center, slope, radius, tuple(t * active for t in x.tangents))
    return chosen(line, boxed(torch.zeros_like(high), high.clamp(min=0)))


def clamped(x: Enclosure, low: float, high: float) -> Enclosure:
    """clamp(x, low, high) = low + relu(x - low) - relu(x - high)."""
    both = add(relu(shifted(x, -low)), relu(shifted(x, -high)), -1.0)
    inside = replace(both, tangents=x.tangents)  # slopes are 0 or 1
    return shifted(inside, low)


def leaky(x: Enclosure, slope: float) -> Enclosure:
    """x where positive, slope * x where negative, for 0 <= slope <= 1."""
    both = add(scaled(x, slope), scaled(relu(x), 1 - slope))
    return replace(both, tangents=x.tangents)


def reciprocal(x: Enclosure) -> Enclosure:
    """1 / x for positive x.

    Raises:
        Unbounded: x may be 0 or negative.
    """
    if not bool((x.bounds[0] > 0).all()):
        raise Unbounded("a divisor may be 0 on the segment")
    return smooth(x, RECIPROCAL)


def square_root(x: Enclosure) -> Enclosure:
    """sqrt(x) for positive x.

    Raises:
        Unbounded: x may be 0 or negative.
    """
    if not bool((x.bounds[0] > 0).all()):
        raise Unbounded("the argument of a square root may be 0 on the segment")
    return smooth(x, SQRT)


def vector_norm(x: Enclosure, axes: list[int], keepdim: bool) -> Enclosure:
    """Euclidean norm over axes: the norm of the center, give or take the norm of the deviations."""
    terms = math.prod(x.center.shape[a] for a in axes)
    grow = 1 + (terms + 8) * EPS

    def norm(t: Tensor) -> Tensor:
        return torch.linalg.vector_norm(t, dim=axes, keepdim=keepdim)

    center = norm(x.center)
    radius = norm(x.reach) * grow
    # |d norm| <= sum_i |x_i| v_i / norm <= norm(v)
    return Enclosure(center, None, widened(radius, center, terms=terms), tuple(norm(t) * grow for t in x.tangents))


def normalised(x: Enclosure, eps: float) -> Enclosure:
    """(x - mean) / sqrt(variance + eps) over the last axis, without weights.

    Let P be the projection onto mean 0, d the length of the axis, and s = sqrt(\\|P x\\|**2 / d + eps). The Jacobian of
    y = P x / s is (P - y y' / d) / s. The deviation of \\|P x\\| on the enclosure is at most that of x in the Euclidean
    norm, which bounds s from both sides; the rest follows from the mean value form.

    Raises:
        Unbounded: every row may be constant, so that there is no useful bound on 1 / s.
    """
    size = x.center.shape[-1]
    grow = 1 + (size + 32) * EPS

    def mean(t: Tensor) -> Tensor:
        return t.mean(-1, keepdim=True)

    def project(t: Tensor) -> Tensor:  # |P| t for t >= 0
        return ((1 - 2 / size) * t + mean(t)) * grow if size > 1 else torch.zeros_like(t)

    noise = (size + 8) * EPS * (x.center.abs() + mean(x.center.abs()))
    flat = x.center - mean(x.center)
    sloped = None if x.slope is None else x.slope - mean(x.slope)
    spread = x.spread + noise
    if x.slope is not None:
        spread = spread + (size + 8) * EPS * (x.slope.abs() + mean(x.slope.abs()))
    reach = spread if sloped is None else spread + sloped.abs()  # |P (x - c)| is within project(spread) + |sloped|
    deviation = project(spread) if sloped is None else project(spread) + sloped.abs()
    norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True) / math.sqrt(size)
    away = torch.linalg.vector_norm(reach, dim=-1, keepdim=True) / math.sqrt(size) * grow
    narrow = (norm * (1 - (size + 32) * EPS) - away).clamp(min=0)
    if not x.exact and bool((narrow <= 0).all()):
        raise Unbounded("every token may be constant on the segment, where layer norm has no useful bound")
    wide = (norm + away) * grow
    small, middle, large = ((t.square() + eps).sqrt() for t in (narrow, norm, wide))
    small, large = small / grow, large * grow
    center = flat / middle
    rounding = grow - 1

    # the range: y - y(c) = P (x - c) / s + P c (1 / s - 1 / s(c))
    change = torch.maximum(1 / small - 1 / middle, 1 / middle - 1 / large) * grow + rounding / small
    by_range = (deviation / small + flat.abs() * change) * grow
    edge = torch.full_like(center, math.sqrt(size))
    largest = torch.minimum(center.abs() + by_range, edge)
    box = boxed(-largest, largest)
    plain = Enclosure(center, None, widened(by_range, center))
    tangents = tuple((project(t) + largest * mean(largest * t)) / small * grow for t in x.tangents)
    if x.exact:
        return Enclosure(center, None, widened(by_range, center))

    # the expansion: J(y) = P / s - u u' / d with u = P x / s**1.5
    u = flat * middle**-1.5
    swing = torch.maximum(small**-1.5 - middle**-1.5, middle**-1.5 - large**-1.5) * grow + rounding * small**-1.5
    du = (deviation * small**-1.5 + flat.abs() * swing) * grow
    slope = None
    if sloped is not None:
        slope = sloped / middle - center * mean(center * sloped) / middle
    first = (project(spread) + center.abs() * mean(center.abs() * spread)) / middle
    rest = change * deviation + du * mean((u.abs() + du) * reach) + u.abs() * mean(du * reach)
    sizes = [center] if slope is None else [center, slope, center.abs() * mean(center.abs() * reach) / middle]
    radius = widened((first + rest) * grow * grow, *sizes, terms=size)
    return replace(chosen(chosen(Enclosure(center, slope, radius), plain), box), tangents=tangents)


def softmax(x: Enclosure, axis: int) -> Enclosure:
    """Softmax over an axis: each probability is between its values at opposite bounds of its own and the other logits.

    The expansion around the center keeps the slope where that is tighter.
    """
    size = x.center.shape[axis]
    # 800: the rounding error of a difference of logits becomes a relative error of its exp; beyond 750 exp underflows.
    rounding = (size + _ULPS + 800) * EPS
    p = x.center.softmax(axis)
    if x.exact:
        return Enclosure(p, None, widened(2 * rounding * p, p))

    def total(t: Tensor) -> Tensor:
        return t.sum(axis, keepdim=True)

    low, high = x.bounds
    top = high.amax(axis, keepdim=True)
    low, high = (low - top).exp(), (high - top).exp()
    others = ((total(high) - high).clamp(min=0) + rounding * total(high)) * (1 + rounding)
    fewer = ((total(low) - low) * (1 - rounding) - rounding * total(low)).clamp(min=0)
    least = (low / (low + others) * (1 - 2 * rounding)).nan_to_num(0.0).clamp(min=0)
    most = (high / (high + fewer) * (1 + 2 * rounding)).nan_to_num(1.0, posinf=1.0).clamp(max=1)
    box = boxed(least, most)
    tangents = tuple(
        (most * (1 - least) * t + most * (total(most * t) - most * t)) * (1 + 2 * rounding) for t in x.tangents
    )
    reach = x.reach
    change = torch.maximum(most - p, p - least).clamp(min=0) + rounding * p
    slope = None if x.slope is None else p * (x.slope - total(p * x.slope))
    first = p * (total(p * x.spread) + (1 - 2 * p) * x.spread)
    rest = change * reach + change * total(most * reach) + p * total(change * reach)
    sizes = [p]
    if x.slope is not None:
        sizes.append(p * (x.slope.abs() + total(p * x.slope.abs())))
    radius = widened((first.clamp(min=0) + rest) * (1 + 2 * rounding), *sizes, terms=size + _ULPS)
    return replace(chosen(Enclosure(p, slope, radius), box), tangents=tangents)


def attention(q: Enclosure, k: Enclosure, v: Enclosure, scale: float) -> Enclosure:
    """softmax(q k' scale) v over the last two axes.

    Every row of probabilities sums to 1, so v is centered first: only differences between tokens matter.
    """
    scores = multiplied(scaled(q, scale), moved(k, lambda t: t.transpose(-1, -2)), torch.matmul, q.center.shape[-1])
    middle = v.center.mean(-2, keepdim=True)
    centered = add(v, Enclosure(middle), -1.0)
    mixed = multiplied(softmax(scores, -1), centered, torch.matmul, v.center.shape[-2])
    return add(mixed, Enclosure(middle))


def mean_over(x: Enclosure, axes: list[int], keepdim: bool, average: bool = True) -> Enclosure:
    """Mean over axes; the sum if not ``average``."""
    terms = math.prod(x.center.shape[a] for a in axes)
    return summed(x, lambda t: t.mean(axes, keepdim) if average else t.sum(axes, keepdim), terms)


def max_pooled(x: Enclosure, pool: Map) -> Enclosure:
    """Maximum over windows: between the maxima of the lower and of the upper bounds."""
    if x.exact:
        return Enclosure(pool(x.center))
    low, high = x.bounds
    return boxed(pool(low), pool(high), tuple(pool(t) for t in x.tangents))
