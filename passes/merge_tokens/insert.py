"""Merge tokens: insert ToMe after the attention residual of every block (Bolya et al., arXiv 2210.09461).

Sites are anchored on attention, fused or written out. From there the graph leads to the attention residual, the first
addition whose other operand is an ancestor of the query. The merge follows it, and ``log(size)`` is added to the logits
of every later attention. After the first merge the token axis is followed by dataflow, never by its length: token
counts in reshapes are rewritten, values per token (position embeddings, rotary tables) are averaged over the tokens
that merged, and an op that cannot be followed is refused by name.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mpcompile.errors import GraphError, NotEligibleError
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import shape_of
from mpcompile.kernels import ops, schema
from mpcompile.passes.base import UNRECORDED, Context, Decision, Pass
from mpcompile.passes.merge_tokens.axis import Level, TokenAxis
from mpcompile.passes.merge_tokens.idle_masks import drop, idle_masks
from mpcompile.passes.merge_tokens.schedule import counts, merges, solve
from mpcompile.passes.merge_tokens.sites import Site, count_prefix, find_sites, key_mask, opaque_attentions
from mpcompile.plan import Plan, is_lowered


def _keys(graph: fx.Graph, site: Site) -> fx.Node:
    """Concatenate the keys of all attentions of a block as (B, heads, N, D), at the graph's insertion point."""
    keys = []
    for attention in site.attentions:
        node = attention.keys
        keys.append(graph.call_method("transpose", (node, -2, -1)) if attention.transposed else node)
    return keys[0] if len(keys) == 1 else graph.call_function(torch.cat, (keys, 1))


def insert_merges(
    gm: IRModule, sites: Sequence[Site], r: Sequence[int], prefix: int, numbers: Sequence[int], proportional: bool
) -> TokenAxis:
    """Insert the merges into a graph, and rewrite the nodes after them.

    Args:
        sites: the blocks.
        r: tokens to merge, one number per block.
        prefix: number of tokens in front that never merge.
        numbers: tokens before the first block and after each one; a block that merges nothing is skipped.
        proportional: True to add log(size) to attention logits.

    Raises:
        GraphError: an op after a merge cannot be followed.
    """
    graph = gm.graph
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
            keys = _keys(graph, site)
            merge_args = schema.TokenMergeArgs(x=site.residual, keys=keys, size=size, r=r[block], prefix=prefix)
            merge = graph.call_function(ops.token_merge, tuple(merge_args))
            tokens, after, step = (graph.call_function(operator.getitem, (merge, i)) for i in range(3))
        tokens.meta["mpcompile.original"] = site.residual
        for user in users:
            user.replace_input_with(site.residual, tokens)
        level = Level(tokens, after, step, numbers[block + 1], level)
        levels[tokens] = level
    assert first is not None  # callers merge in at least one block
    axis = TokenAxis(gm, levels, first, numbers[0], prefix, mask, proportional)
    axis.follow(original)
    for node in [level.step for level in levels.values() if not level.step.users]:
        graph.erase_node(node)
    return axis


