"""Skip dead tokens: an exact pass that computes for each node only the tokens that something reads.

The head of a vision transformer usually reads the class token alone. Behind the last attention, no other token is ever
read: the query, the output projection and the MLP of the last block are needed for one token. Keys and values are
needed for all. :mod:`mpcompile.passes.dead_tokens.demand` finds which parts of which tensors are read, backwards from
the output and through everything that works token by token; :mod:`mpcompile.passes.dead_tokens.rewrite` computes those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from mpcompile.ir import spec
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import ATTENTION, argument, shape_of, target_name
from mpcompile.kernels import ops
from mpcompile.passes.base import UNRECORDED, Context, Decision, Pass, Request
from mpcompile.passes.dead_tokens.boxes import FULL, Box, count
from mpcompile.passes.dead_tokens.demand import Demand, find_demand, is_tensor, saved_macs
from mpcompile.passes.dead_tokens.rewrite import Rewriter
from mpcompile.passes.dead_tokens.rules import Rules
from mpcompile.passes.merge_tokens.sites import find_attentions
from mpcompile.plan import Plan

_MIXES = frozenset(("mean", "sum", "amax", "amin", "max", "min", "norm"))


@dataclass(frozen=True, eq=False)
class Skipped(Decision):
    """The parts that are computed.

    Attributes:
        queries: attention of which not all queries are needed -> how many are, and how many there are.
        merges: token merges that nothing reads, which are removed. The Plan's ``tokens`` are those of the schedule.
        macs: multiply-accumulates of dense weights that are not executed, of the whole batch.
        share: the same, as a share of what the graph executes otherwise.
        reason: why nothing is skipped; None if something is.
        parts: node -> the parts of it that are computed, none if nothing reads it. Other nodes are computed in full.
    """

    queries: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    merges: tuple[str, ...] = ()
    macs: int = 0
    share: float = 0.0
    reason: str | None = None
    parts: Mapping[str, tuple[Box, ...]] = field(default_factory=dict, metadata=UNRECORDED)


class SkipDeadTokens(Pass):
    """Compute only the tokens that something reads; results and gradients stay the same.

    A layer of which some rows are needed for fewer tokens than others (queries, in a fused product of queries, keys and
    values) becomes several layers, each of them on rows of the same parameters.

    Example:
        >>> import timm, torch, mpcompile
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 3, 64, 64), mpcompile.Config(pattern="dense"))
        >>> gm.plan.passes[-1].name, gm.plan.passes[-1].summary
        ('skip_dead_tokens', '1 of 17 queries in scaled_dot_product_attention_1; 33.7% fewer multiply-accumulates')
    """

    name = "skip_dead_tokens"
    decision_type = Skipped
    requests = frozenset({Request.SPARED})

    def plan(self, gm: IRModule, ctx: Context) -> Skipped:
        if not ctx.plan.config.get("skip_dead_tokens", ctx.config.skip_dead_tokens):
            return Skipped(reason="off")
        demand = find_demand(gm, ctx.lifted)
        matching = {target: row for target, row in spec.OPERATORS.items() if row.matching}
        total = sum(n.meta.get("macs", 0) for n in gm.graph.nodes if n.target not in matching)
        saved = saved_macs(gm, demand, matching)
        if saved <= 0:
            return Skipped(reason=_reason(gm, ctx))
        parts = {node.name: demand.parts.get(node, ()) for node in gm.graph.nodes if is_tensor(node)}
        unread = [n.name for n in gm.graph.nodes if n.target is ops.token_merge and _is_unread(n, demand)]
        return Skipped(
            queries=_queries(gm, demand),
            merges=tuple(unread),
            macs=saved,
            share=saved / total,
            parts={name: boxes for name, boxes in parts.items() if boxes != (FULL,)},
        )

    def summary(self, decision: Skipped) -> str:
        if decision.reason is not None:
            return decision.reason
        parts = [f"{some} of {all_} queries in {name}" for name, (some, all_) in decision.queries.items()]
        parts += [f"no merge in {name}" for name in decision.merges]
        return "; ".join([*parts, f"{decision.share:.1%} fewer multiply-accumulates"])

    def apply(self, gm: IRModule, decision: Skipped, ctx: Context) -> bool:
        if decision.reason is not None:
            return False
        nodes = {node.name: node for node in gm.graph.nodes}
        Rewriter(gm, ctx.lifted, {nodes[name]: parts for name, parts in decision.parts.items()}).run()
        return True


def skips_tokens(plan: Plan) -> bool:
    """Return True if a pass has left tokens out of the plan's graph that nothing reads."""
    return any(p.name == SkipDeadTokens.name and p.decision.get("reason") is None for p in plan.passes)


def _is_unread(merge: fx.Node, demand: Demand) -> bool:
    """Return True if no user of a merge is computed from what it yields."""
    return not any(user in demand.parts and demand.parts[user] == (FULL,) for user in merge.users)


def _queries(gm: IRModule, demand: Demand) -> dict[str, tuple[int, int]]:
    """Return the attentions of which only some queries are needed -> how many, and of how many."""
    found = {}
    for node in gm.graph.nodes:
        fused = node.target in ATTENTION or node.target is ops.token_attention
        shape, parts = shape_of(node) or (), demand.parts.get(node, ())
        if len(parts) == 1 and (fused or "softmax" in target_name(gm, node).lower()):
            runs = dict(parts[0]).get(len(shape) - 2)
            if runs is not None:
                found[node.name] = (count(runs), shape[-2])
    return found


def _reason(gm: IRModule, ctx: Context) -> str:
    """Return why no token is dead: what reads all tokens behind the last attention."""
    anchors = {a.anchor for a in find_attentions(gm)} | {n for n in gm.graph.nodes if n.target is ops.token_attention}
    last = next((n for n in reversed(gm.graph.nodes) if n in anchors and _queries_are_keys(n)), None)
    if last is None:
        return "no attention among tokens: nothing to skip"
    rules, reached = Rules(gm, ctx.lifted), {last}
    for node in gm.graph.nodes:
        if not reached.intersection(node.all_input_nodes):
            continue
        if node.op == "output":
            return "nothing to skip: the model returns values of all tokens, or of most"
        name = target_name(gm, node)
        mixes = name in _MIXES or node in anchors or node.target is ops.token_mean
        if mixes or (is_tensor(node) and rules.rule_of(node) is None):
            return f"nothing to skip: all tokens are read by {name} ({node.name})"
        reached.add(node)
    return "nothing to skip: all tokens are read"


def _queries_are_keys(anchor: fx.Node) -> bool:
    """Return True if an attention has as many queries as keys."""
    if anchor.target in ATTENTION or anchor.target is ops.token_attention:
        query, key = (shape_of(argument(anchor, i, name)) or () for i, name in enumerate(("query", "key")))
        return query[-2:-1] == key[-2:-1]
    shape = shape_of(anchor) or ()  # of the softmax
    return shape[-1:] == shape[-2:-1]
