"""The N:M weight format: which weights are legal, and how they are packed.

The format is defined on a weight's *execution layout*, a matrix whose columns are in the order in which a kernel reads
them. A linear weight (out, in) is its own execution layout. A convolution weight (out, in/groups, kh, kw) becomes
(out, kh * kw * in/groups) with input channels fastest (KRSC), so that a group of M columns is M input channels at one
kernel tap. A weight is N:M if every group of M consecutive columns has at most N nonzero values.

A packed weight stores the N values of each group, and a bit mask with one bit per column. The bits of
``groups_per_word(m)`` groups share an integer of 8, 16 or 32 bits.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor

from mpcompile.errors import ConfigError, InputError

MAX_M = 32
_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


class Pattern(NamedTuple):
    """An N:M sparsity pattern: ``n`` of every ``m`` consecutive input values are kept.

    Example:
        >>> Pattern.parse("8:16").density
        0.5
    """

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse ``"N:M"``.

        Raises:
            ConfigError: the text has another form, or 1 <= N <= M <= 32 does not hold.
        """
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(
                f"pattern {text!r} is not an N:M pattern",
                expected="'N:M' (keep N of every M) such as '2:4', or 'dense'",
                hint="for example Config(pattern='8:16')",
            )
        n, m = int(match[1]), int(match[2])
        if not 1 <= n <= m <= MAX_M:
            raise ConfigError(
                f"pattern '{n}:{m}' cannot be met",
                expected=f"1 <= N <= M <= {MAX_M}",
                found=f"N = {n}, M = {m}",
                hint="N:M keeps N of every M values, so 2:4 keeps half of them",
            )
        return cls(n, m)

    @property
    def density(self) -> float:
        """Fraction of the values that are kept."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def to_rows(weight: Tensor) -> Tensor:
    """Return the execution layout (out, K) of a weight (out, in) or (out, in/groups, kh, kw); a view if linear."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def from_rows(rows: Tensor, shape: torch.Size | list[int] | tuple[int, ...]) -> Tensor:
    """Return the weight of ``shape`` whose execution layout is ``rows`` (out, K): the inverse of :func:`to_rows`."""
    if len(shape) == 2:
        return rows
    out, cin, kh, kw = shape
    return rows.reshape(out, kh, kw, cin).permute(0, 3, 1, 2)


def group_axis(shape: torch.Size | tuple[int, ...]) -> int:
    """Return the length of the axis that groups of M must divide: input features, or input channels at one tap."""
    return int(shape[1])


def check_nm(weight: Tensor, n: int, m: int) -> int:
    """Count the groups of ``m`` columns with more than ``n`` nonzeros in the execution layout; 0 means legal N:M.

    If the group axis is not a multiple of ``m``, every row counts as one violation.

    Example:
        >>> check_nm(torch.tensor([[1.0, 0.0, 2.0, 0.0]]), 2, 4)
        0
    """
    if group_axis(weight.shape) % m:
        return int(weight.shape[0])
    kept = (to_rows(weight) != 0).unflatten(-1, (-1, m))
    return int((kept.sum(-1, dtype=torch.uint8) > n).sum())


def word_dtype(m: int) -> torch.dtype:
    """Return the smallest integer type that holds the bits of one group."""
    return torch.uint8 if m <= 8 else torch.int16 if m <= 16 else torch.int32


def groups_per_word(m: int) -> int:
    """Return the number of groups of ``m`` bits that share a word: 2 for 2:4 (8 bits), 1 for 6:12 (16 bits)."""
    return word_dtype(m).itemsize * 8 // m


def word_count(k: int, m: int) -> int:
    """Return the number of words in a row of ``k`` columns."""
    return -(-k // (groups_per_word(m) * m))


def pack(weight: Tensor, mask: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Pack a weight under a mask.

    Args:
        weight: (out, in) or (out, in/groups, kh, kw), any floating dtype.
        mask: boolean, of the weight's shape, with exactly ``n`` of every ``m`` columns set in the execution layout.

    Returns:
        ``values`` (out, K * n / m) in the weight's dtype, and ``words`` (out, word_count(K, m)). Bit ``p`` of a word
        is the mask of the ``p``-th column that the word covers.

    Raises:
        InputError: the mask does not keep exactly ``n`` of every ``m``.

    Example:
        >>> w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> pack(w, w > 2, 2, 4)
        (tensor([[3., 4.]]), tensor([[12]], dtype=torch.uint8))
    """
    rows, kept = to_rows(weight), to_rows(mask)
    out, k = rows.shape
    if weight.shape != mask.shape or k % m or group_axis(weight.shape) % m:
        raise InputError(
            f"a weight {tuple(weight.shape)} cannot be packed {n}:{m}",
            expected=f"a mask of the same shape whose groups of {m} tile axis 1",
            found=f"mask {tuple(mask.shape)}",
        )
    counts = kept.unflatten(-1, (-1, m)).sum(-1, dtype=torch.uint8)
    if not bool((counts == n).all()):
        bad = int((counts != n).sum())
        raise InputError(
            f"the mask is not {n}:{m}",
            expected=f"exactly {n} of every {m} kept",
            found=f"{bad} of {counts.numel()} groups with another count",
        )
    values = rows[kept].reshape(out, k // m * n)
    span = groups_per_word(m) * m
    bits = torch.nn.functional.pad(kept, (0, word_count(k, m) * span - k)).unflatten(-1, (-1, span))
    words = torch.zeros(bits.shape[:2], dtype=torch.int64, device=weight.device)
    for p in range(span):  # one bit plane at a time, to avoid a temporary of 8 bytes per weight
        words |= bits[..., p].to(torch.int64) << p
    if words.numel() and span == 32:
        words = torch.where(words >= 2**31, words - 2**32, words)
    elif span == 16:
        words = torch.where(words >= 2**15, words - 2**16, words)
    return values.contiguous(), words.to(word_dtype(m))


def packed_bytes(shape: torch.Size | tuple[int, ...], itemsize: int, n: int, m: int) -> int:
    """Return the size in bytes of a packed weight: values and words."""
    k = 1
    for axis in shape[1:]:
        k *= int(axis)
    return int(shape[0]) * (k // m * n * itemsize + word_count(k, m) * word_dtype(m).itemsize)
