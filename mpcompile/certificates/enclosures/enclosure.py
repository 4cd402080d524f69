"""Enclosures: sets of tensors that contain every value of a network on a segment, rounded outward.

A value is represented as ``center + slope * e + d`` with one ``e`` in [-1, 1] for the whole segment and an independent
``d`` in [-radius, radius] for every element. Movement along the segment is in ``slope``, whose signs are preserved by
linear layers; the losses of nonlinear functions and rounding go into ``radius``. Without slopes this is plain interval
arithmetic; the slope makes it a zonotope with one generator.

All arithmetic is float64. Every rule adds the error of its own floating-point operations to the radius: a sum of n
products in any order errs by at most (n + 1) u / (1 - (n + 1) u) times the sum of their magnitudes, u = 2**-53
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). ``EPS`` is 2 u, which leaves a factor of 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 2.0**-52
_TINY = 1e-290  # covers underflow

Map = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Enclosure:
    """The set of all tensors ``center + slope * e + d`` with \\|e\\| <= 1 and \\|d\\| <= radius.

    Attributes:
        center: float64.
        slope: a tensor of the same shape, or None for zero.
        radius: a tensor of the same shape, not negative, or None for zero.
        tangents: for each of several vectors v >= 0 at the replaced layer, a bound on \\|J\\| v anywhere on the
            segment, where J is the Jacobian of this value with respect to that layer's value. Empty if it is constant.

    Example:
        >>> Enclosure(torch.ones(1, dtype=torch.float64)).reach.item()
        0.0
    """

    center: Tensor
    slope: Tensor | None = None
    radius: Tensor | None = None
    tangents: tuple[Tensor, ...] = ()

    @property
    def exact(self) -> bool:
        """True if the set is a single tensor."""
        return self.slope is None and self.radius is None

    @property
    def spread(self) -> Tensor:
        """The radius as a tensor, zeros if it is None."""
        return torch.zeros_like(self.center) if self.radius is None else self.radius

    @property
    def reach(self) -> Tensor:
        """The largest distance from the center, rounded up."""
        if self.slope is None:
            return self.spread
        return (self.slope.abs() + self.spread) * (1 + 2 * EPS)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds, rounded outward."""
        reach = widened(self.reach, self.center)
        return self.center - reach, self.center + reach

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value of each element."""
        if self.exact:
            return self.center.abs()
        return (self.center.abs() + self.reach) * (1 + 2 * EPS)


def widened(radius: Tensor, *magnitudes: Tensor, terms: int = 1) -> Tensor:
    """A radius widened by the rounding errors of ``terms`` operations on values of these magnitudes."""
    result = radius * (1 + 8 * EPS) + _TINY
    for magnitude in magnitudes:
        result = result + (terms + 3) * EPS * magnitude.abs()
    return result


def moved(x: Enclosure, view: Map) -> Enclosure:
    """Apply a map that only moves elements (reshape, transpose, slice, pad with zeros)."""
    return Enclosure(
        view(x.center),
        None if x.slope is None else view(x.slope),
        None if x.radius is None else view(x.radius),
        tuple(view(t) for t in x.tangents),
    )


def joined(parts: list[Enclosure], join: Callable[[list[Tensor]], Tensor]) -> Enclosure:
    """Concatenate or stack several enclosures."""
    count = max(len(p.tangents) for p in parts)
    zeros = [torch.zeros_like(p.center) for p in parts]
    slopes = [zero if p.slope is None else p.slope for p, zero in zip(parts, zeros, strict=True)]
    radii = [zero if p.radius is None else p.radius for p, zero in zip(parts, zeros, strict=True)]
    return Enclosure(
        join([p.center for p in parts]),
        None if all(p.slope is None for p in parts) else join(slopes),
        None if all(p.radius is None for p in parts) else join(radii),
        tuple(
            join([p.tangents[i] if p.tangents else z for p, z in zip(parts, zeros, strict=True)]) for i in range(count)
        ),
    )


def summed(x: Enclosure, total: Map, terms: int) -> Enclosure:
    """Apply a linear map that adds up to ``terms`` values with coefficients in [0, 1] (sum, mean, average pooling)."""
    center = total(x.center)
    slope = None if x.slope is None else total(x.slope)
    sizes = x.center.abs() if x.slope is None else x.center.abs() + x.slope.abs()
    radius = total(x.spread + (terms + 4) * EPS * sizes) * (1 + (terms + 4) * EPS) + _TINY
    return Enclosure(center, slope, radius, tuple(total(t) * (1 + (terms + 4) * EPS) for t in x.tangents))


def add(a: Enclosure, b: Enclosure, sign: float = 1.0) -> Enclosure:
    """a + sign * b."""
    center = a.center + sign * b.center
    slope = a.slope
    if b.slope is not None:
        slope = sign * b.slope if slope is None else slope + sign * b.slope
    if slope is not None:
        slope = slope.expand_as(center)
    magnitudes = [center] if slope is None else [center, slope]
    scale = abs(sign)
    radius = widened((a.spread + scale * b.spread).expand_as(center), *magnitudes)
    if sign not in (1.0, -1.0):
        radius = widened(radius, scale * b.magnitude.expand_as(center))
    tangents = _added(a.tangents, tuple(scale * t for t in b.tangents), center)
    return Enclosure(center, slope, radius, tangents)


def _added(a: tuple[Tensor, ...], b: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Sums of tangents; either side may have none."""
    if not a or not b:
        return tuple(t.expand_as(like) for t in a or b)
    return tuple((s + t).expand_as(like) * (1 + 2 * EPS) for s, t in zip(a, b, strict=True))


