"""The reference engine in plain torch: packed weights are unpacked at every call, and a dense operator follows.

It saves memory but not time. Every other engine is tested against it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.nm_format import MAX_M, from_rows, groups_per_word, word_count, word_dtype


def _popcount(x: Tensor) -> Tensor:
    """Count the bits set in each int32, for words whose sign bit is clear (SWAR addition)."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def _check(values: Tensor, words: Tensor, n: int, m: int, k: int) -> None:
    """Check that values and words can be those of a weight with ``k`` columns.

    Raises:
        InputError: they cannot.
    """
    good = 1 <= n <= m <= MAX_M and k >= 0 and k % m == 0 and values.dim() == words.dim() == 2
    good = good and words.dtype is word_dtype(m) and values.shape[0] == words.shape[0]
    if not good or values.shape[1] != k // m * n or words.shape[1] != word_count(k, m):
        raise InputError(
            f"packed weights do not fit {str(k)[:20]} inputs {str(n)[:20]}:{str(m)[:20]}",
            expected="tensors from nm_format.pack",
            found=f"values {tuple(values.shape)}, words {tuple(words.shape)} {words.dtype}",
        )


def unpack_rows(values: Tensor, words: Tensor, n: int, m: int, k: int) -> Tensor:
    """Unpack (values, words) of :func:`mpcompile.kernels.nm_format.pack` into dense rows (out, k).

    Column ``j`` is ``values[group * n + rank]``, where ``rank`` counts the kept columns before it in its group. All
    steps are elementwise except one gather, so that Inductor compiles them into one loop.
    """
    _check(values, words, n, m, k)
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
    """Multiply x (..., k) by a packed weight (out, k) and add a bias (out,); returns (..., out)."""
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
    """Convolve x (B, C, H, W) with a packed weight of ``shape`` (out, C/groups, kh, kw)."""
    if len(shape) != 4 or min(shape) < 0 or values.shape[:1] != (shape[0],):
        found = f"a weight {str(shape)[:60]}"
        raise InputError("packed weights do not fit a convolution", expected=f"{len(values)} rows", found=found)
    rows = unpack_rows(values, words, n, m, shape[1] * shape[2] * shape[3])
    return torch.nn.functional.conv2d(x, from_rows(rows, shape), bias, stride, padding, dilation, groups)
