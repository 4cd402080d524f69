"""LowerAttention: run fused attention on the CPU engine's kernel, where it is faster than torch's.

Frameworks call ``scaled_dot_product_attention`` on views of one projection. torch's kernel for CPUs is made for long
sequences; that of the engine (native/attention.h) reads the views in place and keeps a few hundred tokens in the
nearest caches. Attention of merged tokens (``token_attention``) becomes the same call, with log(size) as its bias.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from mpcompile.ir.effects import erase_orphans
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import ATTENTION, argument, fake_value, shape_of
from mpcompile.kernels import ops, schema
from mpcompile.kernels.cpu.attention import AttentionChoice, AttentionSpec, choose
from mpcompile.layers import number
from mpcompile.passes.base import Context, Decision, Pass


@dataclass(frozen=True, eq=False)
class AttentionLowering(Decision):
    """Node name -> the choice of its kernel; and calls that have no other kernel -> why."""

    chosen: Mapping[str, AttentionChoice]
    left: Mapping[str, str]


@dataclass(frozen=True)
class _Call:
    """One call of attention: its operands are nodes; the rest are literals, or nodes that yield a number."""

    query: Any
    key: Any
    value: Any
    mask: Any = None
    dropout: Any = 0.0
    causal: Any = False
    scale: Any = None
    grouped: Any = False
    size: Any = None  # of merged tokens, which begin at token `start`
    start: int = 0


class LowerAttention(Pass):
    """Attention -> ``nm_attention``. Afterwards the graph is for inference only.

    Args:
        timed: False takes the kernel wherever it runs, not only where it is faster.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower, LowerAttention
        >>> Pipeline([Lower(), LowerAttention()])
        Pipeline([lower, lower_attention])
    """

    name = "lower_attention"
    decision_type = AttentionLowering

    def __init__(self, *, timed: bool = True) -> None:
        super().__init__()
        self.timed = timed

    def plan(self, gm: IRModule, ctx: Context) -> AttentionLowering:
        chosen: dict[str, AttentionChoice] = {}
        left: dict[str, str] = {}
        engine = ctx.config.engine
        for node, call in _calls(gm):
            asked = engine == "auto" or engine.startswith("cpu")
            found = _spec_of(gm, node, call) if asked else f"engine {engine} was asked for"
            if isinstance(found, str):
                left[node.name] = found
            else:
                chosen[node.name] = choose(found, timed=self.timed)
        return AttentionLowering(chosen, left)

    def summary(self, decision: AttentionLowering) -> str:
        native = [choice for choice in decision.chosen.values() if choice.native]
        reasons = [choice.why for choice in decision.chosen.values() if not choice.native] + [*decision.left.values()]
        parts = [f"{len(native)} on nm_attention"] if native else []
        parts += [f"{reasons.count(why)} left to torch: {why}" for why in dict.fromkeys(reasons)]
        return "; ".join(parts) or "no attention"

    def apply(self, gm: IRModule, decision: AttentionLowering, ctx: Context) -> bool:
        replaced = False
        for node, call in list(_calls(gm)):
            choice = decision.chosen.get(node.name)
            if choice is not None and choice.native:
                _replace(gm.graph, node, call)
                replaced = True
        return replaced


def _calls(gm: IRModule) -> Iterator[tuple[fx.Node, _Call]]:
    """Yield the calls of attention in a graph."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is ops.token_attention:
            args = schema.TokenAttentionArgs.bind(node)
            yield (
                node,
                _Call(
                    args.query,
                    args.key,
                    args.value,
                    dropout=args.dropout_p,
                    scale=args.scale,
                    grouped=args.enable_gqa,
                    size=args.size,
                    start=args.start,
                ),
            )
        elif node.target in ATTENTION:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
            defaults = (None, None, None, None, 0.0, False, None, False)
            yield (
                node,
                _Call(*(argument(node, i, *pair) for i, pair in enumerate(zip(names, defaults, strict=True)))),
            )


def _spec_of(gm: IRModule, node: fx.Node, call: _Call) -> AttentionSpec | str:
    """Return a call as the choice of its kernel sees it, or why it has no other kernel."""
    if number(gm, call.dropout) != 0:
        return "it has dropout"
    if number(gm, call.causal) is not False or number(gm, call.grouped) is not False:
        return "it is causal, or several heads share keys"
    if call.scale is not None and type(call.scale) not in (int, float):
        return "its scale is computed"
    shapes = [shape_of(part) if isinstance(part, fx.Node) else None for part in (call.query, call.key, call.value)]
    query, key, value = shapes
    if query is None or key is None or value is None or {len(query), len(key), len(value)} != {4}:
        return "its operands are not (B, heads, tokens, channels)"
    if query[:2] != key[:2] or key[:3] != value[:3]:
        return "its operands are broadcast"
    fakes = [fake_value(part) for part in (node, call.query, call.key, call.value)]
    types = {(fake.dtype, fake.device) for fake in fakes}
    if len(types) > 1:
        return "its operands are cast"
    ((dtype, device),) = types
    bias: tuple[int, ...] | None = (query[0], 1, 1, key[2]) if call.size is not None else None
    if call.mask is not None:
        mask = fake_value(call.mask) if isinstance(call.mask, fx.Node) else None
        if not isinstance(mask, Tensor) or mask.dtype is not dtype or mask.device != device or not 2 <= mask.dim() <= 4:
            return "its mask is not of the dtype of its operands"
        sizes = shape_of(call.mask) or ()
        bias = (1,) * (4 - len(sizes)) + sizes
        if any(size not in (1, whole) for size, whole in zip(bias, (*query[:3], key[2]), strict=True)):
            return "its mask has another shape"
    return AttentionSpec(query, value, dtype, device, bias)


def _replace(graph: fx.Graph, node: fx.Node, call: _Call) -> None:
    with graph.inserting_before(node):
        bias = call.mask
        if call.size is not None:
            bias = graph.call_function(
                ops.token_bias, schema.TokenBiasArgs(call.size, call.query, call.start, 3).shortest()
            )
        elif bias is not None and fake_value(bias).dim() < 4:
            missing = 4 - fake_value(bias).dim()
            place: Any = (*(None,) * missing, Ellipsis)
            bias = graph.call_function(operator.getitem, (bias, place))
        scale = None if call.scale is None else float(call.scale)
        args = schema.NmAttentionArgs(call.query, call.key, call.value, bias, scale)
        new = graph.call_function(ops.nm_attention, args.shortest())
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    sources = node.all_input_nodes
    graph.erase_node(node)
    erase_orphans(graph, sources)
