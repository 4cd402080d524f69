"""The reference engine: packed values are spread out again at every call, in plain torch, and a dense op follows.

It saves memory, not time. Every other engine is checked against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpcompile.kernels.nm_format import from_rows, groups_per_word


def _popcount(x: Tensor) -> Tensor:
    """Bits set in each int32, for words whose sign bit is clear (SWAR addition)."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def unpack_rows(values: Tensor, words: Tensor, n: int, m: int, k: int) -> Tensor:
    """(values, words) of :func:`mpcompile.kernels.nm_format.pack` -> dense rows (out, k).

    Column ``j`` holds ``values[group * n + rank]`` where ``rank`` counts the kept columns before it in its group. All
    of it is elementwise but one gather, so that Inductor makes one loop of it.
    """
    span = groups_per_word(m) * m
    j = torch.arange(k, device=values.device, dtype=torch.int32)
    place = j % span  # of column j in its word
    before = place - place % m  # columns of earlier groups in the same word
    word = words.to(torch.int32)[:, j // span]
    one = torch.ones_like(place)
    earlier = ((one << place) - 1) & ~((one << before) - 1)
    kept = (word >> place) & 1
    index = j // m * n + _popcount(word & earlier)
    # An unkept column may count up to n columns before it: clamp to stay inside the row.
    dense = values.gather(1, index.clamp(max=values.shape[1] - 1).long())
    return torch.where(kept.bool(), dense, torch.zeros((), dtype=values.dtype, device=values.device))


def nm_linear(x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, n: int, m: int, k: int) -> Tensor:
    """x (..., k) times the packed weight (out, k), plus bias (out,) -> (..., out)."""
    return torch.nn.functional.linear(x, unpack_rows(values, words, n, m, k), bias)


def nm_conv2d(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    n: int,
    m: int,
    shape: list[int],
) -> Tensor:
    """x (B, C, H, W) convolved with the packed weight of ``shape`` (out, C/groups, kh, kw)."""
    rows = unpack_rows(values, words, n, m, shape[1] * shape[2] * shape[3])
    return torch.nn.functional.conv2d(x, from_rows(rows, shape), bias, stride, padding, dilation, groups)
