"""Streams of tokens: the blocks that they pass through, and the number of tokens after each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpcompile.kernels.token_merge.reference import merged_count


def counts(tokens: int, prefix: int, merges: Sequence[int], suffix: int = 0) -> list[int]:
    """Return the number of tokens before the first block and after each one.

    Example:
        >>> counts(197, 1, [8, 8, 150])
        [197, 189, 181, 91]
    """
    ends = prefix + suffix
    return list(itertools.accumulate(merges, lambda count, r: merged_count(count, r, ends), initial=tokens))


@dataclass(frozen=True)
class Stream:
    """Tokens that pass through blocks of their own, and how many of them merge.

    Attributes:
        sites: names of the attentions of its blocks.
        r: tokens to merge, one number per block.
        prefix: number of tokens in front that never merge.
        suffix: number of tokens behind the others that never merge.
        tokens: tokens before the first block and after each one.
    """

    sites: list[str] = field(default_factory=list)
    r: list[int] = field(default_factory=list)
    prefix: int = 0
    suffix: int = 0
    tokens: list[int] = field(default_factory=list)

    def merging(self, r: Sequence[int]) -> Stream:
        """Return the stream with ``r`` tokens merged in its blocks."""
        return replace(self, r=list(r), tokens=counts(self.tokens[0], self.prefix, r, self.suffix))

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        values = {"r": self.r, "prefix": self.prefix, "sites": self.sites, "tokens": self.tokens}
        return {**values, "suffix": self.suffix} if self.suffix else values

    def __str__(self) -> str:
        tokens, r = self.tokens, self.r
        schedule = str(r[0]) if len(set(r)) == 1 else ", ".join(map(str, r))
        text = f"r = {schedule} in {len(self.sites)} blocks, tokens {tokens[0]} -> {tokens[-1]}, {self.prefix} prefix"
        clamped = [block for block, (a, b) in enumerate(itertools.pairwise(tokens)) if a - b < r[block]]
        text += f", {self.suffix} suffix" if self.suffix else ""
        return text + (f"; r clamped to half of the tokens in {len(clamped)} blocks" if clamped else "")
