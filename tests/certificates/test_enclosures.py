"""Rules of enclosures: they contain every value that the network can compute on a segment."""

import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import fx

from mpcompile.certificates.enclosures import functions as fn
from mpcompile.certificates.enclosures.enclosure import Enclosure, multiplied
from mpcompile.certificates.enclosures.rules import RULES, NoRule, enclose

aten = torch.ops.aten


def segment(shape, seed, slope=0.3, radius=0.05, shift=0.0):
    """An enclosure whose tangents equal its extent: no member is further than one tangent from the center."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(shape, generator=generator, dtype=torch.float64) + shift
    direction = slope * torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = radius * torch.rand(shape, generator=generator, dtype=torch.float64)
    return Enclosure(center, direction, spread, (direction.abs() + spread, 2 * (direction.abs() + spread)))


def members(x, seed, count=16):
    """Tensors inside an enclosure, including corners."""
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        e = torch.empty(1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
        d = torch.empty_like(x.center).uniform_(-1, 1, generator=generator)
        if index % 2:
            e, d = e.sign(), d.sign()
        slope = 0 if x.slope is None else x.slope
        yield float(e), x.center + slope * e + x.spread * d


def inside(y, e, value, slack=1e-12):
    """Check that a value is within the radius at its e, so that the slope must be right, too."""
    slope = 0 if y.slope is None else y.slope
    assert bool(((value - y.center - slope * e).abs() <= y.spread + slack).all())


WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
KERNEL = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
BIAS = torch.randn(8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

UNARY = {
    "relu": ((3, 8), F.relu, ()),
    "gelu": ((3, 8), F.gelu, ()),
    "tanh gelu": ((3, 8), lambda x: F.gelu(x, approximate="tanh"), ()),
    "silu": ((3, 8), F.silu, ()),
    "tanh": ((3, 8), torch.tanh, ()),
    "sigmoid": ((3, 8), torch.sigmoid, ()),
    "exp": ((3, 8), torch.exp, ()),
    "leaky_relu": ((3, 8), F.leaky_relu, ()),
    "relu6": ((3, 8), F.relu6, ()),
    "hardswish": ((3, 8), F.hardswish, ()),
    "hardsigmoid": ((3, 8), F.hardsigmoid, ()),
    "softmax": ((3, 8), lambda x: x.softmax(-1), (-1,)),
    "layer_norm": ((3, 8), lambda x: F.layer_norm(x, (8,), eps=1e-5), ([8],)),
    "linalg_vector_norm": ((3, 8), lambda x: torch.linalg.vector_norm(x, dim=-1), (2, [-1])),
    "mean": ((3, 8), lambda x: x.mean(-1), ([-1],)),
    "sum": ((3, 8), lambda x: x.sum(-1), ([-1],)),
    "square": ((3, 8), torch.square, ()),
    "pow": ((3, 8), lambda x: x**3, (3,)),
    "max_pool2d": ((2, 3, 6, 6), lambda x: F.max_pool2d(x, 2), ([2, 2],)),
    "avg_pool2d": ((2, 3, 6, 6), lambda x: F.avg_pool2d(x, 3, 1), ([3, 3], [1, 1])),
    "adaptive_avg_pool2d": ((2, 3, 6, 6), lambda x: F.adaptive_avg_pool2d(x, 4), ([4, 4],)),
    "pad": ((2, 3, 6, 6), lambda x: F.pad(x, (1, 1)), ([1, 1],)),
    "linear": ((3, 8), lambda x: F.linear(x, WEIGHT), (Enclosure(WEIGHT),)),
    "conv2d": ((2, 3, 6, 6), lambda x: F.conv2d(x, KERNEL, None, 2, 1), (Enclosure(KERNEL), None, [2, 2], [1, 1])),
    "mul": ((3, 8), lambda x: x * BIAS, (Enclosure(BIAS),)),
    "add": ((3, 8), lambda x: x + BIAS, (Enclosure(BIAS),)),
    "div": ((3, 8), lambda x: x / -3.0, (-3.0,)),
    "rsub": ((3, 8), lambda x: 2 - x, (2.0,)),
}


@pytest.mark.parametrize("name", UNARY)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000), size=st.sampled_from([1e-6, 0.02, 0.3, 2.0]), radius=st.sampled_from([0.0, 0.05, 1.0])
)
def test_every_member_stays_inside(name, seed, size, radius):
    shape, function, arguments = UNARY[name]
    x = segment(shape, seed, size, size * radius)
    keywords = {"approximate": "tanh"} if name == "tanh gelu" else {}
    try:
        y = RULES[name.removeprefix("tanh ")](x, *arguments, **keywords)
    except fn.Unbounded:
        assume(size < 1 and radius < 1)  # layer norm may be unbounded on wide segments, and only there
        raise
    origin = function(x.center)
    for e, value in members(x, seed):
        result = function(value)
        inside(y, e, result)
        if y.tangents:  # no further from the center than |J| times the movement of the argument
            assert bool(((result - origin).abs() <= y.tangents[0] + 1e-12).all())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-6, 0.05, 0.5]))
def test_attention_and_products_of_moving_values(seed, size):
    q, k, v = (segment((2, 5, 4), seed + i, size, size * 0.1) for i in range(3))
    attended = RULES["scaled_dot_product_attention"](q, k, v)
    product = multiplied(q, k, torch.mul)
    draws = zip(*(list(members(t, seed)) for t in (q, k, v)), strict=True)
    for (e, a), (_, b), (_, c) in draws:  # one seed: the same e for all three
        inside(attended, e, F.scaled_dot_product_attention(a, b, c))
        inside(product, e, a * b)


@pytest.mark.parametrize("function", [fn.GELU, fn.TANH_GELU, fn.SILU, fn.TANH, fn.SIGMOID])
def test_slopes_and_curvatures_are_upper_bounds(function):
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    rate, step = function.derivative(x), 24 / 200_000
    assert float(rate.abs().max()) <= float(function.slope(x[:1], x[:1]))
    assert float((rate[1:] - rate[:-1]).abs().max()) / step <= float(function.curvature(x[:1], x[:1]))
    difference = (function.value(x[2:]) - function.value(x[:-2])) / (2 * step)
    assert torch.allclose(difference, rate[1:-1], atol=1e-7)
    if function.lowest is not None:
        assert float(function.value(x).min()) >= function.lowest[1]


def test_rounding_of_a_long_sum_is_covered():
    """Float64 against exact rational sums: the radius must contain the error that is left after cancellation."""
    from fractions import Fraction

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 500, generator=generator, dtype=torch.float64) * 1e8
    weight = torch.randn(3, 500, generator=generator, dtype=torch.float64)
    y = RULES["linear"](Enclosure(x), Enclosure(weight))
    for row in range(3):
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(x[0].tolist(), weight[row].tolist(), strict=True))
        error = abs(exact - Fraction(float(y.center[0, row])))
        assert 0 < error <= Fraction(float(y.spread[0, row])) < Fraction(1, 100)


def test_operators_without_a_rule_are_refused():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.topk.default, (x, 2))
    value = segment((3, 8), 0)
    with pytest.raises(NoRule, match="topk: which tokens it picks depends on values"):
        enclose(node, (value, 2), {})
    with pytest.raises(NoRule, match="dropout is random"):
        RULES["dropout"](value, 0.5, True)
    with pytest.raises(NoRule, match=r"casts to torch\.float32"):
        RULES["_to_copy"](value, dtype=torch.float32)
    with pytest.raises(fn.Unbounded, match="divisor may be 0"):
        fn.reciprocal(value)
    assert RULES["getitem"]((value, value), 1) is value and operator.getitem.__name__ in RULES
