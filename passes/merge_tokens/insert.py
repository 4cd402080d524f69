"""Merge tokens: insert ToMe after the attention residual of every block (Bolya et al., arXiv 2210.09461).

Sites are anchored on attention, fused or written out. From there the graph leads to the attention residual, the first
addition whose other operand is an ancestor of the query. The merge follows it, and ``log(size)`` is added to the logits
of every later attention. After the first merge the token axis is followed by dataflow, never by its length: token
counts in reshapes are rewritten, values per token (position embeddings, rotary tables) are averaged over the tokens
that merged, and an op that cannot be followed is refused by name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from mpcompile.config import Config
from mpcompile.errors import GraphError, NotEligibleError
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import shape_of
from mpcompile.kernels import ops, schema
from mpcompile.passes.base import UNRECORDED, Context, Decision, Pass
from mpcompile.passes.merge_tokens.axis import Level, TokenAxis
from mpcompile.passes.merge_tokens.ends import count_ends
from mpcompile.passes.merge_tokens.idle_masks import drop, idle_masks
from mpcompile.passes.merge_tokens.outputs import named_outputs
from mpcompile.passes.merge_tokens.saliency import METHODS, Pairs, metric, weigh
from mpcompile.passes.merge_tokens.schedules.solve import merges, solve
from mpcompile.passes.merge_tokens.schedules.stream import Stream
from mpcompile.passes.merge_tokens.sites import Site, find_sites, find_streams, key_mask, opaque_attentions
from mpcompile.passes.merge_tokens.turned import sequence_first, turn
from mpcompile.plan import Plan, is_lowered


def insert_merges(gm: IRModule, sites: Sequence[Site], stream: Stream, proportional: bool, pairs: Pairs) -> TokenAxis:
    """Insert the merges of one stream into a graph, and rewrite the nodes after them.

    Args:
        sites: the blocks of the stream.
        stream: how many tokens merge in each; a block that merges nothing is skipped.
        proportional: True to add log(size) to attention logits.
        pairs: how pairs of tokens are chosen and merged.

    Raises:
        GraphError: an op after a merge cannot be followed.
    """
    graph, numbers = gm.graph, stream.tokens
    original = list(graph.nodes)
    mask = key_mask(list(sites))
    if mask is not None and not proportional:
        raise GraphError(
            "the sizes of merged tokens carry the attention mask",
            layer=mask.name,
            expected="tome_proportional=True for a model with an attention mask",
            found="False",
        )
    levels: dict[fx.Node, Level] = {}
    merges: dict[fx.Node, Site] = {}
    first: fx.Node | None = None
    level: Level | None = None
    for block, site in enumerate(sites):
        if numbers[block + 1] == numbers[block]:
            continue
        users = list(site.residual.users)
        with graph.inserting_before(site.residual.next):
            if first is None:
                first = graph.call_function(ops.token_size, tuple(schema.TokenSizeArgs(site.residual, mask)))
            size = first if level is None else level.size
            args = schema.TokenMergeArgs(
                x=site.residual,
                keys=metric(graph, site, pairs),
                size=size,
                r=stream.r[block],
                prefix=stream.prefix,
                suffix=stream.suffix,
                size_weight=pairs.size,
                keep_norm=pairs.keep_norm,
            )
            merge = graph.call_function(ops.token_merge, args.shortest())
            merges[merge] = site
            tokens, after, step = (graph.call_function(operator.getitem, (merge, i)) for i in range(3))
        tokens.meta["mpcompile.original"] = site.residual
        for user in users:
            user.replace_input_with(site.residual, tokens)
        level = Level(tokens, after, step, numbers[block + 1], level)
        levels[tokens] = level
    assert first is not None  # callers merge in at least one block
    axis = TokenAxis(gm, levels, first, numbers[0], stream.prefix, stream.suffix, mask, proportional)
    axis.follow(original)
    rows = axis.picked_after(sites[-1].residual)
    if rows and pairs.saliency:
        weigh(graph, merges, rows, pairs, proportional)
    for node in [level.step for level in levels.values() if not level.step.users]:
        graph.erase_node(node)
    return axis


def _trial(gm: IRModule) -> tuple[IRModule, dict[fx.Node, fx.Node]]:
    """Return a copy of a graph for trial edits, which shares its tensors, and a map from each node to its copy."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    return IRModule(gm, graph), copies


def _prepared(gm: IRModule, idle: Mapping[fx.Node, fx.Node | None]) -> IRModule:
    """Return the graph, or a copy without idle masks and with streams that :func:`turn` has turned if it has any."""
    if not idle and not sequence_first(gm):
        return gm
    trial, copies = _trial(gm)
    drop(trial, {copies[node]: None if source is None else copies[source] for node, source in idle.items()})
    turn(trial)
    return trial


