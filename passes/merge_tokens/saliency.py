"""Which tokens merge: the terms of a pair's score, and the attention of the tokens that the model's output reads.

The score of merging token ``a`` into token ``b`` is

    cos(metric_a, metric_b) - saliency * T * s_a - size * log(size_a * size_b)

T is the number of tokens, and s_a the attention that the class token pays to ``a``, averaged over the heads and divided
by the number of input tokens that ``a`` represents. So T * s_a is 1 for a token that gets the average attention. With
``keep_norm``, a merged token is scaled to the mean norm of its parts: averages of tokens that differ are shorter than
the tokens, and norms carry information from block to block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from mpcompile.errors import GraphError
from mpcompile.ir.nodes import argument
from mpcompile.kernels import ops, schema
from mpcompile.passes.merge_tokens.axis import TokenAxis
from mpcompile.passes.merge_tokens.sites import Attention, Site, has_bias


@dataclass(frozen=True)
class Method:
    """How pairs are scored and merged. The defaults are ToMe's.

    Attributes:
        tokens: True to compare the tokens that merge, False to compare the mean keys of the heads.
        saliency: weight of the class token's attention to the token that goes.
        size: weight of the log of the product of both sizes.
        keep_norm: True to scale a merged token to the mean norm of its parts.
    """

    tokens: bool = False
    saliency: float = 0.0
    size: float = 0.0
    keep_norm: bool = False


METHODS: dict[str, Method] = {
    "tome": Method(),
    # The terms and their weights lose least on held-out images: see "Which pairs" in docs/token_merging.md.
    "saliency": Method(tokens=True, saliency=0.2, size=0.05, keep_norm=True),
}
"""Value of ``tome_method`` -> how pairs are scored and merged."""


def metric(graph: fx.Graph, site: Site, method: Method) -> fx.Node:
    """Return what the tokens of a block are compared by, (B, heads, N, D), at the graph's insertion point."""
    if method.tokens:
        return graph.call_function(torch.unsqueeze, (site.residual, 1))
    keys = [_keys(graph, attention) for attention in site.attentions]
    return keys[0] if len(keys) == 1 else graph.call_function(torch.cat, (keys, 1))


def _keys(graph: fx.Graph, attention: Attention) -> fx.Node:
    keys = attention.keys
    return graph.call_method("transpose", (keys, -2, -1)) if attention.transposed else keys


def follow_keys(axis: TokenAxis, merges: Mapping[fx.Node, Site], weighed: bool) -> None:
    """Average keys over the tokens that merged before, where attention got every input token (a grid in front of it).

    Args:
        axis: the walk over the graph that holds the merges.
        merges: node of each merge -> its block.
        weighed: True if merges spare tokens that others attend to.

    Raises:
        GraphError: a block attends to every input token, and the merge needs more than its keys.
    """
    for level in axis.levels.values():
        merge = level.tokens.args[0]
        site, before = merges[merge], level.before  # type: ignore[index]
        merged = [attention.keys in axis.states for attention in site.attentions]
        if before is None or all(merged):
            continue
        if weighed or any(merged):
            raise GraphError(
                "attention runs over every input token in a block whose stream has merged",
                layer=site.name,
                expected="attention over merged tokens",
                found="a grid of all tokens in front of it",
                hint="use tome_method='tome', or tome_r=0 for this model",
            )
        args = schema.TokenMergeArgs.bind(merge)  # type: ignore[arg-type]
        if args.keys.target is torch.unsqueeze:
            continue  # tokens are compared themselves
        places = before.places()
        with axis.gm.graph.inserting_before(merge):  # type: ignore[arg-type]
            follow = schema.TokenFollowArgs(args.keys, places, axis.size, before.size, start=0, dim=-2, rank=4)
            mean = axis.gm.graph.call_function(ops.token_follow, tuple(follow))
        merge.replace_input_with(args.keys, mean)  # type: ignore[union-attr]


def weigh(
    graph: fx.Graph, merges: Mapping[fx.Node, Site], rows: Sequence[int], method: Method, proportional: bool
) -> None:
    """Let merges spare the tokens that some tokens attend to.

    Args:
        merges: node of each merge -> its block, in a graph whose attentions are proportional already.
        rows: the tokens that attend, which never merge.
        proportional: True if log(size) is added to attention logits.
    """
    for merge, site in merges.items():
        args = schema.TokenMergeArgs.bind(merge)
        with graph.inserting_before(merge):
            size = args.size if proportional else None
            each = [_saliency(graph, attention, size, rows) for attention in site.attentions]
            mean = (
                each[0] if len(each) == 1 else graph.call_method("mean", (graph.call_function(torch.stack, (each,)), 0))
            )
        merge.args = replace(args, saliency=mean, saliency_weight=method.saliency).shortest()


def _saliency(graph: fx.Graph, attention: Attention, size: fx.Node | None, rows: Sequence[int]) -> fx.Node:
    """Return the attention of some tokens to every token, (B, N): of a fused attention, computed for these alone."""
    anchor = attention.anchor
    if attention.transposed:
        return graph.call_function(ops.token_saliency, (anchor, None, size, list(rows)))
    args = schema.TokenSaliencyArgs(attention.query, attention.keys, size, list(rows))
    if anchor.target is ops.token_attention:
        args.scale = schema.TokenAttentionArgs.bind(anchor).scale
    else:
        args.scale = argument(anchor, 6, "scale")
        args.bias = argument(anchor, 3, "attn_mask") if has_bias(attention) else None
    return graph.call_function(ops.token_saliency, args.shortest())
