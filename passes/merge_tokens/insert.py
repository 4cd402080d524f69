"""Merge tokens after the attention residual of every block (ToMe: Bolya et al., arXiv 2210.09461).

Sites are anchored on attention, fused or written out. From there the graph leads to the attention residual, the first
addition whose other operand is an ancestor of the query. The merge follows it, and ``log(size)`` is added to the logits
of every later attention. After the first merge the token axis is followed by dataflow, never by its length: token
counts in reshapes are rewritten, values per token (position embeddings, rotary tables) are averaged over the tokens
that merged, and an op that cannot be followed is refused by name.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from mpcompile.config import Config
from mpcompile.errors import GraphError, NotEligibleError
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import shape_of
from mpcompile.kernels import ops, schema
from mpcompile.passes.base import UNRECORDED, Context, Decision, Pass
from mpcompile.passes.decision import encode
from mpcompile.passes.merge_tokens.axis import Level, TokenAxis
from mpcompile.passes.merge_tokens.biases.fixed import mark_biases
from mpcompile.passes.merge_tokens.ends import count_ends
from mpcompile.passes.merge_tokens.grids.turned import part_rows, rows_of_norms, turn, turnable
from mpcompile.passes.merge_tokens.idle_masks import drop, idle_masks
from mpcompile.passes.merge_tokens.moves import State
from mpcompile.passes.merge_tokens.outputs import named_outputs, notes
from mpcompile.passes.merge_tokens.saliency import METHODS, Method, follow_keys, metric, weigh
from mpcompile.passes.merge_tokens.schedules.choose import choose
from mpcompile.passes.merge_tokens.schedules.cost import Cost, Spared, Term, terms
from mpcompile.passes.merge_tokens.schedules.search import Search
from mpcompile.passes.merge_tokens.schedules.solve import Budget, Schedule, merges
from mpcompile.passes.merge_tokens.schedules.spared import find_spared
from mpcompile.passes.merge_tokens.schedules.stream import Stream
from mpcompile.passes.merge_tokens.sites import Site, find_sites, key_mask, opaque_attentions, other_softmax
from mpcompile.passes.merge_tokens.streams import NOTHING_SAVED, Unmerged, group, useful
from mpcompile.plan import Plan, is_lowered


def insert_merges(
    gm: IRModule,
    sites: Sequence[Site],
    stream: Stream,
    proportional: bool,
    method: Method,
    states: dict[fx.Node, State] | None = None,
) -> TokenAxis:
    """Insert the merges of one stream into a graph, and rewrite the nodes after them.

    Args:
        sites: the blocks of the stream.
        stream: how many tokens merge in each; a block that merges nothing is skipped.
        proportional: True to add log(size) to attention logits.
        method: how pairs of tokens are chosen and merged.
        states: filled with the tokens that each node carries, also if a later op cannot be followed.

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
                keys=metric(graph, site, method),
                size=size,
                r=stream.r[block],
                prefix=stream.prefix,
                suffix=stream.suffix,
                size_weight=method.size,
                keep_norm=method.keep_norm,
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
    axis.states = axis.states if states is None else states
    axis.follow(original)
    rows = axis.picked_after(sites[-1].residual)
    follow_keys(axis, merges, bool(rows and method.saliency))
    if rows and method.saliency:
        weigh(graph, merges, rows, method, proportional)
    for node in [level.step for level in levels.values() if not level.step.users]:
        graph.erase_node(node)
    return axis


