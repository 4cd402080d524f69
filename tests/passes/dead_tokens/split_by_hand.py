"""A last block that computes its class token alone: the rows of a fused qkv that make queries are a layer apart."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from mpcompile import Config, Pipeline, transform
from mpcompile.ir.effects import erase_unread
from mpcompile.ir.macs import is_add
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import ATTENTION, LINEAR
from mpcompile.ir.view import layers
from mpcompile.kernels import ops, schema
from mpcompile.passes.base import Context, Decision, Pass


@dataclass(frozen=True, eq=False)
class Split(Decision):
    layer: str


class SplitLast(Pass):
    """For timm's vision transformers."""

    name = "skip_dead_tokens"
    decision_type = Split

    def plan(self, gm: IRModule, ctx: Context) -> Split:
        return Split([layer.name for layer in layers(gm, ctx.lifted) if layer.name.endswith("qkv")][-1])

    def apply(self, gm: IRModule, decision: Split, ctx: Context) -> bool:
        graph = gm.graph
        layer = next(layer for layer in layers(gm, ctx.lifted) if layer.name == decision.layer)
        node, call = layer.node, graph.call_function
        width = len(layer.weight.tensor) // 3
        (shaped,) = node.users
        (turned,) = shaped.users
        (unbound,) = turned.users
        parts = {int(u.args[1]): u for u in unbound.users}
        attention = next(n for n in reversed(graph.nodes) if n.target in ATTENTION or n.target is ops.token_attention)
        with graph.inserting_before(node):
            if node.op == "call_module":
                held = {
                    key: graph.get_attr(f"{layer.name}.{key}")
                    for key in ("weight", "bias", "mask")[: 3 if layer.mask else 2]
                }
            elif layer.mask is not None:
                args = schema.bind(node)
                held = {"weight": args.weight, "bias": args.bias, "mask": args.mask}
            else:
                held = {"weight": node.args[1], "bias": node.args[2]}

            def rows(x: fx.Node, start: int, stop: int) -> fx.Node:
                taken = {k: call(operator.getitem, (v, slice(start, stop))) for k, v in held.items()}
                if layer.pattern is None:
                    target: Any = (
                        node.target if node.target in LINEAR else next(t for t in LINEAR if not hasattr(t, "_schema"))
                    )
                    return call(target, (x, taken["weight"], taken["bias"]))
                return call(ops.masked_linear, (x, taken["weight"], taken["mask"], taken["bias"], *layer.pattern))

            first = call(operator.getitem, (layer.input, (slice(None), slice(0, 1))))
            query, keys = rows(first, 0, width), rows(layer.input, width, 3 * width)

        def again(source: fx.Node, *args: Any) -> fx.Node:
            return graph.create_node(source.op, source.target, args)

        listed = not isinstance(shaped.args[1], (int, fx.Node))  # as operators of aten take sizes
        batch, tokens, _, heads, depth = shaped.args[1] if listed else shaped.args[1:]
        swap = next(n for n in attention.users)
        with graph.inserting_before(unbound):
            sizes = [batch, 1, heads, depth], [batch, tokens, 2, heads, depth]
            q, kv = (again(shaped, x, *([s] if listed else s)) for x, s in zip((query, keys), sizes, strict=True))
            q = again(swap, q, 1, 2)
            axes = turned.args[1:]
            kv = again(turned, kv, *axes)
        with graph.inserting_before(attention):
            for index in (1, 2):
                parts[index].replace_all_uses_with(call(operator.getitem, (kv, index - 1)))
            parts[0].replace_all_uses_with(q)
        return self._rest(gm, attention, [*parts.values(), unbound, turned, shaped, node])

    def _rest(self, gm: IRModule, attention: fx.Node, old: list[fx.Node]) -> bool:
        graph = gm.graph
        swap = next(iter(attention.users))
        joined = next(iter(swap.users))
        sizes = list(joined.args[1]) if not isinstance(joined.args[1], (int, fx.Node)) else list(joined.args[1:])
        listed = len(joined.args) == 2
        sizes[1] = 1
        joined.args = (swap, sizes) if listed else (swap, *sizes)
        behind = {attention}
        for node in graph.nodes:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
                if is_add(node):
                    break
        other = next(n for n in node.all_input_nodes if n not in behind)
        with graph.inserting_before(node):
            node.replace_input_with(other, graph.call_function(operator.getitem, (other, (slice(None), slice(0, 1)))))
        for merge in [n for n in node.users if n.target is ops.token_merge]:
            merge_outputs = {u.args[1]: u for u in merge.users}
            merge_outputs[0].replace_all_uses_with(node)
            old = [*merge_outputs.values(), merge, *old]
        _in_order(graph)
        erase_unread(gm, old)
        _in_order(graph)
        graph.eliminate_dead_code()
        return True


def _in_order(graph: fx.Graph) -> None:
    """Move every node behind its inputs."""
    done: set[fx.Node] = set()
    for node in list(graph.nodes):
        for source in node.all_input_nodes:
            if source not in done:
                _raise(source, node, done)
        done.add(node)


def _raise(node: fx.Node, before: fx.Node, done: set[fx.Node]) -> None:
    for source in node.all_input_nodes:
        if source not in done:
            _raise(source, before, done)
    before.prepend(node)
    done.add(node)


def split(model: Any, x: Any, **options: Any) -> IRModule:
    """Transform a model, and split its last block."""
    config = Config(**{"pattern": "2:4", "score": "magnitude", **options})
    return transform(model, x, config, pipeline=Pipeline([*Pipeline(), SplitLast()]))
