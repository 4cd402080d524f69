"""N:M masks as numbers: a group of M weights has C(M, N) possible masks; each is stored as its rank among them.

Ranks follow the combinatorial number system: a mask that keeps the places p_1 < ... < p_N has the rank
C(p_1, 1) + ... + C(p_N, N). C(M, N) is not a power of two, so several groups share one number of at most 63 bits (17
groups of 2:4 take 44 bits, 3 of 8:16 take 41). The numbers are concatenated without padding, lowest bit first. A mask
takes 0.65 bits per weight at 2:4 and 0.85 bits at 8:16. Any code that can be decoded yields legal N:M masks.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from mpcompile.artifact.opset import Refusal

Masks = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]


def encode(kept: Masks, n: int) -> Bytes:
    """Return the code of masks, as bytes.

    Args:
        kept: (groups, M) booleans, True where a weight is kept; ``n`` per group.
        n: weights kept per group.

    Example:
        >>> encode(np.array([[True, True, False, False]]), 2), encode(np.array([[False, False, True, True]]), 2)
        (array([0, 0, 0, 0, 0, 0], dtype=uint8), array([5, 0, 0, 0, 0, 0], dtype=uint8))
    """
    groups, m = kept.shape
    together, bits = _numbers(n, m)
    ranks = np.zeros(-(-groups // together) * together, np.int64)
    rank, seen = ranks[:groups], np.zeros(groups, np.int64)
    for place in range(m):
        seen += kept[:, place]
        rank += np.where(kept[:, place], _binomials(place, n)[seen], 0)
    numbers = ranks.reshape(-1, together) @ _powers(n, m)
    planes = np.unpackbits(numbers.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    return np.packbits(planes[:, :bits].ravel(), bitorder="little")


def decode(code: Bytes, groups: int, n: int, m: int) -> Masks:
    """Return the masks (groups, m) that :func:`encode` wrote.

    Raises:
        Refusal: the bytes do not encode such masks.
    """
    together, bits = _numbers(n, m)
    count = -(-groups // together)
    if len(code) != length(groups, n, m):
        raise Refusal("its mask has the wrong length", expected=f"{length(groups, n, m)} bytes", found=str(len(code)))
    planes = np.unpackbits(code, bitorder="little")
    if planes[count * bits :].any():
        raise Refusal("its mask has bits beyond its last group")
    words = np.zeros((count, 64), np.uint8)
    words[:, :bits] = planes[: count * bits].reshape(count, bits)
    numbers = np.packbits(words, axis=1, bitorder="little").view("<u8")[:, 0].astype(np.int64)
    masks = math.comb(m, n)
    ranks = numbers[:, None] // _powers(n, m) % masks
    if (numbers >= masks**together).any() or ranks.ravel()[groups:].any():
        raise Refusal(f"its mask is not one of the {masks} that a group can have", expected=f"{n} of {m}")
    rank, left = ranks.ravel()[:groups], np.full(groups, n, np.int64)
    kept = np.empty((groups, m), np.bool_)
    for place in reversed(range(m)):
        step = _binomials(place, n)[left]
        kept[:, place] = (left > 0) & (rank >= step)
        rank = np.where(kept[:, place], rank - step, rank)
        left -= kept[:, place]
    return kept


def length(groups: int, n: int, m: int) -> int:
    """Return the length of the code of ``groups`` masks, in bytes."""
    together, bits = _numbers(n, m)
    return -(-(-(-groups // together) * bits) // 8)


@functools.cache
def _numbers(n: int, m: int) -> tuple[int, int]:
    """Return how many groups share a number, and its bits, chosen so that a group takes the fewest bits."""
    masks = math.comb(m, n)
    sizes = [(together, (masks**together - 1).bit_length()) for together in range(1, 64)]
    return min((size for size in sizes if size[1] <= 63), key=lambda size: size[1] / size[0])


@functools.cache
def _powers(n: int, m: int) -> npt.NDArray[np.int64]:
    """Return the factor of each rank in a number: powers of C(m, n)."""
    return np.array([math.comb(m, n) ** place for place in range(_numbers(n, m)[0])], np.int64)


@functools.cache
def _binomials(place: int, n: int) -> npt.NDArray[np.int64]:
    """C(place, 0), ..., C(place, n)."""
    return np.array([math.comb(place, count) for count in range(n + 1)], np.int64)