def _trial(gm: IRModule) -> tuple[IRModule, dict[fx.Node, fx.Node]]:
    """Return a copy of a graph for trial edits, which shares its tensors, and a map from each node to its copy."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    graph.set_codegen(gm.graph._codegen)
    return IRModule(gm, graph), copies


def _prepared(gm: IRModule, idle: Mapping[fx.Node, fx.Node | None]) -> IRModule:
    """Return the graph, or a copy without idle masks and with streams that :func:`turn` has turned if it has any."""
    if not idle and not turnable(gm) and not rows_of_norms(gm):
        return gm
    trial, copies = _trial(gm)
    drop(trial, {copies[node]: None if source is None else copies[source] for node, source in idle.items()})
    part_rows(trial)
    turn(trial)
    return trial


def _grouped(gm: IRModule, sites: Sequence[Site], ctx: Context) -> list[list[Site]]:
    """Group blocks by the stream that they work on: those to which the tokens can be followed from the first."""

    def states(site: Site) -> tuple[dict[fx.Node, State], bool]:
        trial, copies = _trial(gm)
        carried: dict[fx.Node, State] = {}
        tokens, complete = (shape_of(site.residual) or (0, 0))[1], False
        with contextlib.suppress(GraphError):  # the reason to refuse it is found again, for the whole stream
            stream = Stream([site.name], [1], *_ends(gm, site, ctx), [tokens, tokens - 1])
            proportional, method = ctx.config.tome_proportional, METHODS["tome"]
            insert_merges(trial, _sites_of(trial, stream), stream, proportional, method, carried)
            complete = True
        return {node: carried[copied] for node, copied in copies.items() if copied in carried}, complete

    return group(sites, states)


def merging_cost(gm: IRModule, ctx: Context, streams: Sequence[Stream], spared: Spared | None = None) -> Cost:
    """Return the multiply-accumulates of a graph as a function of the tokens of each stream.

    N:M masks are not counted. The nodes must carry ``macs`` (see :func:`mpcompile.ir.shapes.propagate`).

    Args:
        streams: the streams that merge, with their ``sites``, ``prefix``, ``suffix`` and first number of ``tokens``.
        spared: what is not computed since nothing reads it; None if all is.
    """
    trial, copies = _trial(gm)
    axes = [_tried(trial, stream, ctx.config) for stream in streams]
    found: list[Term] = []
    for node, copied in copies.items():
        extents = [
            ((number, stream.tokens[0] - level.count, start), axis)
            for number, (stream, walk) in enumerate(zip(streams, axes, strict=True))
            for level, start, axis in walk.extents.get(copied, [])
        ]
        if node.meta.get("macs", 0):
            places, along = [place for place, _ in extents], [axis for _, axis in extents]
            found += terms(node.meta["macs"], (spared or Spared()).of(node), places, along)
    return Cost(tuple(found))


def _chosen(gm: IRModule, ctx: Context, streams: Sequence[Stream]) -> tuple[Schedule, str, Search | None]:
    """Return the schedule, and for ``tome_r="auto"`` how it was chosen, and the search for it."""
    if ctx.config.tome_r != "auto":
        return merges(ctx.config, [len(stream.sites) for stream in streams]), "", None
    spared = find_spared(gm, ctx, streams, [[site.residual for site in _sites_of(gm, stream)] for stream in streams])
    dense = float(sum(node.meta.get("macs", 0) for node in gm.graph.nodes))
    cost = merging_cost(gm, ctx, streams, spared)
    budget = Budget(ctx.config.tome_reduction or 0.0, dense, cost, streams, spared.idle)

    def inserted(schedule: Schedule) -> IRModule:
        trial = _trial(gm)[0]
        for stream, r in zip(streams, schedule, strict=True):
            if any(r):
                _inserted(trial, _sites_of(trial, stream), stream.merging(r), ctx.config)
        trial.recompile()
        return trial

    whole = ctx.imported(inserted(tuple((0,) * len(stream.sites) for stream in streams)))
    return choose(ctx.config, budget, whole, ctx.calibration, inserted, ctx.seed)


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


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say how tokens merge; ``"auto"`` as the schedule of a number is constant."""
    options = {key: value for key, value in config.items() if key.startswith(("tome_", "prefix_"))}
    if options["tome_schedule"] == "auto" and options["tome_r"] != "auto":
        options["tome_schedule"] = "constant"
    return options


