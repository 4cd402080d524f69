"""Products with any N:M pattern on a GPU: values and bit masks (nm_format) are unpacked in registers, then multiplied.

The rank of a kept column in its group is the number of mask bits below it, which locates its value. Weights are read
packed. That saves memory, and also time if weights dominate the traffic (few tokens). The arithmetic is that
of the dense product.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ones(x):
    """Count the bits set in each int32."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit(do_not_specialize=["M"])
def expand(
    X, V, W, B, Y, M, N, K, kept, words, ldx,
    NV: tl.constexpr, MG: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Y (M, N) = X (M, K) W' + B: V (N, kept) are values, W (N, words) words of SPAN mask bits, NV of every MG kept."""
    across = tl.cdiv(N, BN)
    n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    m = tl.program_id(0) // across * BM + tl.arange(0, BM)
    steps = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + steps
        inside = (n < N)[:, None] & (k < K)[None, :]
        x = tl.load(X + m.to(tl.int64)[:, None] * ldx + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        word = tl.load(W + n.to(tl.int64)[:, None] * words + (k // SPAN)[None, :], mask=inside, other=0).to(tl.int32)
        bit, place = (k % SPAN)[None, :], (k % MG)[None, :]
        kept_here = ((word >> bit) & 1) != 0
        rank = _ones((word >> (bit - place)) & ((1 << place) - 1))
        source = (k // MG)[None, :] * NV + tl.minimum(rank, NV - 1)  # words with more bits set stay inside the row
        v = tl.load(V + n.to(tl.int64)[:, None] * kept + source, mask=kept_here & inside, other=0.0)
        acc = tl.dot(x, tl.trans(v), acc, input_precision="ieee")
    if B is not None:
        acc += tl.load(B + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = Y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, acc.to(Y.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
