"""Numbers and tensors that would lead a kernel out of bounds are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.errors import InputError, MPCompileError
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import MAX_M
from mpcompile.kernels.nm_linear import checks, layouts, packed
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.nm_linear.layouts import OCTS, QUADS, RING, ROWS
from tests.support.packed_layers import CONV, GEMM, layer, matrix, usable

HUGE = (2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1)
WRONG = (0, -1, -3, -(2**31), -(2**63), *HUGE)
NAMES = ("{}", "{}_general")
EMPTY = torch.empty(0), torch.empty(0, dtype=torch.uint8)


def both(name, *args, **kwargs):
    """Check that an operator refuses a call, both in C++ and in Python."""
    for form in NAMES:
        with pytest.raises(InputError) as error:
            getattr(torch.ops.mpcompile, form.format(name))(*args, **kwargs)
        text = str(error.value)
        assert "\n" not in text and len(text) < 600


def test_valid_calls_pass():
    assert ops.nm_gemm(torch.randn(4, 64), *matrix(), None, None, *GEMM.values()).shape == (4, 16)
    image = layouts.pack(*layer((8, 8, 3, 3), 2, 4, torch.float32), 2, 4, ROWS)
    assert ops.nm_conv(torch.randn(1, 8, 8, 8), *image, None, None, *CONV.values()).shape == (1, 8, 8, 8)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *itertools.product(("n", "m", "out"), (*WRONG, 33, 100)),
        *itertools.product(["layout"], (1, 2, 3, 4, -1, 2**32, 16, 17)),
        *itertools.product(["activation"], ("", "tanh", "add_", "add_add_relu", "relu\0")),
    ],
)
def test_numbers_of_a_product(name, wrong):
    if wrong == 16 and name == "out":
        return
    for x in (torch.randn(4, 64), torch.randn(0, 64)):
        both("nm_gemm", x, *matrix(), None, None, *(GEMM | {name: wrong}).values())


@pytest.mark.parametrize("name", ["n", "m"])
@pytest.mark.parametrize("wrong", WRONG)
def test_numbers_without_a_weight(name, wrong):
    both("nm_gemm", torch.randn(4, 0), *EMPTY, None, None, *(GEMM | {name: wrong}).values())


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["hidden", "out", "n1", "m1", "n2", "m2", "layout1", "layout2"])
def test_numbers_of_two_products(name, wrong):
    if (name, wrong) in (("layout1", 0), ("layout2", 0)):
        return
    valid = {
        "hidden": 16,
        "out": 8,
        "n1": 2,
        "m1": 4,
        "n2": 2,
        "m2": 4,
        "layout1": 0,
        "layout2": 0,
        "activation": "gelu",
    }
    one, two = matrix(16, 64), matrix(8, 16)
    for x in (torch.randn(4, 64), torch.randn(2000, 64), torch.randn(0, 64)):
        both("nm_mlp", x, *one, None, *two, None, None, *(valid | {name: wrong}).values())
    both("nm_mlp", torch.randn(2000, 64), *one, None, *two, None, None, *(valid | {"activation": "add_gelu"}).values())


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("axis", [0, 1])
def test_numbers_of_a_convolution(name, wrong, axis, kernel):
    if (
        (name, wrong) == ("padding", 0)
        or (name == "stride" and wrong == 2**31 - 1)
        or (name == "dilation" and kernel == (1, 1))
    ):
        return  # these may be zero
    image = layouts.pack(*layer((8, 8, *kernel), 2, 4, torch.float32), 2, 4, ROWS)
    numbers = list(CONV[name])
    numbers[axis] = wrong
    for images in (1, 0)[: 1 if wrong == 2**31 - 1 else 2]:  # an empty batch needs no memory, padded or not
        x = torch.randn(images, 8, 8, 8)
        both("nm_conv", x, *image, None, None, *(CONV | {"shape": [8, 8, *kernel], name: numbers}).values())


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("wrong", WRONG)
def test_shapes_of_a_convolution(axis, wrong):
    image = layouts.pack(*layer((8, 8, 3, 3), 2, 4, torch.float32), 2, 4, ROWS)
    shape = [8, 8, 3, 3]
    shape[axis] = wrong
    both("nm_conv", torch.randn(1, 8, 8, 8), *image, None, None, *(CONV | {"shape": shape}).values())
    both("nm_conv", torch.randn(1, 8, 8, 8), *image, None, None, *(CONV | {"shape": [-8, 8, -3, -3]}).values())


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "shape"])
@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_lists_of_another_length(name, count):
    image = layouts.pack(*layer((8, 8, 3, 3), 2, 4, torch.float32), 2, 4, ROWS)
    both("nm_conv", torch.randn(1, 8, 8, 8), *image, None, None, *(CONV | {name: [1] * count}).values())


def test_padding_that_would_take_terabytes_is_refused_and_a_long_stride_is_not():
    image = layouts.pack(*layer((8, 8, 3, 3), 2, 4, torch.float32), 2, 4, ROWS)
    far = CONV | {"stride": [10**6] * 2, "padding": [10**6] * 2}
    both("nm_conv", torch.randn(1, 8, 8, 8), *image, None, None, *far.values())
    both(
        "nm_conv",
        torch.randn(1, 8, 8, 8),
        *image,
        None,
        None,
        *(CONV | {"dilation": [10**6] * 2, "padding": [10**6] * 2}).values(),
    )
    weight, x = layouts.unpack(*image, (8, 8, 3, 3), 2, 4, ROWS), torch.randn(1, 8, 8, 8)
    y = ops.nm_conv(x, *image, None, None, *(CONV | {"stride": [10**6, 2]}).values())
    torch.testing.assert_close(y, F.conv2d(x, weight, None, (10**6, 2), 1))
    both("nm_conv", torch.randn(1, 8, 2, 2), *image, None, None, *(CONV | {"padding": [0, 0]}).values())


def test_tensors_beside_the_weight():
    values, index = matrix()
    x, rest = torch.randn(4, 64), tuple(GEMM.values())
    for bias in (torch.zeros(15), torch.zeros(1), torch.zeros(16, 1), torch.zeros(())):
        both("nm_gemm", x, values, index, bias, None, *rest)
    for residual in (torch.zeros(3, 16), torch.zeros(2, 4, 16), torch.zeros(4, 15), torch.zeros(0, 16)):
        both("nm_gemm", x, values, index, None, residual, *rest)
    for other in (torch.tensor(1.0), torch.randn(4, 63), torch.randn(4, 128), torch.randn(4, 64).double()):
        both("nm_gemm", other, values, index, None, None, *rest)
    for wrong in (values[:0], values[:-1], torch.cat([values, values]), values.double(), values[::2]):
        both("nm_gemm", x, wrong, index, None, None, *rest)
    for wrong in (index[:0], index[:-1], index.int(), index[::2], torch.cat([index, index])):
        both("nm_gemm", x, values, wrong, None, None, *rest)


def test_no_inputs_give_the_bias_and_no_rows_give_none():
    bias, residual = torch.randn(16), torch.randn(4, 16)
    for form in NAMES:
        op = getattr(torch.ops.mpcompile, form.format("nm_gemm"))
        torch.full((4096,), 7.0).sum()
        assert not op(torch.randn(4, 0), *EMPTY, None, None, *GEMM.values()).any()
        found = op(torch.randn(4, 0), *EMPTY, bias, residual, *(GEMM | {"activation": "add_relu"}).values())
        torch.testing.assert_close(found, (bias + residual).relu())
        assert op(torch.randn(4, 64), *EMPTY, None, None, *(GEMM | {"out": 0}).values()).shape == (4, 0)
        assert op(torch.randn(0, 64), *matrix(), bias, None, *GEMM.values()).shape == (0, 16)
    both("nm_gemm", torch.empty(2**40, 0), *EMPTY, None, None, *GEMM.values())
    both("nm_gemm", torch.empty(4, 0), *EMPTY, None, None, *(GEMM | {"out": 2**30}).values())
    for order in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 0, 5, 5).contiguous(memory_format=order)
        y = ops.nm_conv(x, *EMPTY, bias[:8], None, *(CONV | {"shape": [8, 0, 3, 3]}).values())
        torch.testing.assert_close(y, bias[:8, None, None].expand(2, 8, 5, 5))
    two = {"hidden": 0, "out": 16, "n1": 2, "m1": 4, "n2": 2, "m2": 4, "layout1": 0, "layout2": 0, "activation": "gelu"}
    y = ops.nm_mlp(torch.randn(2000, 64), *EMPTY, None, *EMPTY, bias, None, *two.values())
    torch.testing.assert_close(y, bias.expand(2000, 16))


PATTERNS = [(n, m) for m in range(1, MAX_M + 1) for n in range(1, m + 1)]


@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (1, 7), (11, 11)])
def test_one_description_of_sizes_and_bounds(kernel):
    """Packing, the operators' check and the check of files agree on sizes and bounds, for every N:M."""
    for n, m in PATTERNS:
        shape = (2, m * (1 + m % 3), *kernel)
        cut = layouts.Cut.of(shape, ROWS, m)
        widths = [len(columns) for columns in layouts.blocks(shape, ROWS, m)]
        assert sorted(widths) == sorted(w for w, count in cut.widths() for _ in range(count))
        assert sum(widths) == shape[1] * kernel[0] * kernel[1] and max(widths) <= 256
        if (n * 7 + m) % 5 == 0:  # some are enough: packing takes longer than checking
            values, index = layouts.pack(*layer(shape, n, m, torch.float32), n, m, ROWS)
            assert layouts.fits(len(values), len(index), shape, n, m, ROWS)
            layouts.check(values, index, m, ROWS, shape)


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from([ROWS, QUADS, RING, OCTS]),
    m=st.integers(1, MAX_M),
    groups=st.integers(1, 40),
    data=st.data(),
)
def test_cpp_and_python_agree_on_sizes(layout, m, groups, data):
    dtype = torch.bfloat16 if layout != ROWS else torch.float32
    n = data.draw(st.integers(1, m))
    n, m = {QUADS: (2, 4), OCTS: (1, 4)}.get(layout, (n, m))
    if layout not in usable(dtype, n, m):
        return
    out, k = data.draw(st.integers(1, 9)), m * groups
    values, index = layouts.pack(*layer((out, k), n, m, dtype), n, m, layout)
    x = torch.randn(3, k).to(dtype)
    for wrong_values, wrong_index in ((0, 1), (1, 0), (0, 0)):
        v, i = values[: len(values) - wrong_values * (4 if layout == RING else 1)], index[: len(index) - wrong_index]
        good = layouts.fits(len(v), len(i), (out, k), n, m, layout)
        assert good == (not wrong_values and not wrong_index)
        for form in NAMES:
            op = getattr(torch.ops.mpcompile, form.format("nm_gemm"))
            if good:
                assert op(x, v, i, None, None, out, n, m, layout, "none").shape == (3, out)
            else:
                with pytest.raises(InputError):
                    op(x, v, i, None, None, out, n, m, layout, "none")