def _trial(gm: IRModule) -> tuple[IRModule, dict[fx.Node, fx.Node]]:
    """Return a copy of a graph for trial edits, which shares its tensors, and a map from each node to its copy."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    return IRModule(gm, graph), copies


def _unmasked(gm: IRModule, idle: Mapping[fx.Node, fx.Node | None]) -> IRModule:
    """Return the graph, or a copy without its idle masks if it has any."""
    if not idle:
        return gm
    trial, copies = _trial(gm)
    drop(trial, {copies[node]: None if source is None else copies[source] for node, source in idle.items()})
    return trial


def merging_cost(gm: IRModule, ctx: Context, prefix: int, tokens: int) -> Callable[[Sequence[int]], float]:
    """Return the multiply-accumulates of a graph as a function of the tokens before the first block and after each.

    N:M masks are not counted. The nodes must carry ``macs`` (see :func:`mpcompile.ir.shapes.propagate`).
    """
    trial, copies = _trial(gm)
    sites, _ = find_sites(trial)
    numbers = [tokens - i for i in range(len(sites) + 1)]
    axis = insert_merges(trial, sites, [1] * len(sites), prefix, numbers, ctx.config.tome_proportional)
    place = {level.count: tokens - level.count for level in axis.levels.values()}
    terms = []
    for node in copies.values():
        macs = node.meta.get("macs", 0)
        if macs:
            terms.append((macs, [(place[level.count], start) for level, start in axis.extents.get(node, [])]))

    def cost(numbers: Sequence[int]) -> float:
        return sum(
            macs * math.prod((numbers[block] - start) / (tokens - start) for block, start in axes)
            for macs, axes in terms
        )

    return cost


def unmerged(plan: Plan) -> list[str]:
    """Return the reasons why nothing merged although merging was requested; empty if tokens merged or it was not."""
    last = [record.decision for record in plan.passes if record.name == MergeTokens.name][-1:]
    return [decision["reason"] for decision in last if decision.get("reason")]


@dataclass(frozen=True, eq=False)
class Merges(Decision):
    """The blocks in which tokens merge, and how many merge there.

    Attributes:
        r: tokens to merge, one number per site; empty if nothing merges.
        prefix: number of tokens in front that never merge.
        sites: names of the attentions of the blocks.
        tokens: tokens before the first block and after each one.
        already: True if the graph merges tokens already.
        reason: why nothing merges although merging was requested.
        idle: masking step without effect -> the logits that replace it; attention whose mask is removed -> None.
    """

    r: list[int] = field(default_factory=list)
    prefix: int = 0
    sites: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    already: bool = False
    reason: str | None = None
    idle: Mapping[str, str | None] = field(default_factory=dict, metadata=UNRECORDED)

    def record(self) -> dict[str, Any]:
        optional = {"already": self.already, "reason": self.reason}
        values = {key: value for key, value in super().record().items() if key not in optional}
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
        gm = _unmasked(gm, idle)
        sites, reasons = find_sites(gm)
        if not sites:
            error = self._not_eligible(gm, reasons, ctx)
            if ctx.tolerant:
                return Merges(reason=str(error))
            raise error
        if ctx.tolerant and 0 in (shape_of(sites[0].residual) or ()):
            return Merges()  # a graph for an empty batch: there is nothing to save
        key_mask(sites)
        prefix = count_prefix(sites[0], ctx.lifted) if ctx.config.prefix_tokens is None else ctx.config.prefix_tokens
        tokens = (shape_of(sites[0].residual) or (0, 0))[1]
        if prefix > tokens:
            raise GraphError("more prefix tokens than tokens", expected=f"at most {tokens}", found=prefix)
        numbers = merges(ctx.config, len(sites))
        if numbers is None:
            cost = merging_cost(gm, ctx, prefix, tokens)
            reduction = ctx.config.tome_reduction or 0.0
            numbers = solve(reduction, tokens, prefix, len(sites), ctx.config.tome_schedule, cost)
        return Merges(
            r=numbers,
            prefix=prefix,
            sites=[site.name for site in sites],
            tokens=counts(tokens, prefix, numbers),
            idle={node.name: None if source is None else source.name for node, source in idle.items()},
        )

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
        if not decision.sites:
            return "already merged" if decision.already else decision.reason or "off"
        tokens, r = decision.tokens, decision.r
        schedule = str(r[0]) if len(set(r)) == 1 else ", ".join(map(str, r))
        text = f"r = {schedule} in {len(decision.sites)} blocks, tokens {tokens[0]} -> {tokens[-1]}"
        clamped = [block for block, (a, b) in enumerate(itertools.pairwise(tokens)) if a - b < r[block]]
        text += f", {decision.prefix} prefix"
        return text + (f"; r clamped to half of the tokens in {len(clamped)} blocks" if clamped else "")

    def apply(self, gm: IRModule, decision: Merges, ctx: Context) -> bool:
        tokens = decision.tokens
        if decision.reason:
            ctx.plan.note(f"nothing merged: {decision.reason}")
        if not tokens or tokens[0] == tokens[-1]:
            return False
        nodes = {node.name: node for node in gm.graph.nodes}
        idle = {nodes[name]: None if source is None else nodes[source] for name, source in decision.idle.items()}
        drop(gm, idle)
        names = set(decision.sites)
        sites = [site for site in find_sites(gm)[0] if site.name in names]
        insert_merges(gm, sites, decision.r, decision.prefix, tokens, ctx.config.tome_proportional)
        ctx.plan.tokens = list(tokens)
        return True
