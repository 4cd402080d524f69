"""The CPU kernels against float64 on every instruction set that this processor has, and their layouts."""

import functools
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpcompile.errors import InputError
from mpcompile.kernels import ops
from mpcompile.kernels.cpu import build
from mpcompile.kernels.nm_format import Pattern
from mpcompile.kernels.nm_linear import layouts, packed
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.nm_linear.layouts import OCTS, QUADS, RING, ROWS
from mpcompile.kernels.nm_linear.panels import PANELS
from tests.support.helpers import relative
from tests.support.packed_layers import layer, usable

ISAS = build._processor_isas()
SIZES = (1, 7, 16, 63, 64, 65, 197)
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
EXAMPLES = int(os.environ.get("MPCOMPILE_TEST_EXAMPLES", "60"))
MANY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Each instruction set in turn, as if the processor had no wider one."""
    loaded = build.load(request.param, os.environ.get("MPCOMPILE_SANITIZE") == "1")
    monkeypatch.setattr(native, "kernels", lambda: loaded)
    native.use(loaded)
    yield request.param
    monkeypatch.undo()
    native.use(native.kernels())


@st.composite
def problems(draw):
    m = draw(st.integers(1, 32))
    n = draw(st.integers(1, m))
    k = m * draw(st.integers(1, max(1, 200 // m)))
    if draw(st.booleans()):
        n, m = draw(st.sampled_from([(2, 4), (1, 4), (8, 16), (12, 16), (6, 12)]))
        k = m * draw(st.integers(1, 20))
    return {
        "n": n,
        "m": m,
        "k": k,
        "out": draw(st.sampled_from(SIZES)),
        "tokens": draw(st.sampled_from(SIZES)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16])),
        "activation": draw(st.sampled_from(packed.EPILOGUES)),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "threads": draw(st.sampled_from([1, 2, 3])),
        "seed": draw(st.integers(0, 1 << 20)),
    }


def inputs(p, features, *, name="x"):
    generator = torch.Generator().manual_seed(p["seed"] + len(name))
    x = torch.randn(p["tokens"], features, generator=generator).to(p["dtype"])
    return x.T.contiguous().T if p["strided"] else x


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def size(x, weight, *others):
    """RMS of x times weight if nothing cancelled; rounding errors are relative to it."""
    parts = [x.double().square() @ weight.double().square().T, *(o.double().square() for o in others if o is not None)]
    return sum(part.mean() for part in parts) ** 0.5


def rms(error):
    return error.square().mean() ** 0.5


def luck(terms, outputs):
    """Four standard deviations of the error of fp32 sums of ``terms`` terms, averaged over ``outputs`` outputs.

    A single sum can be exact to the last bit in one order of addition and not in another: the errors of two
    products compare only over many outputs.
    """
    return 4 * 2**-24 * (1 + terms / 6) ** 0.5 / outputs**0.5


def drift(x, weight):
    """The RMS error to expect of fp32 sums from left to right, and four standard deviations more.

    Computed from the partial sums: large ones are rounded more coarsely.
    """
    weight = weight.double()
    sums = (x.double()[:, None] * weight).cumsum(-1)
    errors = (sums.square() * (weight != 0)).sum(-1) / 3
    return 2**-24 * errors.mean() ** 0.5 * (1 + 4 / (2 * errors.numel()) ** 0.5)


@MANY
@given(p=problems())
def test_gemm(isa, p):
    torch.set_num_threads(p["threads"])
    n, m, out, dtype = p["n"], p["m"], p["out"], p["dtype"]
    weight, mask = layer((out, p["k"]), n, m, dtype, p["seed"])
    x = inputs(p, p["k"])
    bias = inputs({**p, "tokens": 1}, out, name="bias")[0] if p["bias"] else None
    residual = inputs(p, out, name="residual") if p["residual"] else None
    exact = F.linear(x.double(), (weight * mask).double(), None if bias is None else bias.double())
    exact = packed.finish(exact, None if residual is None else residual.double(), p["activation"])
    dense = packed.finish(F.linear(x, weight * mask, bias), residual, p["activation"])
    for layout in usable(dtype, n, m):
        values, index = layouts.pack(weight, mask, n, m, layout)
        assert torch.equal(layouts.unpack(values, index, weight.shape, n, m, layout), weight * mask)
        y = ops.nm_gemm(x, values, index, bias, residual, out, n, m, layout, p["activation"])
        assert y.dtype is dtype
        error, scale = rms(y - exact), size(x, weight * mask, bias, residual)
        # The error of a single fp32 sum exceeds TOLERANCE in 1 of 300 draws, in which its partial sums are large.
        predicted = drift(x, weight * mask) if dtype is torch.float32 else 0.0
        assert error < max(TOLERANCE[dtype] * scale, predicted)
        if dtype is torch.float32:
            allowed = max(4 * rms(dense - exact), 2e-7 * scale, luck(p["k"] * n / m, y.numel()) * scale)
            assert error < max(allowed, predicted)


@MANY
@given(p=problems(), hidden=st.sampled_from([1, 2, 3, 4, 33]))
def test_mlp(isa, p, hidden):
    torch.set_num_threads(p["threads"])
    middle = p["activation"].removeprefix(packed.AFTER_RESIDUAL)
    n, m, out, dtype = p["n"], p["m"], p["out"], p["dtype"]
    hidden = hidden * m
    one, mask1 = layer((hidden, p["k"]), n, m, dtype, p["seed"])
    two, mask2 = layer((out, hidden), n, m, dtype, p["seed"] + 1)
    x = inputs(p, p["k"])
    bias1, bias2 = torch.randn(hidden).to(dtype), torch.randn(out).to(dtype) if p["bias"] else None
    residual = inputs(p, out, name="residual") if p["residual"] else None
    h = packed.activate(F.linear(x.double(), (one * mask1).double(), bias1.double()), middle)
    exact = F.linear(h, (two * mask2).double(), None if bias2 is None else bias2.double())
    exact = exact if residual is None else exact + residual.double()
    scale = size(h, two * mask2, bias2, residual) + size(x, one * mask1, bias1)
    for layout in usable(dtype, n, m):
        args1, args2 = layouts.pack(one, mask1, n, m, layout), layouts.pack(two, mask2, n, m, layout)
        y = ops.nm_mlp(x, *args1, bias1, *args2, bias2, residual, hidden, out, n, m, n, m, layout, layout, middle)
        assert rms(y - exact) < TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_does_not_change_an_mlp(isa, dtype):
    """Few panels of unequal widths are also split over rows, many are not: see mlp.h."""
    one, mask1 = layer((768, 64), 2, 4, dtype)
    two, mask2 = layer((320, 768), 2, 4, dtype, 1)
    x, layout = torch.randn(197, 64).to(dtype), usable(dtype, 2, 4)[-1]
    weights = (layouts.pack(one, mask1, 2, 4, layout), layouts.pack(two, mask2, 2, 4, layout))
    found = []
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        args = (*weights[0], None, *weights[1], None, None, 768, 320, 2, 4, 2, 4, layout, layout, "gelu")
        found.append(ops.nm_mlp(x, *args))
    h = F.gelu(F.linear(x.double(), (one * mask1).double()))
    exact = F.linear(h, (two * mask2).double())
    assert relative(found[0], exact) < TOLERANCE[dtype]
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (1, 4), (12, 16)])
def test_fp32_is_as_exact_as_dense(isa, n, m):
    """At most four times the error of F.linear against float64."""
    weight, mask = layer((96, 768), n, m, torch.float32)
    x = torch.randn(197, 768)
    values, index = layouts.pack(weight, mask, n, m, ROWS)
    exact = F.linear(x.double(), (weight * mask).double())
    ours = relative(ops.nm_gemm(x, values, index, None, None, 96, n, m, ROWS, "none"), exact)
    assert ours < 4 * relative(F.linear(x, weight * mask), exact)


CONVOLUTIONS = [  # channels, out, height, width, kernel, stride, padding, dilation
    (16, 24, 7, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    (32, 40, 14, 9, (3, 3), (2, 2), (1, 1), (1, 1)),
    (64, 17, 8, 8, (1, 1), (1, 1), (0, 0), (1, 1)),
    (64, 32, 9, 9, (1, 1), (2, 2), (0, 0), (1, 1)),
    (16, 8, 13, 11, (3, 3), (1, 1), (2, 2), (2, 2)),
    (32, 16, 15, 15, (7, 7), (2, 2), (3, 3), (1, 1)),
    (48, 16, 30, 30, (1, 3), (1, 1), (0, 1), (1, 1)),
    (64, 8, 5, 6, (1, 1), (1, 1), (1, 1), (1, 1)),
    (16, 8, 12, 12, (3, 3), (2, 3), (0, 1), (1, 2)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (1, 4), (3, 16)])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(isa, case, n, m, order, dtype):
    channels, out, height, width, kernel, stride, padding, dilation = case
    weight, mask = layer((out, channels, *kernel), n, m, dtype)
    x = torch.randn(3, channels, height, width).to(dtype).contiguous(memory_format=order)
    bias = torch.randn(out).to(dtype)
    exact = F.conv2d(x.double(), (weight * mask).double(), bias.double(), stride, padding, dilation).relu()
    residual = torch.randn_like(exact).to(dtype)
    flat = native.pointwise(weight.shape)
    for layout in set(usable(dtype, n, m)) - {PANELS} if flat else [ROWS]:
        values, index = layouts.pack(weight, mask, n, m, layout)
        args = (list(stride), list(padding), list(dilation), n, m, list(weight.shape), layout, "relu")
        y = ops.nm_conv(x, values, index, bias, residual, *args)
        assert relative(y, exact + residual.double()) < TOLERANCE[dtype]
        assert y.is_contiguous(memory_format=order)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    ("groups", "channels", "out", "kernel"), [(2, 16, 40, 3), (4, 32, 8, 3), (3, 48, 17, 5), (2, 16, 8, 1)]
)
def test_grouped_convolution(isa, groups, channels, out, kernel, stride, order):
    """``channels`` and ``out`` count those of one group."""
    weight, mask = layer((groups * out, channels, kernel, kernel), 8, 16, torch.float32)
    x = torch.randn(2, groups * channels, 9, 11).contiguous(memory_format=order)
    bias, padding = torch.randn(groups * out), kernel // 2
    exact = F.conv2d(x.double(), (weight * mask).double(), bias.double(), stride, padding, 1, groups)
    residual = torch.randn_like(exact).float()
    args = ([stride] * 2, [padding] * 2, [1, 1], 8, 16, list(weight.shape), ROWS, "add_relu")
    y = ops.nm_conv(x, *layouts.pack(weight, mask, 8, 16, ROWS), bias, residual, *args)
    assert relative(y, (exact + residual.double()).relu()) < TOLERANCE[torch.float32]
    assert y.is_contiguous(memory_format=order)


def test_groups_that_do_not_divide_the_outputs_are_refused(isa):
    weight, mask = layer((10, 16, 3, 3), 8, 16, torch.float32)
    held = layouts.pack(weight, mask, 8, 16, ROWS)
    for channels in (0, 8, 24, 48, 64):  # no group, parts of groups, and three or four groups of ten outputs
        with pytest.raises(InputError, match="cannot read this input"):
            args = ([1, 1], [1, 1], [1, 1], 8, 16, list(weight.shape), ROWS, "none")
            ops.nm_conv(torch.randn(1, channels, 5, 5), *held, None, None, *args)


def test_no_tokens(isa):
    weight, mask = layer((8, 16), 2, 4, torch.float32)
    values, index = layouts.pack(weight, mask, 2, 4, ROWS)
    assert ops.nm_gemm(torch.empty(0, 5, 16), values, index, None, None, 8, 2, 4, ROWS, "gelu").shape == (0, 5, 8)
    weight, mask = layer((8, 16, 3, 3), 2, 4, torch.float32)
    values, index = layouts.pack(weight, mask, 2, 4, ROWS)
    args = ([1, 1], [1, 1], [1, 1], 2, 4, [8, 16, 3, 3], ROWS, "none")
    assert ops.nm_conv(torch.empty(0, 16, 4, 4), values, index, None, None, *args).shape == (0, 8, 4, 4)


def test_values_that_are_not_finite_are_propagated(isa):
    weight, mask = layer((16, 16), 8, 16, torch.float32)
    values, index = layouts.pack(weight, mask, 8, 16, ROWS)
    x = torch.ones(3, 16)
    x[1] = torch.nan
    for activation in packed.ACTIVATIONS:
        y = ops.nm_gemm(x, values, index, None, None, 16, 8, 16, ROWS, activation)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()


def test_large_arguments_of_activations(isa):
    weight = torch.eye(16)
    values, index = layouts.pack(weight, torch.ones(16, 16, dtype=torch.bool), 1, 1, ROWS)
    x = torch.cat([torch.linspace(-200, 200, 1600), torch.linspace(-6, 6, 1600)]).view(-1, 16)
    for activation in packed.ACTIVATIONS:
        y = ops.nm_gemm(x, values, index, None, None, 16, 1, 1, ROWS, activation)
        torch.testing.assert_close(y, packed.activate(x, activation), rtol=1e-5, atol=1e-6)


def test_a_wrong_index_is_detected():
    """The comparison above can fail."""
    weight, mask = layer((32, 64), 2, 4, torch.float32)
    values, index = layouts.pack(weight, mask, 2, 4, ROWS)
    x = torch.randn(20, 64)
    index[index > 0] -= 1
    y = ops.nm_gemm(x, values, index, None, None, 32, 2, 4, ROWS, "none")
    assert relative(y, F.linear(x, weight * mask)) > 0.5


@pytest.mark.parametrize("layout", [ROWS, QUADS, RING, OCTS])
def test_pack_refuses_another_pattern(layout):
    n, m = (1, 4) if layout == OCTS else (2, 4)
    weight, mask = layer((8, 16), n, m, torch.bfloat16)
    mask[3, 0] = ~mask[3, 0]
    with pytest.raises(InputError, match=rf"mask is not {n}:{m}.*1 groups"):
        layouts.pack(weight, mask, n, m, layout)


def test_bytes():
    weight, mask = layer((768, 768), 8, 16, torch.float32)
    values, index = layouts.pack(weight, mask, 8, 16, ROWS)
    assert values.nbytes + index.nbytes == 0.625 * weight.nbytes
    for (n, m), layout, share in [((2, 4), QUADS, 0.626), ((1, 4), OCTS, 0.313), ((8, 16), RING, 0.74)]:
        weight, mask = layer((768, 768), n, m, torch.bfloat16)
        values, index = layouts.pack(weight, mask, n, m, layout)
        assert values.nbytes + index.nbytes <= share * weight.nbytes


def test_gradients_are_those_of_the_masked_dense_weight():
    weight, mask = layer((24, 32), 2, 4, torch.float32)
    values, index = layouts.pack(weight, mask, 2, 4, ROWS)
    x, bias = torch.randn(5, 32, requires_grad=True), torch.randn(24, requires_grad=True)
    residual = torch.randn(5, 24, requires_grad=True)
    values.requires_grad_()
    y = ops.nm_gemm(x, values, index, bias, residual, 24, 2, 4, ROWS, "gelu")
    found = torch.autograd.grad(y.square().sum(), [x, bias, residual, values])
    dense = (weight * mask).requires_grad_()
    z = F.gelu(F.linear(x, dense, bias)) + residual
    expected = torch.autograd.grad(z.square().sum(), [x, bias, residual, dense])
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        assert relative(ours, theirs) < 1e-5
    kept, _ = layouts.pack(expected[3] * mask, mask, 2, 4, ROWS)
    assert relative(found[3], kept) < 1e-5


@pytest.mark.parametrize("name", ["nm_gemm", "nm_mlp", "nm_conv"])
def test_operators_pass_opcheck(name):
    one = layouts.pack(*layer((16, 32), 2, 4, torch.float32), 2, 4, ROWS)
    two = layouts.pack(*layer((32, 16), 2, 4, torch.float32, 1), 2, 4, ROWS)
    image = layouts.pack(*layer((8, 16, 3, 3), 2, 4, torch.float32), 2, 4, ROWS)
    x = torch.randn(3, 32, requires_grad=True)
    args = {
        "nm_gemm": (x, *one, torch.randn(16), None, 16, 2, 4, ROWS, "gelu"),
        "nm_mlp": (x, *one, torch.randn(16), *two, None, x.detach(), 16, 32, 2, 4, 2, 4, ROWS, ROWS, "silu"),
        "nm_conv": (
            torch.randn(2, 16, 6, 6, requires_grad=True).contiguous(memory_format=torch.channels_last),
            *image, torch.randn(8), None, [2, 2], [1, 1], [1, 1], 2, 4, [8, 16, 3, 3], ROWS, "relu",
        ),
    }  # fmt: skip
    torch.library.opcheck(getattr(ops, name), args[name])


@pytest.mark.parametrize("layout", [ROWS, QUADS, RING])
@pytest.mark.parametrize("isa", ["portable"], indirect=True)
def test_a_layout_of_another_processor_still_runs(isa, layout):
    weight, mask = layer((24, 32), 2, 4, torch.bfloat16)
    x = torch.randn(5, 32).bfloat16()
    y = ops.nm_gemm(x, *layouts.pack(weight, mask, 2, 4, layout), None, None, 24, 2, 4, layout, "none")
    assert relative(y, F.linear(x, weight * mask)) < 1e-2


def test_patterns_and_blocks():
    assert Pattern(8, 16).density == 0.5
    for shape, layout, m in [((8, 200), ROWS, 8), ((8, 32, 3, 3), ROWS, 32), ((8, 64, 7, 7), ROWS, 4)]:
        columns = torch.cat(layouts.blocks(shape, layout, m))
        assert torch.equal(columns.sort().values, torch.arange(functools.reduce(lambda a, b: a * b, shape[1:])))
        assert max(len(b) for b in layouts.blocks(shape, layout, m)) <= 256


def test_tensors_of_another_size_are_refused(isa):
    weight, mask = layer((24, 64), 2, 4, torch.float32)
    values, index = layouts.pack(weight, mask, 2, 4, ROWS)
    with pytest.raises(InputError, match="packed weights do not fit"):
        ops.nm_gemm(torch.randn(3, 64), values[:-4], index, None, None, 24, 2, 4, ROWS, "none")
    with pytest.raises(InputError, match="packed weights do not fit"):
        ops.nm_gemm(torch.randn(3, 128), values, index, None, None, 24, 2, 4, ROWS, "none")
    with pytest.raises(InputError, match="bias does not fit"):
        ops.nm_gemm(torch.randn(3, 64), values, index, torch.randn(23), None, 24, 2, 4, ROWS, "none")


@pytest.mark.parametrize("layout", [ROWS, QUADS, RING, OCTS])
def test_check_finds_an_index_outside_the_tile(layout):
    n, m = (1, 4) if layout == OCTS else (2, 4)
    weight, mask = layer((24, 128), n, m, torch.bfloat16)
    values, index = layouts.pack(weight, mask, n, m, layout)
    layouts.check(values, index, m, layout)
    damaged = index.clone()
    damaged[-1] = 255
    with pytest.raises(InputError, match="outside its block"):
        layouts.check(values, damaged, m, layout)
    if layout == RING:
        damaged = index.clone()
        damaged[5] ^= 64
        with pytest.raises(InputError, match="table of packed weights"):
            layouts.check(values, damaged, m, layout)


def test_a_residual_is_broadcast_over_the_batch(isa):
    weight, mask = layer((16, 32), 2, 4, torch.float32)
    x, residual = torch.randn(4, 3, 32), torch.randn(1, 3, 16)
    y = ops.nm_gemm(x, *layouts.pack(weight, mask, 2, 4, ROWS), None, residual, 16, 2, 4, ROWS, "none")
    assert relative(y, F.linear(x, weight * mask) + residual) < 1e-6