@pytest.mark.parametrize("layout", [ROWS, QUADS, RING, OCTS])
def test_an_index_that_is_overwritten_stays_inside(layout):
    """An index overwritten after its check leads no kernel out of bounds; AddressSanitizer would report it."""
    dtype, (n, m) = (torch.float32 if layout == ROWS else torch.bfloat16), {OCTS: (1, 4)}.get(layout, (2, 4))
    if layout not in usable(dtype, n, m):
        pytest.skip("this processor has no bf16 products")
    values, index = matrix(48, 192, n, m, dtype, layout)
    generator = torch.Generator().manual_seed(0)
    for trial in range(20):
        wild = (
            torch.full_like(index, 255)
            if not trial
            else torch.randint(0, 256, index.shape, dtype=torch.uint8, generator=generator)
        )
        if layout == ROWS:  # the byte that gives the number of features
            wild[-1] = index[-1]
        if layout == RING and trial % 2:  # with a valid end of the table
            end = layouts.table_bytes((48, 192), m)
            wild[end - 4 : end] = index[end - 4 : end]
        for tokens in (1, 17, 100):
            x = torch.randn(tokens, 192).to(dtype)
            try:
                y = ops.nm_gemm(x, values, wild, None, None, 48, n, m, layout, "none")
            except InputError as error:
                assert layout == RING and "table" in str(error)
                continue
            assert y.shape == (tokens, 48)
    image = layouts.pack(*layer((8, 20, 3, 3), 10, 20, torch.float32), 10, 20, ROWS)
    image[1].fill_(255)
    geometry = ([1, 1], [1, 1], [1, 1], 10, 20, [8, 20, 3, 3], ROWS, "none")
    assert ops.nm_conv(torch.randn(1, 20, 8, 8), *image, None, None, *geometry).shape == (1, 8, 8, 8)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 7), (10, 20)])
