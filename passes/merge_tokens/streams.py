"""Streams: blocks that work on the same tokens, as found by following the tokens from block to block.

The towers of CLIP, the branches of CrossViT and the stages of a pyramid are streams of their own. A stream ends where
its tokens return to a grid, or are gathered into others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import fx

from mpcompile.errors import GraphError
from mpcompile.ir.nodes import shape_of
from mpcompile.passes.merge_tokens.axis import TokenAxis
from mpcompile.passes.merge_tokens.moves import State
from mpcompile.passes.merge_tokens.sites import Site, ancestors

NOTHING_SAVED = "merging saves nothing there: its tokens go back to a grid before any layer has worked on fewer of them"


class Unmerged:
    """The blocks in which tokens do not merge, counted by reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, tuple[int, str]] = {}

    def add(self, blocks: int, error: GraphError | None = None) -> None:
        """Count blocks that an error concerns, or that would gain nothing."""
        key = reason = NOTHING_SAVED
        if error is not None:
            where = f"{error.layer}: " if error.layer else ""
            key, reason = error.message, f"{where}{error.message}; expected {error.expected}, found {error.found}"
        count, reason = self.reasons.get(key, (0, reason))
        if blocks:
            self.reasons[key] = (count + blocks, reason)

    def notes(self) -> list[str]:
        """Return one sentence for each reason, with the place of the first block."""
        return [f"tokens do not merge in {count} blocks: {reason}" for count, reason in self.reasons.values()]


def _tokens(site: Site) -> int:
    return (shape_of(site.residual) or (0, 0))[1]


def group(sites: Sequence[Site], states: Callable[[Site], tuple[Mapping[fx.Node, State], bool]]) -> list[list[Site]]:
    """Group blocks by the stream of tokens that they work on. Streams and their blocks are in graph order.

    If the tokens of a block cannot be followed to the end, later blocks on as many tokens that depend on it count as
    its stream: an op that is refused there is refused for all of them.

    Args:
        sites: all blocks, in graph order.
        states: block -> the tokens that each node carries if tokens merge in this block alone, and whether they can be
            followed to the end.

    Raises:
        GraphError: a block works on merged tokens among others.
    """
    streams, remaining = [], list(sites)
    while remaining:
        first, *rest = remaining
        carried, complete = states(first) if rest else ({}, True)
        stream = [first]
        for site in rest:
            state = carried.get(site.residual)
            same = _tokens(site) == _tokens(first)
            if (state is not None and state.axes == {1: 0} and same) or (
                state is None and not complete and same and first.residual in ancestors(site.residual)
            ):
                stream.append(site)
            elif state is not None:
                raise GraphError(
                    "attention runs on more than one token axis",
                    layer=site.name,
                    expected=f"the {_tokens(first)} tokens of {first.name}, one stream through all blocks",
                    found=f"{_tokens(site)} tokens, of which those are a part",
                    hint="use tome_r=0 for this model",
                )
        streams.append(stream)
        remaining = [site for site in rest if site not in stream]
    return streams


def useful(sites: Sequence[Site], walk: TokenAxis) -> list[Site]:
    """Return the blocks after which a layer works on fewer tokens; all if none of the tokens go back to a grid.

    Args:
        sites: the blocks of a stream.
        walk: the walk over a graph in which a token merges in each of them.
    """
    if not walk.left:
        return list(sites)
    working = {id(level) for node, places in walk.extents.items() if node.meta.get("macs", 0) for level, *_ in places}
    return [site for site, level in zip(sites, walk.levels.values(), strict=True) if id(level) in working]