@dataclass(frozen=True, eq=False)
class Merges(Decision):
    """The blocks in which tokens merge, and how many merge there.

    Attributes:
        streams: the streams of tokens that merge; empty if nothing merges.
        already: True if the graph merges tokens already.
        reason: why nothing merges although merging was requested.
        left: for each stream that does not merge although another does, its blocks and the reason.
        idle: masking step without effect -> the logits that replace it; attention whose mask is removed -> None.
        choice: how the schedule of ``tome_r="auto"`` was chosen.
        search: the search for it on calibration data.
    """

    streams: tuple[Stream, ...] = ()
    already: bool = False
    reason: str | None = None
    left: tuple[str, ...] = ()
    idle: Mapping[str, str | None] = field(default_factory=dict, metadata=UNRECORDED)
    choice: str = ""
    search: Search | None = None

    def record(self) -> dict[str, Any]:
        """Return the one stream's fields side by side, or the list ``streams`` if several merge."""
        first = [stream.record() for stream in self.streams or (Stream(),)]
        values: dict[str, Any] = first[0] if len(first) == 1 else {"streams": first}
        optional = {"already": self.already, "reason": self.reason, "left": list(self.left), "choice": self.choice}
        optional["search"] = None if self.search is None else encode(self.search)
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
        wanted, made = _options(asked), _options({**Config().to_dict(), **known})
        if ctx.plan.tokens and wanted == made:
            return
        changed = [key for key in wanted if wanted[key] != made[key]] if ctx.plan.tokens else ["tome_r"]
        why = "tokens merge in it already" if ctx.plan.tokens else "it is lowered"
        raise GraphError(
            f"this module cannot merge tokens as requested: {why}",
            expected="tome_r=0, which leaves the module's merges as they are",
            found=", ".join(f"{key}={asked[key]!r}" for key in changed)
            + (f", tokens {ctx.plan.tokens}" if ctx.plan.tokens else ""),
            hint="transform the model that it was made from, with this tome_r",
        )

    def plan(self, gm: IRModule, ctx: Context) -> Merges:
        if ctx.config.tome_r == 0:
            return Merges()
        if any(node.target is ops.token_merge for node in gm.graph.nodes):
            return Merges(already=True)
        idle = idle_masks(gm, ctx.lifted)
        mark_biases(gm, ctx.lifted)
        gm = _prepared(gm, idle)
        sites, reasons = find_sites(gm)
        found = _grouped(gm, sites, ctx)
        if not found:
            error = self._not_eligible(gm, reasons, ctx)
            if ctx.tolerant:
                return Merges(reason=str(error))
            raise error
        if ctx.tolerant and 0 in (shape_of(found[0][0].residual) or ()):
            return Merges()  # a graph for an empty batch: there is nothing to save
        streams, left = self._mergeable(gm, found, ctx)
        if not streams:
            error = self._not_eligible(gm, {found[0][0].name: NOTHING_SAVED}, ctx)
            if ctx.tolerant:
                return Merges(reason=str(error))
            raise error
        r, choice, result = _chosen(gm, ctx, streams)
        return Merges(
            streams=tuple(stream.merging(each) for stream, each in zip(streams, r, strict=True)),
            left=tuple(left),
            idle={node.name: None if source is None else source.name for node, source in idle.items()},
            choice=choice,
            search=result,
        )

    @staticmethod
    def _mergeable(gm: IRModule, found: Sequence[Sequence[Site]], ctx: Context) -> tuple[list[Stream], list[str]]:
        """Return the streams in which tokens can merge, and why they can't in the others.

        Raises:
            GraphError: they can't in any.
        """
        streams, errors, left = list[Stream](), list[GraphError](), Unmerged()
        for sites in found:
            try:
                key_mask(list(sites))
                prefix, suffix = _ends(gm, sites[0], ctx)
                tokens = (shape_of(sites[0].residual) or (0, 0))[1]
                if prefix + suffix > tokens:
                    most = tokens - suffix
                    raise GraphError("more prefix tokens than tokens", expected=f"at most {most}", found=prefix)
                stream = Stream([site.name for site in sites], [], prefix, suffix, [tokens])
                kept = useful(sites, _tried(_trial(gm)[0], stream, ctx.config))
                if kept:
                    streams.append(replace(stream, sites=[site.name for site in kept]))
                left.add(len(sites) - len(kept))
            except GraphError as error:
                errors.append(error)
                left.add(len(sites), error)
        if errors and not streams:
            raise errors[0]
        return streams, left.notes()

    @staticmethod
    def _not_eligible(gm: IRModule, reasons: Mapping[str, str], ctx: Context) -> NotEligibleError:
        name, why = next(iter((reasons or opaque_attentions(gm)).items()), (None, None))
        return NotEligibleError(
            f"tome_r={ctx.config.tome_r}, but there is no attention block to merge in",
            layer=name,
            expected="attention over all tokens with a residual addition, on (batch, tokens, channels) or a grid",
            found=why or other_softmax(gm) or "no attention",
            hint="use tome_r=0 for this model",
        )

    def summary(self, decision: Merges) -> str:
        if not decision.streams:
            return "already merged" if decision.already else decision.reason or "off"
        text = "; ".join(str(stream) for stream in decision.streams)
        return f"{text}; {decision.choice}" if decision.choice else text

    def apply(self, gm: IRModule, decision: Merges, ctx: Context) -> bool:
        for text in (*([f"nothing merged: {decision.reason}"] if decision.reason else ()), *decision.left):
            ctx.plan.note(text)
        streams = [stream for stream in decision.streams if stream.tokens[0] != stream.tokens[-1]]
        if not streams:
            return False
        nodes = {node.name: node for node in gm.graph.nodes}
        idle = {nodes[name]: None if source is None else nodes[source] for name, source in decision.idle.items()}
        mark_biases(gm, ctx.lifted)
        drop(gm, idle)
        part_rows(gm)
        turn(gm)
        blocks = [_sites_of(gm, stream) for stream in streams]
        names = {node: name for name, node in named_outputs(gm).items()}
        spread, norms = list[fx.Node](), list[str]()
        for sites, stream in zip(blocks, streams, strict=True):
            axis = _inserted(gm, sites, stream, ctx.config)
            spread, norms = spread + axis.spread, norms + axis.norms_of_merged()
            if METHODS[ctx.config.tome_method].saliency and not axis.picked_after(sites[-1].residual):
                ctx.plan.note("tokens merge without regard to attention: the output reads no class token on its own")
        for text in notes(names, spread, norms):
            ctx.plan.note(text)
        ctx.plan.tokens = list(streams[0].tokens) if len(streams) == 1 else [list(s.tokens) for s in streams]
        return True