def test_an_input_of_a_few_features_more_or_less_is_refused(n, m):
    """Rows are padded to four entries, so the tensors' sizes are the same for several numbers of features."""
    for groups in range(1, 60):
        v, i = matrix(8, m * groups, n, m)
        one = {**GEMM, "out": 8, "n": n, "m": m}
        assert ops.nm_gemm(torch.randn(2, m * groups), v, i, None, None, *one.values()).shape == (2, 8)
        for other in range(max(1, groups - 4), groups + 5):
            if other != groups:
                both("nm_gemm", torch.randn(2, m * other), v, i, None, None, *one.values())


def test_tensors_that_are_not_strided_are_refused():
    both("nm_gemm", torch.randn(4, 64).to_sparse(), *matrix(), None, None, *GEMM.values())
    both("nm_gemm", torch.randn(4, 64), matrix()[0].to_sparse(), matrix()[1], None, None, *GEMM.values())


def test_unknown_layouts_are_refused():
    for layout in (-1, 5, 99, 2**32):
        with pytest.raises(InputError, match="no such layout"):
            layouts.pack(*layer((8, 16), 2, 4, torch.float32), 2, 4, layout)
        with pytest.raises(InputError, match="no such layout"):
            layouts.unpack(*matrix(8, 16), (8, 16), 2, 4, layout)


