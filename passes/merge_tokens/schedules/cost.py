"""Multiply-accumulates of a graph as a function of the tokens of each stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

Piece = tuple[float, frozenset[int]]
"""A piece of a node's output: its share of the elements, and the axes on which it holds a fixed number of tokens."""

WHOLE: tuple[Piece, ...] = ((1.0, frozenset()),)


@dataclass(frozen=True)
class Spared:
    """What of a graph is not computed since nothing reads it.

    Attributes:
        pieces: node -> the pieces of it that are computed; nodes that are computed in full have no entry.
        idle: for each stream, the numbers of the blocks behind which nothing reads tokens that merge.
    """

    pieces: Mapping[fx.Node, Sequence[Piece]] = field(default_factory=dict)
    idle: Sequence[frozenset[int]] = ()

    def of(self, node: fx.Node) -> Sequence[Piece]:
        """Return the pieces of a node that are computed."""
        return self.pieces.get(node, WHOLE)


@dataclass(frozen=True)
class Term:
    """Multiply-accumulates that are proportional to numbers of tokens.

    Attributes:
        macs: their number without merges.
        places: (stream, block, start) of every number: tokens after so many blocks, without the first ``start``.
    """

    macs: float
    places: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Cost:
    """The sum of terms, as a function of one list per stream: its tokens before the first block and after each.

    Example:
        >>> Cost((Term(100.0), Term(60.0, ((0, 1, 0),)))) ([[10, 5]])
        130.0
    """

    terms: tuple[Term, ...]

    def __call__(self, numbers: Sequence[Sequence[int]]) -> float:
        return sum(
            term.macs
            * math.prod((numbers[i][block] - start) / (numbers[i][0] - start) for i, block, start in term.places)
            for term in self.terms
        )


def terms(
    macs: float, pieces: Iterable[Piece], places: Sequence[tuple[int, int, int]], axes: Sequence[int | None]
) -> list[Term]:
    """Return the terms of one node.

    Args:
        macs: of the whole node, without merges.
        pieces: the pieces that are computed.
        places: the token axes that its arithmetic runs over, as in :class:`Term`.
        axes: the axis of its output that each of them is; None if it sums over the tokens.
    """
    return [
        Term(macs * share, tuple(place for place, axis in zip(places, axes, strict=True) if axis not in fixed))
        for share, fixed in pieces
    ]
