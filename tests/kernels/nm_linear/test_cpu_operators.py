"""The operators in C++ (ops.cpp) compute the same as those in Python, without Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile.errors import InputError
from mpcompile.kernels import ops
from mpcompile.kernels.cpu import build
from mpcompile.kernels.nm_linear import layouts, packed
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.nm_linear.layouts import OCTS, QUADS, RING, ROWS
from tests.support.packed_layers import layer

GENERAL = torch.ops.mpcompile
PATTERNS = {ROWS: (8, 16), QUADS: (2, 4), RING: (3, 8), OCTS: (1, 4)}


def layouts_here(dtype):
    pairs = dtype is torch.bfloat16 and native.kernels().nm_pairs()
    return list(PATTERNS) if pairs else [ROWS]


def pack(shape, dtype, layout, seed=0):
    n, m = PATTERNS[layout]
    return layouts.pack(*layer(shape, n, m, dtype, seed), n, m, layout)


@pytest.fixture
def no_python(monkeypatch):
    """Make the operators in Python fail."""

    def refuse(*args):
        raise AssertionError("an operator in Python was called")

    assert native.kernels() is not None
    assert build.operators() is not None
    monkeypatch.setattr(native, "runs", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_plain_calls_run_no_python(no_python, dtype, mode):
    bias, residual = torch.randn(48).to(dtype), torch.randn(2, 5, 48).to(dtype)
    with mode():
        for layout in layouts_here(dtype):
            n, m = PATTERNS[layout]
            one, two = pack((32, 64), dtype, layout), pack((48, 32), dtype, layout)
            x = torch.randn(2, 5, 32).to(dtype)
            y = ops.nm_gemm(x, *two, bias, residual, 48, n, m, layout, "add_relu")
            assert y.shape == (2, 5, 48) and y.dtype is dtype
            for tokens in (3, 2000):  # as two products, and as one
                x, args = torch.randn(tokens, 64).to(dtype), (32, 48, n, m, n, m, layout, layout, "gelu")
                assert ops.nm_mlp(x, *one, None, *two, bias, None, *args).shape == (tokens, 48)
            plain = ([1, 1], [0, 0], [1, 1], n, m, [48, 32, 1, 1], layout, "relu")
            for order in (torch.contiguous_format, torch.channels_last):
                image = torch.randn(2, 32, 3, 3).to(dtype).contiguous(memory_format=order)
                assert ops.nm_conv(image, *two, bias, None, *plain).is_contiguous(memory_format=order)
                if dtype is torch.float32:
                    spatial = ([2, 2], [1, 1], [1, 1], n, m, [48, 32, 3, 3], layout, "relu")
                    y = ops.nm_conv(image, *pack((48, 32, 3, 3), dtype, layout), bias, None, *spatial)
                    assert y.is_contiguous(memory_format=order)


def test_unusual_calls_use_the_general_operators(no_python):
    values, index = pack((48, 32), torch.float32, ROWS)
    with pytest.raises(AssertionError, match="in Python was called"):
        ops.nm_gemm(torch.randn(32, 5).T, values, index, None, None, 48, 8, 16, ROWS, "none")


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from([ROWS, QUADS, RING, OCTS]),
    lead=st.sampled_from([(), (1,), (7,), (2, 9), (0, 4)]),
    out=st.sampled_from([1, 7, 48]),
    groups=st.integers(1, 20),
    strided=st.booleans(),
    bias=st.sampled_from([None, "plain", "other dtype", "strided"]),
    residual=st.sampled_from([None, "plain", "other dtype", "broadcast"]),
    epilogue=st.sampled_from(packed.EPILOGUES),
)
def test_products_are_those_of_python(dtype, layout, lead, out, groups, strided, bias, residual, epilogue):
    layout = layout if layout in layouts_here(dtype) else ROWS
    n, m = PATTERNS[layout]
    held = pack((out, m * groups), dtype, layout)
    x = torch.randn(*lead, m * groups * (2 if strided else 1)).to(dtype)[..., : m * groups]
    other = torch.float64 if dtype is torch.float32 else torch.float32
    shifts = {
        None: None,
        "plain": torch.randn(out).to(dtype),
        "other dtype": torch.randn(out).to(other),
        "strided": torch.randn(out, 2).to(dtype)[:, 0],
    }
    added = {
        None: None,
        "plain": torch.randn(*lead, out).to(dtype),
        "other dtype": torch.randn(*lead, out).to(other),
        "broadcast": torch.randn(out).to(dtype).expand(*lead, out),
    }
    args = (x, *held, shifts[bias], added[residual], out, n, m, layout, epilogue)
    assert torch.equal(ops.nm_gemm(*args), GENERAL.nm_gemm_general(*args))


@pytest.mark.parametrize("tokens", [5, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_products_are_those_of_python(dtype, tokens):
    x, residual = torch.randn(tokens, 64).to(dtype), torch.randn(tokens, 24).to(dtype)
    for layout in layouts_here(dtype):
        n, m = PATTERNS[layout]
        one, two = pack((96, 64), dtype, layout), pack((24, 96), dtype, layout, 1)
        for activation in packed.ACTIVATIONS:
            held = (*one, torch.randn(96).to(dtype), *two, None)
            args = (x, *held, residual, 96, 24, n, m, n, m, layout, layout, activation)
            assert torch.equal(ops.nm_mlp(*args), GENERAL.nm_mlp_general(*args))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_are_those_of_python(stride, padding, order):
    x = torch.randn(2, 32, 6, 5).contiguous(memory_format=order)
    for layout in layouts_here(torch.float32):
        n, m = PATTERNS[layout]
        held = pack((24, 32, 1, 1), torch.float32, layout)
        geometry = ([stride] * 2, [padding] * 2, [1, 1], n, m, [24, 32, 1, 1], layout)
        y = GENERAL.nm_conv_general(x, *held, torch.randn(24), None, *geometry, "none")
        residual = torch.randn_like(y)  # in the same memory order
        for added in (None, residual, residual.contiguous(), residual[:1].expand(y.shape)):
            args = (x, *held, None, added, *geometry, "add_relu")
            found, expected = ops.nm_conv(*args), GENERAL.nm_conv_general(*args)
            assert torch.equal(found, expected) and found.stride() == expected.stride()


SPATIAL = [  # kernel, stride, padding, dilation
    ((3, 3), [1, 1], [1, 1], [1, 1]),
    ((3, 3), [2, 2], [1, 1], [1, 1]),
    ((1, 3), [1, 2], [0, 1], [1, 1]),
    ((5, 3), [1, 1], [4, 2], [2, 2]),
    ((3, 3), [1, 1], [2, 2], [1, 1]),  # padding that enlarges the image
    ((3, 3), [9, 9], [1, 1], [1, 1]),  # a stride larger than the image
]


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["planes", "channels_last"])
@pytest.mark.parametrize("case", SPATIAL, ids=str)
def test_spatial_convolutions_are_those_of_python(case, order):
    kernel, *axes = case
    x = torch.randn(2, 32, 6, 5).contiguous(memory_format=order)
    held = pack((24, 32, *kernel), torch.float32, ROWS)
    geometry = (*axes, *PATTERNS[ROWS], [24, 32, *kernel], ROWS)
    y = GENERAL.nm_conv_general(x, *held, torch.randn(24), None, *geometry, "none")
    residual = torch.randn_like(y)  # in the same memory order
    for added in (None, residual, residual.contiguous(), residual[:1].expand(y.shape)):
        for bias in (None, torch.randn(24), torch.randn(24).double()):
            args = (x, *held, bias, added, *geometry, "add_relu")
            found, expected = ops.nm_conv(*args), GENERAL.nm_conv_general(*args)
            assert torch.equal(found, expected) and found.stride() == expected.stride()
    for short in ((held[0][:-4], held[1]), (held[0], held[1][:-4]), (held[0][:-4], held[1][:-4])):
        with pytest.raises(InputError):
            ops.nm_conv(x, *short, None, None, *geometry, "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [16, 96, 208])
def test_tensors_of_wrong_sizes_are_refused_and_not_read(dtype, inputs):
    x = torch.randn(3, inputs).to(dtype)
    for layout in layouts_here(dtype):
        n, m = PATTERNS[layout]
        values, index = pack((20, inputs), dtype, layout)
        good = (None, None, 20, n, m, layout, "none")
        assert ops.nm_gemm(x, values, index, *good).shape == (3, 20)
        cut = 4 if layout == RING else 1  # RING has two values per index byte, and spare entries of both
        for bad in ((values[:-cut], index), (values, index[:-cut]), (values, index.to(torch.int8))):
            with pytest.raises(InputError, match="packed weights do not fit"):
                ops.nm_gemm(x, *bad, *good)
        with pytest.raises(InputError, match="bias"):
            ops.nm_gemm(x, values, index, x.new_zeros(19), *good[1:])
        with pytest.raises(InputError, match="packed weights do not fit"):
            ops.nm_gemm(x, values, index, None, None, 200, n, m, layout, "none")


@pytest.mark.parametrize("name", ["nm_gemm", "nm_gemm_general"])
def test_tensors_of_another_kind_are_refused_and_not_read(name):
    values, index = pack((48, 32), torch.float32, ROWS)
    x, rest = torch.randn(5, 32), (None, None, 48, 8, 16, ROWS, "none")
    few = torch.ones(1).expand(len(values))
    apart = torch.stack([values, values], 1)[:, 0]
    for bad in (few, apart):
        with pytest.raises(InputError, match="contiguous, on the CPU"):
            getattr(GENERAL, name)(x, bad, index, *rest)


def test_two_weights_of_one_product_have_one_dtype():
    one, two = pack((32, 64), torch.float32, ROWS), pack((48, 32), torch.bfloat16, ROWS)
    args = (torch.randn(2000, 64), *one, None, *two, None, None, 32, 48, 8, 16, 8, 16, ROWS, ROWS, "gelu")
    for op in (ops.nm_mlp, GENERAL.nm_mlp_general):
        with pytest.raises(InputError, match="contiguous, on the CPU"):
            op(*args)


def test_graphs_hold_the_operator_that_was_called(no_python):
    values, index = pack((48, 32), torch.float32, ROWS)
    x, bias = torch.randn(5, 32), torch.randn(48, requires_grad=True)

    def call(x, values, index, bias):
        return ops.nm_gemm(x, values, index, bias, None, 48, 8, 16, ROWS, "gelu")

    traced = make_fx(call, tracing_mode="fake")(x, values, index, bias)
    assert ops.nm_gemm in {node.target for node in traced.graph.nodes}
    # A gradient is requested, but the product is still not Python's.
    assert call(x, values, index, bias).grad_fn is not None


def test_without_kernels_plain_torch_runs(monkeypatch):
    values, index = pack((48, 32), torch.float32, ROWS)
    x = torch.randn(5, 32)
    fast = ops.nm_gemm(x, values, index, None, None, 48, 8, 16, ROWS, "gelu")
    monkeypatch.setattr(native, "kernels", lambda: None)
    answers, runs = [], native.runs
    monkeypatch.setattr(native, "runs", lambda *args: answers.append(runs(*args)) or answers[-1])
    native.use(None)
    try:
        slow = ops.nm_gemm(x, values, index, None, None, 48, 8, 16, ROWS, "gelu")
    finally:
        monkeypatch.undo()
        native.use(native.kernels())
    torch.testing.assert_close(fast, slow)
    assert answers == [False]  # by the operator in Python, which did not find the kernel