def test_the_reference_engine_checks_its_numbers():
    weight = torch.randn(8, 16)
    from mpcompile.kernels.nm_format import pack

    values, words = pack(weight, (torch.arange(16) % 4 < 2).expand(8, 16), 2, 4)
    x = torch.randn(3, 16)
    assert ops.nm_linear(x, values, words, None, 2, 4, 16).shape == (3, 8)
    for n, m, k in (
        (0, 4, 16),
        (2, 0, 16),
        (5, 4, 16),
        (2, 4, 2**40),
        (2, 4, -16),
        (2**32, 4, 16),
        (2, 64, 16),
        (1, 4, 16),
    ):
        with pytest.raises(MPCompileError, match="packed weights do not fit"):
            ops.nm_linear(x, values, words, None, n, m, k)
    with pytest.raises(MPCompileError, match="packed weights do not fit"):
        ops.nm_conv2d(x, values, words, None, [1, 1], [0, 0], [1, 1], 1, 2, 4, [8, 16, 2**20, 2**20])


def test_checks_run_once_where_cpp_cannot_be_built():
    """The numbers of a weight are checked only once."""
    checks._can_be.cache_clear()
    values, index = matrix()
    for _ in range(3):
        native._gemm(torch.randn(4, 64), values, index, None, None, *GEMM.values())
    assert checks._can_be.cache_info().hits == 2
    assert set(packed.ACTIVATIONS) < set(packed.EPILOGUES)
