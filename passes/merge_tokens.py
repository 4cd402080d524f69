"""Merge tokens: insert ToMe after the attention residual of every block (method: section 8).

Anchored on ``scaled_dot_product_attention``: from there single users lead to the first addition whose other operand is
an ancestor of the query, the attention residual. The merge goes after it, and ``log(size)`` is added to the logits of
every later attention. Behind the first merge the token axis is followed by dataflow, never by its length, so that
token counts burnt into reshapes can be rewritten, and whatever can't be followed is refused by name.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpcompile.errors import GraphError, NotEligibleError
from mpcompile.graph import ATTENTION, IRModule, Lifted, argument, shape_of
from mpcompile.kernels import ops
from mpcompile.kernels.token_merge.reference import merged_count
from mpcompile.macs import is_add
from mpcompile.passes.base import Context, Pass
from mpcompile.passes.token_axis import TokenAxis

CAT = frozenset({torch.cat, torch.concat, torch.ops.aten.cat.default})


@dataclass(frozen=True)
class Site:
    """One attention block: where to read the keys and where to merge."""

    attention: fx.Node
    query: fx.Node
    keys: fx.Node
    residual: fx.Node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _asks_shape(node: fx.Node) -> bool:
    """Whether a node reads a tensor's shape only."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    return (node.op == "call_method" and node.target in ("size", "dim")) or "sym_size" in str(node.target)


def _residual(attention: fx.Node, query: fx.Node) -> fx.Node | None:
    """The addition that brings the attention's result back into the stream that its query came from."""
    upstream = _ancestors(query)
    node = attention
    while True:
        users = [u for u in node.users if not _asks_shape(u)]
        if len(users) != 1:
            return None
        node = users[0]
        if is_add(node) and any(source in upstream for source in node.all_input_nodes):
            return node


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Self-attention blocks on a (B, N, C) stream, in graph order."""
    sites = []
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target not in ATTENTION:
            continue
        query, keys = argument(node, 0, "query"), argument(node, 1, "key")
        residual = _residual(node, query)
        if residual is None:
            continue
        stream, heads = shape_of(residual), shape_of(keys)
        if stream and heads and len(stream) == 3 and len(heads) == 4 and stream[1] == heads[2]:
            sites.append(Site(node, query, keys, residual))
    return sites


def count_prefix(site: Site, lifted: Lifted) -> int:
    """Tokens in front that come from parameters, found at the concatenations upstream of the first block.

    Raises:
        GraphError: such tokens stand behind others.
    """

    def from_data(node: fx.Node) -> bool:
        stack, seen = [node], set()
        while stack:
            current = stack.pop()
            if current.op == "placeholder" and current.name not in lifted.tensors:
                if shape_of(current):  # a symbolic size is no data
                    return True
            elif current not in seen and not _asks_shape(current):
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return False

    prefix = 0
    for node in _ancestors(site.residual):
        shape = shape_of(node)
        if node.target not in CAT or shape is None or len(shape) != 3 or argument(node, 1, "dim", 0) not in (1, -2):
            continue
        parts = list(argument(node, 0, "tensors"))
        data = [from_data(part) for part in parts]
        if not any(data):
            continue
        if not all(data[data.index(True) :]):
            raise GraphError(
                "tokens that come from parameters stand behind the image's",
                layer=node.name,
                expected="class, distillation and register tokens in front",
                found=f"{data.count(False)} of {len(data)} parts, not all of them in front",
                hint="use tome_r=0, or reorder the concatenation",
            )
        prefix += sum((shape_of(part) or (0, 0))[1] for part, is_data in zip(parts, data, strict=True) if not is_data)
    return prefix


class MergeTokens(Pass):
    """Token merging with proportional attention in every self-attention block."""

    name = "merge_tokens"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        r = ctx.config.tome_r
        if r == 0:
            return {"r": 0, "prefix": 0, "sites": [], "tokens": []}
        if any(node.target is ops.token_merge for node in gm.graph.nodes):
            return {"r": 0, "prefix": 0, "sites": [], "tokens": [], "already": True}
        sites = find_sites(gm)
        if not sites:
            raise NotEligibleError(
                f"tome_r={r}, but there is no attention block to merge in",
                expected="scaled_dot_product_attention with a residual addition, on (batch, tokens, channels)",
                found="none",
                hint="use tome_r=0; for a timm model keep fused attention on (timm.layers.set_fused_attn(True))",
            )
        prefix = count_prefix(sites[0], ctx.lifted) if ctx.config.prefix_tokens is None else ctx.config.prefix_tokens
        count = (shape_of(sites[0].residual) or (0, 0))[1]
        if prefix > count:
            raise GraphError("more prefix tokens than tokens", expected=f"at most {count}", found=prefix)
        tokens = [count]
        for _ in sites:
            tokens.append(merged_count(tokens[-1], r, prefix))
        return {"r": r, "prefix": prefix, "sites": [s.attention.name for s in sites], "tokens": tokens}

    def summary(self, decision: dict[str, Any]) -> str:
        if not decision["sites"]:
            return "already merged" if decision.get("already") else "off"
        tokens = decision["tokens"]
        text = f"r = {decision['r']} in {len(decision['sites'])} blocks, tokens {tokens[0]} -> {tokens[-1]}"
        clamped = sum(a - b < decision["r"] for a, b in itertools.pairwise(tokens))
        return text + f", {decision['prefix']} prefix" + (f"; r clamped in {clamped} blocks" if clamped else "")

    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        names = set(decision["sites"])
        sites = [site for site in find_sites(gm) if site.attention.name in names]
        if not sites:
            return False
        graph = gm.graph
        sizes: dict[fx.Node, fx.Node] = {}  # merged tokens -> their sizes
        size: fx.Node | None = None
        for site in sites:
            with graph.inserting_after(site.residual):
                if size is None:
                    size = graph.call_function(ops.token_size, (site.residual,))
                    with graph.inserting_after(size):
                        merge = self._merge(graph, site, size, decision)
                else:
                    merge = self._merge(graph, site, size, decision)
            with graph.inserting_after(merge):
                tokens = graph.call_function(operator.getitem, (merge, 0))
            with graph.inserting_after(tokens):
                size_after = graph.call_function(operator.getitem, (merge, 1))
            tokens.meta["mpcompile.original"] = site.residual
            for user in list(site.residual.users):
                if user is not merge and user is not size:
                    user.replace_input_with(site.residual, tokens)
            size = size_after
            sizes[tokens] = size
        TokenAxis(gm, ctx.lifted, sizes, decision["prefix"]).follow()
        ctx.plan.tokens = list(decision["tokens"])
        return True

    @staticmethod
    def _merge(graph: fx.Graph, site: Site, size: fx.Node, decision: dict[str, Any]) -> fx.Node:
        args = (site.residual, site.keys, size, decision["r"], decision["prefix"])
        return graph.call_function(ops.token_merge, args)
