"""2:4 weights packed for sparse tensor cores: exact round trips, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.errors import InputError
from mpcompile.kernels import ops
from mpcompile.kernels.nm_linear import layouts, sparse24
from mpcompile.passes.mask import top_n
from tests.support.helpers import relative

BOTH = [sparse24.MMA_SP, sparse24.WGMMA_SP]


def weight_and_mask(shape, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    rows = layouts.to_rows(torch.randn(shape, generator=generator))
    return weight, layouts.from_rows(top_n(rows.unflatten(-1, (-1, 4)), 2).flatten(-2), shape)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 300),
    groups=st.integers(1, 90),
    taps=st.sampled_from([None, (1, 1), (3, 3)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    layout=st.sampled_from(BOTH),
    seed=st.integers(0, 99),
)
def test_round_trips_are_exact(out, groups, taps, dtype, layout, seed):
    shape = (out, 4 * groups, *(taps or ()))
    weight, mask = weight_and_mask(shape, dtype, seed)
    values, index = sparse24.pack(weight, mask, layout)
    assert sparse24.fits(values.numel(), index.numel(), shape)
    assert layouts.fits(values.numel(), index.numel(), shape, 2, 4, layout)
    assert torch.equal(sparse24.unpack(values, index, shape, layout), weight * mask)
    sparse24.check(values, index)
    layouts.check(values, index, 4, layout)


@pytest.mark.parametrize("layout", BOTH)
def test_metadata_are_where_the_instructions_read_them(layout):
    """Checked word by word, from the rows and columns that the PTX ISA gives for a lane or thread."""
    weight, mask = weight_and_mask((128, 256))
    _, index = sparse24.pack(weight, mask, layout)
    words = index[:-8].view(torch.int32)
    position = mask.unflatten(-1, (-1, 4)).nonzero()[:, 2].view(128, 128)
    rows, columns, threads = (32, 32, 32) if layout == sparse24.MMA_SP else (64, 64, 128)
    words = words.view(128 // rows, 256 // columns, threads)
    for block, step, thread in ((0, 0, 0), (1, 3, 17), (1, 2, 31), (0, 1, 6), (1, 1, threads - 1)):
        g, q = thread % 32 // 4, thread % 4
        if layout == sparse24.MMA_SP:
            row, half = 32 * block + 16 * (q // 2) + g, 2 * step + q % 2
        else:
            row, half = 64 * block + 16 * (thread // 32) + g, 4 * step + q
        for number, r in enumerate((row, row + 8)):
            bits = int(words[block, step, thread]) >> (16 * number) & 0xFFFF
            assert [bits >> (2 * i) & 3 for i in range(8)] == position[r, 8 * half : 8 * half + 8].tolist()


@pytest.mark.parametrize("layout", BOTH)
def test_parts_of_different_weights_are_detected(layout):
    weight, mask = weight_and_mask((64, 128))
    values, index = sparse24.pack(weight, mask, layout)
    other_values, other_index = sparse24.pack(*weight_and_mask((64, 128), seed=1), layout)
    for pair in ((values, other_index), (other_values, index), (values.flip(0), index)):
        with pytest.raises(InputError, match="does not belong to these values"):
            sparse24.check(*pair)
    disordered = index.clone()
    disordered[5] = 0b0001_0100
    with pytest.raises(InputError, match="out of order"):
        layouts.check(values, disordered, 4, layout)
    for pair in ((values, index[:3]), (values.float(), index)):
        with pytest.raises(InputError, match="not packed 2:4 weights"):
            sparse24.check(*pair)
    assert not layouts.fits(values.numel(), index.numel() - 8, (64, 128), 2, 4, layout)
    assert not layouts.fits(values.numel(), index.numel(), (64, 128), 1, 4, layout)


def test_masks_that_are_not_2_to_4_are_refused():
    weight, mask = weight_and_mask((8, 16))
    mask[0, :4] = True
    with pytest.raises(InputError, match="exactly 2 of every 4 kept, found 1 other groups"):
        sparse24.pack(weight, mask, BOTH[0])
    with pytest.raises(InputError, match="inputs a multiple of 4"):
        sparse24.pack(weight[:, :6], mask[:, :6], BOTH[0])


@pytest.mark.parametrize("layout", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operators_accept_them_on_a_cpu(layout, dtype):
    """A module lowered for a GPU runs slowly without one, even if the CPU kernels support the dtype."""
    weight, mask = weight_and_mask((48, 64), dtype)
    values, index = sparse24.pack(weight, mask, layout)
    x, bias = torch.randn(3, 5, 64).to(dtype), torch.randn(48).to(dtype)
    y = ops.nm_gemm(x, values, index, bias, None, 48, 2, 4, layout, "relu")
    expected = torch.relu(torch.nn.functional.linear(x.double(), (weight * mask).double(), bias.double()))
    assert relative(y, expected) < 1e-2
    grown = values.clone().requires_grad_()
    ops.nm_gemm(x, grown, index, bias, None, 48, 2, 4, layout, "none").sum().backward()
    assert grown.grad is not None and bool((grown.grad[: 64 // 2] != 0).all())