def merging_cost(gm: IRModule, ctx: Context, streams: Sequence[Stream]) -> Callable[[Sequence[Sequence[int]]], float]:
    """Return the multiply-accumulates of a graph as a function of the tokens of each stream.

    N:M masks are not counted. The nodes must carry ``macs`` (see :func:`mpcompile.ir.shapes.propagate`).

    Args:
        streams: the streams that merge, with their ``sites``, ``prefix``, ``suffix`` and first number of ``tokens``.

    Returns:
        A function of one list per stream: its tokens before the first block and after each.
    """
    trial, copies = _trial(gm)
    axes = [_tried(trial, stream, ctx.config) for stream in streams]
    terms = []
    for node in copies.values():
        macs = node.meta.get("macs", 0)
        if macs:
            places = [
                (number, stream.tokens[0] - level.count, start)
                for number, (stream, axis) in enumerate(zip(streams, axes, strict=True))
                for level, start in axis.extents.get(node, [])
            ]
            terms.append((macs, places))

    def cost(numbers: Sequence[Sequence[int]]) -> float:
        return sum(
            macs * math.prod((numbers[i][block] - start) / (numbers[i][0] - start) for i, block, start in places)
            for macs, places in terms
        )

    return cost


def _tried(trial: IRModule, stream: Stream, config: Config) -> TokenAxis:
    """Merge one token in each block of a stream, in a copy of the graph; level ``i`` holds the tokens after block i."""
    sites = _sites_of(trial, stream)
    one = [1] * len(sites)
    numbers = [stream.tokens[0] - i for i in range(len(sites) + 1)]
    return _inserted(trial, sites, replace(stream, r=one, tokens=numbers), config)


def _inserted(gm: IRModule, sites: Sequence[Site], stream: Stream, config: Config) -> TokenAxis:
    return insert_merges(gm, sites, stream, config.tome_proportional, METHODS[config.tome_method])


def _sites_of(gm: IRModule, stream: Stream) -> list[Site]:
    names = set(stream.sites)
    return [site for site in find_sites(gm)[0] if site.name in names]


def _ends(gm: IRModule, site: Site, ctx: Context) -> tuple[int, int]:
    """Return the number of tokens in front and behind that never merge, as found in the graph or as configured."""
    given = ctx.config.prefix_tokens
    try:
        prefix, suffix = count_ends(gm, site, ctx.lifted)
    except GraphError:
        if given is None:
            raise
        return given, 0
    return prefix if given is None else given, suffix


def unmerged(plan: Plan) -> list[str]:
    """Return the reasons why nothing merged although merging was requested; empty if tokens merged or it was not."""
    last = [record.decision for record in plan.passes if record.name == MergeTokens.name][-1:]
    return [decision["reason"] for decision in last if decision.get("reason")]


@dataclass(frozen=True, eq=False)
class Merges(Decision):
    """The blocks in which tokens merge, and how many merge there.

    Attributes:
        streams: the streams of tokens that merge; empty if nothing merges.
        already: True if the graph merges tokens already.
        reason: why nothing merges although merging was requested.
        left: for each stream that does not merge although another does, its blocks and the reason.
        idle: masking step without effect -> the logits that replace it; attention whose mask is removed -> None.
    """

    streams: tuple[Stream, ...] = ()
    already: bool = False
    reason: str | None = None
    left: tuple[str, ...] = ()
    idle: Mapping[str, str | None] = field(default_factory=dict, metadata=UNRECORDED)

    def record(self) -> dict[str, Any]:
        """Return the one stream's fields side by side, or the list ``streams`` if several merge."""
        first = [stream.record() for stream in self.streams or (Stream(),)]
        values: dict[str, Any] = first[0] if len(first) == 1 else {"streams": first}
        optional = {"already": self.already, "reason": self.reason, "left": list(self.left)}
        return {**values, **{key: value for key, value in optional.items() if value}}


