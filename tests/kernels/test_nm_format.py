"""The packed format: exact round trips for any N:M, and a legality check that cannot be fooled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.errors import ConfigError, InputError
from mpcompile.kernels.nm_format import (
    Pattern,
    check_nm,
    from_rows,
    groups_per_word,
    pack,
    packed_bytes,
    to_rows,
    word_dtype,
)
from mpcompile.kernels.nm_linear.reference import unpack_rows

patterns = st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m)))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random_mask(rows: int, k: int, n: int, m: int, seed: int) -> torch.Tensor:
    score = torch.rand(rows, k // m, m, generator=torch.Generator().manual_seed(seed))
    return (score.argsort(-1) < n).reshape(rows, k)


@settings(max_examples=150, deadline=None)
@given(patterns, st.integers(1, 5), st.integers(1, 9), dtypes, st.integers(0, 99))
def test_linear_round_trip_is_exact(nm, rows, groups, dtype, seed):
    (n, m), k = nm, groups * nm[1]
    weight = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    mask = random_mask(rows, k, n, m, seed)
    values, words = pack(weight, mask, n, m)
    assert values.shape == (rows, groups * n)
    assert words.dtype == word_dtype(m)
    assert torch.equal(unpack_rows(values, words, n, m, k), weight * mask)
    stored = values.numel() * values.element_size() + words.numel() * words.element_size()
    assert stored == packed_bytes((rows, k), weight.element_size(), n, m)


@settings(max_examples=40, deadline=None)
@given(patterns, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_conv_round_trip_groups_are_along_input_channels(nm, out, groups, kernel, seed):
    n, m = nm
    shape = (out, groups * m, kernel, kernel)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    mask = from_rows(random_mask(out, groups * m * kernel * kernel, n, m, seed), shape).contiguous()
    assert torch.equal(from_rows(to_rows(weight), shape), weight)
    taps = mask.permute(0, 2, 3, 1).unflatten(-1, (-1, m)).sum(-1)
    assert bool((taps == n).all())
    values, words = pack(weight, mask, n, m)
    assert torch.equal(from_rows(unpack_rows(values, words, n, m, values.shape[1] // n * m), shape), weight * mask)
    assert check_nm(weight * mask, n, m) == 0


def test_check_counts_the_groups_that_break_the_pattern():
    weight = torch.zeros(2, 8)
    weight[0, :3] = 1
    assert check_nm(weight, 2, 4) == 1
    assert check_nm(weight, 3, 4) == 0
    assert check_nm(torch.ones(2, 6), 2, 4) == 2  # 6 columns cannot be grouped by 4


def test_zero_among_the_kept_is_legal():
    assert check_nm(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 2, 4) == 0


def test_two_groups_of_2_4_share_a_byte():
    assert groups_per_word(4) == 2
    assert packed_bytes((1, 8), 4, 2, 4) == 4 * 4 + 1


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:33", "2-4", "2:4:8", "", "dense:4", "-2:4", None, 2])
def test_parse_refuses(text):
    with pytest.raises(ConfigError):
        Pattern.parse(text)


def test_parse_takes_spaces():
    assert Pattern.parse(" 6 : 12 ") == (6, 12)


def test_pack_refuses_a_mask_with_another_count():
    mask = torch.tensor([[True, True, True, False]])
    with pytest.raises(InputError, match="1 of 1 groups"):
        pack(torch.ones(1, 4), mask, 2, 4)


def test_pack_refuses_groups_that_straddle_taps():
    with pytest.raises(InputError):
        pack(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2, dtype=torch.bool), 2, 4)
