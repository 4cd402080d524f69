"""The order of entries in a ROWS weight, and products of weights whose pairs of rows share columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.kernels import ops
from mpcompile.kernels.cpu import build
from mpcompile.kernels.nm_linear import layouts
from mpcompile.kernels.nm_linear.row_order import common_first


def _mask(rows: int, groups: int, n: int, m: int, alike: bool) -> torch.Tensor:
    """N of every M columns, in random places; with ``alike``, rows 2i and 2i + 1 differ in one group at most."""
    chosen = torch.rand(rows, groups, m).argsort(-1).argsort(-1) < n
    if alike:
        chosen[1::2, 1:] = chosen[: rows // 2 * 2 : 2, 1:]
    return chosen.flatten(1)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 32), st.data())
def test_common_columns_come_first(rows: int, groups: int, m: int, data: st.DataObject) -> None:
    n, step = data.draw(st.integers(1, m)), data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    kept = _mask(rows, groups, n, m, data.draw(st.booleans()))
    order = common_first(kept, step)
    assert torch.equal(order.sort(-1).values, torch.arange(kept.shape[1]).expand_as(order))
    total = n * groups
    stored = [row[:total].tolist() for row in order]
    counts = []
    for row, places in enumerate(stored):
        own = kept[row].nonzero().flatten().tolist()
        assert sorted(places) == own and places[-1] == own[-1]
    for one, two in zip(stored[::2], stored[1::2], strict=False):
        both = set(one) & set(two) - {one[-1], two[-1]}
        counts.append(len(both))
    count = min(counts, default=0) // step * step
    for one, two in zip(stored[::2], stored[1::2], strict=False):
        assert one[:count] == two[:count] == sorted(one[:count])
    assert all(places[count:] == sorted(places[count:]) for places in stored)


@pytest.mark.skipif(build.unavailable() is not None, reason="no CPU kernels")
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 250), st.integers(1, 21), st.integers(1, 14), st.sampled_from([(1, 1), (3, 4), (12, 16), (8, 16)])
)
def test_rows_that_share_columns(tokens: int, rows: int, groups: int, pattern: tuple[int, int]) -> None:
    torch.manual_seed(tokens)
    n, m = pattern
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        mask = _mask(rows, groups, n, m, alike=True)
        weight = (torch.randn(rows, groups * m) * mask).to(dtype)
        x, bias = torch.randn(tokens, groups * m).to(dtype), torch.randn(rows).to(dtype)
        packed = layouts.pack(weight, mask, n, m, layouts.ROWS)
        actual = ops.nm_gemm(x, *packed, bias, None, rows, n, m, layouts.ROWS, "none")
        expected = x.double() @ weight.double().T + bias.double()
        size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        assert bool(((actual.double() - expected).abs() <= bound * size).all())