class MergeTokens(Pass):
    """Token merging with proportional attention in every self-attention block."""

    name = "merge_tokens"
    decision_type = Merges
    decides = True

    def check(self, gm: IRModule, ctx: Context) -> None:
        """Refuse merges that differ from those already in the graph, which stay as they are."""
        asked, known = ctx.config.to_dict(), ctx.plan.config
        if ctx.config.tome_r == 0 or not (is_lowered(gm, ctx.plan) or ctx.plan.tokens):
            return
        options = [key for key in asked if key.startswith(("tome_", "prefix_"))]
        if ctx.plan.tokens and all(asked[key] == known.get(key) for key in options):
            return
        why = "tokens merge in it already" if ctx.plan.tokens else "it is lowered"
        raise GraphError(
            f"this module cannot merge tokens as requested: {why}",
            expected="tome_r=0, which leaves the module's merges as they are",
            found=f"tome_r={ctx.config.tome_r!r}" + (f", tokens {ctx.plan.tokens}" if ctx.plan.tokens else ""),
            hint="transform the model that it was made from, with this tome_r",
        )

    def plan(self, gm: IRModule, ctx: Context) -> Merges:
        if ctx.config.tome_r == 0:
            return Merges()
        if any(node.target is ops.token_merge for node in gm.graph.nodes):
            return Merges(already=True)
        idle = idle_masks(gm, ctx.lifted)
        gm = _prepared(gm, idle)
        found, reasons = find_streams(gm)
        if not found:
            error = self._not_eligible(gm, reasons, ctx)
            if ctx.tolerant:
                return Merges(reason=str(error))
            raise error
        if ctx.tolerant and 0 in (shape_of(found[0][0].residual) or ()):
            return Merges()  # a graph for an empty batch: there is nothing to save
        streams, left = self._mergeable(gm, found, ctx)
        if ctx.config.tome_r == "auto":
            cost = merging_cost(gm, ctx, streams)
            r = solve(ctx.config.tome_reduction or 0.0, streams, ctx.config.tome_schedule, cost)
        else:
            r = merges(ctx.config, [len(stream.sites) for stream in streams])
        return Merges(
            streams=tuple(stream.merging(each) for stream, each in zip(streams, r, strict=True)),
            left=tuple(left),
            idle={node.name: None if source is None else source.name for node, source in idle.items()},
        )

    @staticmethod
    def _mergeable(gm: IRModule, found: Sequence[Sequence[Site]], ctx: Context) -> tuple[list[Stream], list[str]]:
        """Return the streams in which tokens can merge, and why they can't in the others.

        Raises:
            GraphError: they can't in any.
        """
        streams, left, errors = [], [], []
        for sites in found:
            try:
                key_mask(list(sites))
                prefix, suffix = _ends(gm, sites[0], ctx)
                tokens = (shape_of(sites[0].residual) or (0, 0))[1]
                if prefix + suffix > tokens:
                    most = tokens - suffix
                    raise GraphError("more prefix tokens than tokens", expected=f"at most {most}", found=prefix)
                stream = Stream([site.name for site in sites], [], prefix, suffix, [tokens])
                if len(found) > 1:
                    _tried(_trial(gm)[0], stream, ctx.config)
                streams.append(stream)
            except GraphError as error:
                errors.append(error)
                where = f"{error.layer}: " if error.layer else ""
                why = f"; expected {error.expected}, found {error.found}"
                left.append(f"tokens do not merge in {len(sites)} blocks: {where}{error.message}{why}")
        if not streams:
            raise errors[0]
        return streams, left

    @staticmethod
    def _not_eligible(gm: IRModule, reasons: Mapping[str, str], ctx: Context) -> NotEligibleError:
        name, why = next(iter((reasons or opaque_attentions(gm)).items()), (None, None))
        return NotEligibleError(
            f"tome_r={ctx.config.tome_r}, but there is no attention block to merge in",
            layer=name,
            expected="attention with a residual addition, on (batch, tokens, channels)",
            found=why or "no attention",
            hint="use tome_r=0 for this model",
        )

    def summary(self, decision: Merges) -> str:
        if not decision.streams:
            return "already merged" if decision.already else decision.reason or "off"
        return "; ".join(str(stream) for stream in decision.streams)

    def apply(self, gm: IRModule, decision: Merges, ctx: Context) -> bool:
        for text in (*([f"nothing merged: {decision.reason}"] if decision.reason else ()), *decision.left):
            ctx.plan.note(text)
        streams = [stream for stream in decision.streams if stream.tokens[0] != stream.tokens[-1]]
        if not streams:
            return False
        nodes = {node.name: node for node in gm.graph.nodes}
        idle = {nodes[name]: None if source is None else nodes[source] for name, source in decision.idle.items()}
        drop(gm, idle)
        turn(gm)
        blocks = [_sites_of(gm, stream) for stream in streams]
        names, spread = {node: name for name, node in named_outputs(gm).items()}, list[fx.Node]()
        for sites, stream in zip(blocks, streams, strict=True):
            axis = _inserted(gm, sites, stream, ctx.config)
            spread += axis.spread
            if METHODS[ctx.config.tome_method].saliency and not axis.picked_after(sites[-1].residual):
                ctx.plan.note("tokens merge without regard to attention: the output reads no class token on its own")
        if spread:
            told = ", ".join(dict.fromkeys(names.get(node, node.name) for node in spread))
            ctx.plan.note(f"returned for every input token, with the value of the merged token that holds it: {told}")
        ctx.plan.tokens = list(streams[0].tokens) if len(streams) == 1 else [list(s.tokens) for s in streams]
        return True