def multiplied(a: Enclosure, b: Enclosure, product: Product, terms: int = 1) -> Enclosure:
    """Apply a bilinear product that sums ``terms`` products for each value (mul, linear, convolution, matmul).

    The product of the two slopes has the factor e**2 in [0, 1]; all of it goes into the radius.
    """
    grow = 1 + (terms + 4) * EPS
    rounding = (terms + 4) * EPS
    center = product(a.center, b.center)
    slope = None if a.slope is None else product(a.slope, b.center)
    if b.slope is not None:
        other = product(a.center, b.slope)
        slope = other if slope is None else slope + other
    sizes = a.center.abs() if a.slope is None else a.center.abs() + a.slope.abs()
    others = b.center.abs()
    if b.exact:  # one product covers both the uncertainty of a and the rounding of the rest
        radius = product(a.spread + rounding * sizes, others)
    elif a.exact:
        radius = product(sizes, b.spread + rounding * (others if b.slope is None else others + b.slope.abs()))
    else:
        radius = product(a.spread + rounding * sizes, b.magnitude) + product(sizes, b.spread)
        radius = radius + rounding * product(sizes, b.magnitude)
        if a.slope is not None and b.slope is not None:
            radius = radius + product(a.slope.abs(), b.slope.abs())
    tangents = _added(
        tuple(product(t, b.magnitude) * grow for t in a.tangents),
        tuple(product(a.magnitude, t) * grow for t in b.tangents),
        center,
    )
    return Enclosure(center, slope, radius * grow * (1 + 8 * EPS) + _TINY, tangents)


def scaled(x: Enclosure, factor: Tensor | float) -> Enclosure:
    """x times an exact number or tensor."""
    if isinstance(factor, Tensor):
        return multiplied(x, Enclosure(factor), torch.mul)
    center, slope = x.center * factor, None if x.slope is None else x.slope * factor
    magnitudes = [center] if slope is None else [center, slope]
    size = abs(factor)
    tangents = tuple(t * size * (1 + 2 * EPS) for t in x.tangents)
    return Enclosure(center, slope, widened(x.spread * size, *magnitudes), tangents)


def shifted(x: Enclosure, number: float) -> Enclosure:
    """x + number."""
    return Enclosure(x.center + number, x.slope, widened(x.spread, x.center + number), x.tangents)


def boxed(low: Tensor, high: Tensor, tangents: tuple[Tensor, ...] = ()) -> Enclosure:
    """All tensors between two bounds."""
    center = 0.5 * low + 0.5 * high
    radius = widened(torch.maximum(high - center, center - low), low, high)
    return Enclosure(center, None, radius, tangents)


def chosen(a: Enclosure, b: Enclosure) -> Enclosure:
    """For every element, the one of two enclosures of the same value that has the smaller radius. Tangents are a's."""
    first = a.spread <= b.spread
    slopes = [torch.zeros_like(a.center) if x.slope is None else x.slope for x in (a, b)]
    both = a.slope is None and b.slope is None
    slope = None if both else torch.where(first, slopes[0], slopes[1])
    center = torch.where(first, a.center, b.center)
    return Enclosure(center, slope, torch.where(first, a.spread, b.spread), a.tangents)
