"""What dead tokens spare: pieces of nodes that are not computed, and blocks in which merging is pointless."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import shape_of
from mpcompile.passes.base import Context, Request
from mpcompile.passes.dead_tokens.boxes import share
from mpcompile.passes.dead_tokens.demand import Demand, find_demand
from mpcompile.passes.merge_tokens.schedules.cost import Piece, Spared
from mpcompile.passes.merge_tokens.schedules.stream import Stream

_TOKENS = 1  # axis of a stream (batch, tokens, channels)


def find_spared(gm: IRModule, ctx: Context, streams: Sequence[Stream], blocks: Sequence[Sequence[fx.Node]]) -> Spared:
    """Return what a later pass of the run spares, since nothing reads it; nothing if no pass does.

    Args:
        gm: the graph without merges, whose nodes carry shapes and ``macs``.
        streams: the streams that merge.
        blocks: for each stream, the node of its tokens in each block, where a merge would follow.
    """
    if Request.SPARED not in ctx.requests or not ctx.config.skip_dead_tokens:
        return Spared()
    demand = find_demand(gm, ctx.lifted)
    pieces = {
        node: _pieces(node, demand) for node in gm.graph.nodes if node.meta.get("macs") and shape_of(node) is not None
    }
    idle = [
        frozenset(block for block, node in enumerate(nodes) if _only_ends(node, demand, stream))
        for stream, nodes in zip(streams, blocks, strict=True)
    ]
    return Spared(pieces, idle)


def _pieces(node: fx.Node, demand: Demand) -> list[Piece]:
    shape = shape_of(node) or ()
    return [(share(part, shape), frozenset(axis for axis, _ in part)) for part in demand.parts.get(node, ())]


def _only_ends(node: fx.Node, demand: Demand, stream: Stream) -> bool:
    """Return True if nothing reads other tokens of a node than those in front and behind that never merge."""
    for part in demand.parts.get(node, ()):
        runs = dict(part).get(_TOKENS)
        if runs is None or any(not _at_ends(run, stream) for run in runs):
            return False
    return True


def _at_ends(run: tuple[int, int], stream: Stream) -> bool:
    """Return True if a run of indices, counted from the end where it starts below 0, holds no token that merges."""
    start, stop = run
    if start < 0:
        return -start <= stream.suffix
    return stop <= stream.prefix or start >= stream.tokens[0] - stream.suffix
