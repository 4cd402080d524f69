"""Token merging in four Triton kernels; no tokens-by-tokens matrix is written to memory.

``metric`` averages keys over heads and normalises them. ``match`` finds the token of B with the highest score for every
token of A, one block of B at a time, as flash attention does. ``rank`` decides which tokens of A merge and where the
others go. ``merge`` has one program per token, which copies the token or adds the tokens that merge into it.
Conventions (ties included) and results are those of ``reference.token_merge``.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)  # reference.TINY


@triton.jit
def metric(K, U, N, heads, sb, sh, sn, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr):
    """K (B, heads, N, D), last axis contiguous -> U (B, N, D) fp32."""
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    inside = (n < N)[:, None] & (d < D)[None, :]
    mean = tl.zeros((BN, BD), tl.float32)
    for h in range(heads):
        k = tl.load(K + b * sb + h * sh + n.to(tl.int64)[:, None] * sn + d[None, :], mask=inside, other=0.0)
        mean += k.to(tl.float32)
    mean = mean / heads
    square = tl.sum(mean * mean, 1)
    unit = mean / tl.maximum(tl.sqrt(square), 1e-12)[:, None]
    unit = tl.where((square < float("inf"))[:, None], unit, 0.0)  # false for NaN, which tl.maximum would drop
    tl.store(U + (b * N + n)[:, None] * D + d[None, :], unit, mask=inside)


@triton.jit
def _scores(
    rows, of_b, a, j0, na, nb, even, odd,
    LESS_B: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Products of the tokens ``a`` of A with BB tokens of B, starting with number j0, less what these lose.

    -inf after the last token of B. ``rows`` and ``of_b`` are those of one image.
    """
    j = j0 + tl.arange(0, BB)
    scores = tl.zeros((BA, BB), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        left_there, right_there = (a < na)[:, None] & (d < D)[None, :], (j < nb)[:, None] & (d < D)[None, :]
        left = tl.load(rows + (even + 2 * a)[:, None] * D + d[None, :], mask=left_there, other=0.0)
        right = tl.load(rows + (odd + 2 * j)[:, None] * D + d[None, :], mask=right_there, other=0.0)
        scores = tl.dot(left, tl.trans(right), scores, input_precision="ieee")
    if LESS_B:
        scores -= tl.load(of_b + j, mask=j < nb, other=0.0)[None, :]
    return tl.where((j < nb)[None, :], scores, float("-inf"))


@triton.jit
def match(
    S, of_a, of_b, best, target, N, na, nb, even, odd,
    TIE: tl.constexpr, LESS_A: tl.constexpr, LESS_B: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """S (B, N, D) -> best, target (B, na): the highest score of a token of A with one of B, and the first within TIE.

    A score is a product of rows of S less ``of_a`` (B, na) and ``of_b`` (B, nb), each if LESS_A or LESS_B says so.
    Products are computed twice: which scores are within TIE of the highest is known only once the highest is.
    """
    b = tl.program_id(1).to(tl.int64)
    a = tl.program_id(0) * BA + tl.arange(0, BA)
    rows, lost = S + b * N * D, of_b + b * nb
    top = tl.full((BA,), float("-inf"), tl.float32)
    for j0 in range(0, nb, BB):
        scores = _scores(rows, lost, a, j0, na, nb, even, odd, LESS_B, D, BD, BA, BB)
        top = tl.maximum(top, tl.max(scores, 1))
    where = tl.full((BA,), 2147483647, tl.int32)
    for j0 in range(0, nb, BB):
        scores = _scores(rows, lost, a, j0, na, nb, even, odd, LESS_B, D, BD, BA, BB)
        j = j0 + tl.arange(0, BB)
        near = tl.where(scores >= (top - TIE)[:, None], j[None, :], 2147483647)
        where = tl.minimum(where, tl.min(near, 1))
    if LESS_A:
        top -= tl.load(of_a + b * na + a, mask=a < na, other=0.0)
    tl.store(best + b * na + a, top, mask=a < na)
    tl.store(target + b * na + a, where, mask=a < na)


@triton.jit
def rank(best, target, place, na, r, TIE: tl.constexpr, BA: tl.constexpr):
    """Per image: target (B, na) becomes -1 for tokens that stay; place (B, na) numbers these in order.

    The r-th highest score is the cut. Tokens above it by more than TIE merge, then the first tokens within TIE of it.
    """
    b = tl.program_id(0).to(tl.int64)
    a = tl.arange(0, BA)
    mine = tl.load(best + b * na + a, mask=a < na, other=float("-inf"))
    higher = tl.zeros((BA,), tl.int32)
    for i in range(na):
        higher += (tl.load(best + b * na + i) > mine).to(tl.int32)
    cut = tl.min(tl.where((higher < r) & (a < na), mine, float("inf")), 0)
    sure = mine > cut + TIE
    near = (mine >= cut - TIE) & (mine <= cut + TIE)
    room = r - tl.sum(sure.to(tl.int32), 0)
    stays = (mine < cut - TIE) | (near & (tl.cumsum(near.to(tl.int32), 0) > room))
    stays = stays & (a < na)
    number = tl.cumsum(stays.to(tl.int32), 0) - 1
    t = tl.load(target + b * na + a, mask=a < na, other=0)
    tl.store(target + b * na + a, tl.where(stays, -1, t), mask=a < na)
    tl.store(place + b * na + a, number, mask=a < na)


@triton.jit
def merge(
    X, size, norms, target, place, Y, new_size, N, C, na, r, prefix, even, odd, sb, sn,
    KEEP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """X (B, N, C), size (B, N) -> Y (B, N - r, C), new_size (B, N - r): one program per token and BC channels.

    With KEEP, a merged token is scaled to the mean of its parts' ``norms`` (B, N); BC is C or more. Averages are steps
    from the token's own value: one that receives nothing is unchanged, whatever its size.
    """
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    rows, sizes = X + b * sb + c, size + b * N
    targets = target + b * na
    total = tl.load(sizes + n).to(tl.float32)
    own = tl.load(rows + n.to(tl.int64) * sn, mask=c < C, other=0.0).to(tl.float32)
    lengths = norms + b * N
    step = tl.zeros((BC,), tl.float32)
    received = total * 0.0
    longer = total * 0.0
    out = n
    if n >= prefix:
        if (n - even) % 2 == 0:
            i = (n - even) // 2
            out = prefix + tl.load(place + b * na + i)
            if tl.load(targets + i) >= 0:
                out = -1
        else:
            j = (n - odd) // 2
            out = prefix + na - r + j
            for i in range(na):
                if tl.load(targets + i) == j:
                    weight = tl.load(sizes + even + 2 * i).to(tl.float32)
                    x = tl.load(rows + (even + 2 * i).to(tl.int64) * sn, mask=c < C, other=0.0)
                    step += (x.to(tl.float32) - own) * weight
                    received += weight
                    if KEEP:
                        longer += (tl.load(lengths + even + 2 * i) - tl.load(lengths + n)) * weight
    if out >= 0:
        row = b * (N - r) + out
        total += received
        average = own + step / tl.maximum(total, TINY)
        if KEEP:
            length = tl.load(lengths + n) + longer / tl.maximum(total, TINY)
            scaled = average * (length / tl.maximum(tl.sqrt(tl.sum(average * average, 0)), TINY))
            average = tl.where(received > 0, scaled, average)
        tl.store(Y + row * C + c, average.to(Y.dtype.element_ty), mask=c < C)
        if tl.program_id(2) == 0:
            tl.store(new_size + row, total.to(new_size.dtype.element_ty))
