"""Exported attention of torch.nn: its heads and tokens on axes of their own.

``F.multi_head_attention_forward`` joins the batch with the heads, (L, B x heads, D), and with the tokens, (L x B, C).
In an exported graph these are views with fixed sizes. Here each view pair becomes one view that names no batch and no
token count: token merging can follow it, and the batch stays free. Attention that is written out, as torch computes it
if attention weights are requested, becomes ``scaled_dot_product_attention`` if nothing else reads the weights.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.ir.module import Imported
from mpcompile.ir.nodes import ATTENTION, LINEAR, argument, fake_value, shape_of
from mpcompile.ir.shapes import propagate

_ATEN = torch.ops.aten
_VIEWS = frozenset({_ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default})
_SPREADS = _VIEWS | {_ATEN.expand.default, _ATEN.unsqueeze.default}
_PRODUCTS = frozenset({_ATEN.bmm.default, _ATEN.baddbmm.default})
_SOFTMAX = frozenset({_ATEN.softmax.int, _ATEN._softmax.default})
_UNREAD = _VIEWS | {_ATEN.mean.dim}
_PARTS = frozenset(  # what a rewritten attention may leave without a reader
    {*_SPREADS, *_PRODUCTS, *_SOFTMAX, *LINEAR, operator.mul, _ATEN.mul.Tensor, _ATEN.dropout.default}
    | {_ATEN.transpose.int, _ATEN.permute.default}
)


def untangle(imported: Imported) -> bool:
    """Rewrite the views and products of exported attention. Return True if there were any."""
    graph = imported.gm.graph
    marks = [n for n in graph.nodes if n.target in _PRODUCTS or n.target is _ATEN.scaled_dot_product_attention.default]
    if not marks:
        return False
    if not all(isinstance(fake_value(node), Tensor) for node in marks):
        propagate(imported.gm, imported.inputs)
    masks: dict[fx.Node, fx.Node] = {}
    changed = False
    for node in reversed(list(graph.nodes)):  # means of attention weights that nothing reads
        if node.target in _UNREAD and not node.users:
            graph.erase_node(node)
    for node in marks:
        rewrite = _fused if node.target in ATTENTION else _written_out
        changed = rewrite(node, masks) or changed
    for node in reversed(list(graph.nodes)):
        if changed and node.target in _PARTS and not node.users:
            graph.erase_node(node)
    return changed


def _only_user(node: Any) -> Any:
    """Return the one node that reads a node, or None if there are none or several."""
    return next(iter(node.users)) if isinstance(node, fx.Node) and len(node.users) == 1 else None


def _swaps(node: Any, first: int, second: int) -> bool:
    """Return True if a node swaps these two axes, counted from the front."""
    if not isinstance(node, fx.Node) or node.target is not _ATEN.transpose.int:
        return False
    rank = len(shape_of(node) or ())
    return {int(node.args[1]) % rank, int(node.args[2]) % rank} == {first, second}  # type: ignore[arg-type]


def _unjoined(node: Any) -> Any:
    """Return the tensor (L, B, heads x D) that a node (B x heads, L, D) is a view of."""
    if not _swaps(node, 0, 1) or node.args[0].target not in _VIEWS:
        return None
    source, shape = node.args[0].args[0], shape_of(node) or ()
    before = shape_of(source) or ()
    if len(shape) != 3 or len(before) != 3 or before[0] != shape[1] or not before[1] or shape[0] % before[1]:
        return None
    return source if before[2] == shape[0] // before[1] * shape[2] else None


def _heads(graph: fx.Graph, source: fx.Node, depth: int) -> fx.Node:
    """Return (L, B, heads x D) as (B, heads, L, D), at the graph's insertion point."""
    width = (shape_of(source) or (0, 0, 0))[2]
    split = graph.call_function(_ATEN.unflatten.int, (source, -1, [width // depth, depth]))
    return graph.call_function(_ATEN.permute.default, (split, [1, 2, 0, 3]))


def _joins_tokens(joined: Any, shape: tuple[int, ...]) -> Any:
    """Return the view (L, B, C) of the output projection of ``joined`` (L x B, C), where ``shape`` is (L, B)."""
    linear = _only_user(joined)
    last = _only_user(linear)
    if joined is None or joined.target not in _VIEWS or linear is None or linear.target not in LINEAR or last is None:
        return None
    if last.target not in _VIEWS or len(shape_of(joined) or ()) != 2 or (shape_of(last) or ())[:-1] != shape:
        return None
    return last


def _project(mixed: fx.Node, joined: Any, last: Any) -> None:
    """Let the users of ``last`` read the output projection of ``mixed`` (L, B, heads, D)."""
    graph, linear = mixed.graph, _only_user(joined)
    with graph.inserting_before(linear):
        flat = graph.call_function(_ATEN.flatten.using_ints, (mixed, 2))
        new = graph.call_function(linear.target, (flat, *linear.args[1:]), dict(linear.kwargs))
    last.replace_all_uses_with(new)


def _over_keys(mask: Any, masks: dict[fx.Node, fx.Node]) -> Any:
    """Return a mask (B, 1, 1, S) where a mask over keys is spread over heads; else the mask itself.

    Layers that spread the same mask read the same node afterwards.
    """
    source, shape = mask, shape_of(mask) if isinstance(mask, fx.Node) else None
    while isinstance(source, fx.Node) and source.target in _SPREADS:
        source = source.args[0]
    before = shape_of(source) if isinstance(source, fx.Node) else None
    if shape is None or before is None or len(before) != 2 or shape[-2:] != (1, before[1]):
        return mask
    if source not in masks:
        with source.graph.inserting_before(source.next):
            keys = source.graph.call_function(_ATEN.unsqueeze.default, (source, 1))
            masks[source] = source.graph.call_function(_ATEN.unsqueeze.default, (keys, 1))
    return masks[source]


def _with_heads(mask: fx.Node, masks: dict[fx.Node, fx.Node], heads: int) -> fx.Node:
    """Return a mask (1 or B x heads, L or 1, S) with four axes."""
    spread: fx.Node = _over_keys(mask, masks)
    if spread is not mask:
        return spread
    if (shape_of(mask) or ())[0] == 1:
        return mask.graph.call_function(_ATEN.unsqueeze.default, (mask, 0))
    return mask.graph.call_function(_ATEN.unflatten.int, (mask, 0, [-1, heads]))


def _fused(node: fx.Node, masks: dict[fx.Node, fx.Node]) -> bool:
    """Rewrite the views around ``scaled_dot_product_attention``."""
    graph, changed = node.graph, False
    for place in range(3):
        view: Any = node.args[place]
        shape = shape_of(view) or ()
        source = _unjoined(view.args[0]) if view.target in _VIEWS else None
        if source is None or len(shape) != 4 or (shape_of(source) or ())[1] != shape[0]:
            continue
        with graph.inserting_before(view):
            view.replace_all_uses_with(_heads(graph, source, shape[3]))
        changed = True
    mask = argument(node, 3, "attn_mask")
    if changed and isinstance(mask, fx.Node):
        node.replace_input_with(mask, _over_keys(mask, masks))
    mixed = _only_user(node)
    if changed and mixed is not None and mixed.target is _ATEN.permute.default and mixed.args[1] == [2, 0, 1, 3]:
        joined = _only_user(mixed)
        last = _joins_tokens(joined, (shape_of(mixed) or ())[:2])
        if joined is not None and last is not None:
            _project(mixed, joined, last)
    return changed


def _written_out(node: fx.Node, masks: dict[fx.Node, fx.Node]) -> bool:
    """Replace an attention that is written out, of which ``node`` is the product of queries and keys."""
    operands: Any = node.args if node.target is _ATEN.baddbmm.default else (None, *node.args)
    mask, scaled, keys = operands
    if scaled.target is not _ATEN.mul.Tensor or not isinstance(scaled.args[1], float) or not _swaps(keys, 1, 2):
        return False
    softmax = _only_user(node)
    weights, rate = softmax, 0.0
    dropout = _only_user(softmax)
    if dropout is not None and dropout.target is _ATEN.dropout.default:
        weights, rate = dropout, float(dropout.args[1]) if dropout.args[2] else 0.0
    product = _only_user(weights)
    if softmax is None or softmax.target not in _SOFTMAX or product is None or product.target is not _ATEN.bmm.default:
        return False
    turned = _only_user(product)
    joined = _only_user(turned)
    sources = [_unjoined(x) for x in (scaled.args[0], keys.args[0], product.args[1])]
    if product.args[0] is not weights or None in sources or not _swaps(turned, 0, 1):
        return False
    lengths, depth = (shape_of(sources[0]) or ())[:2], (shape_of(product) or ())[2]
    last = _joins_tokens(joined, lengths)
    if joined is None or last is None:
        return False
    graph = node.graph
    with graph.inserting_before(product):
        inputs = [_heads(graph, source, depth) for source in sources]
        options: dict[str, Any] = {"scale": scaled.args[1]}
        if isinstance(mask, fx.Node):
            options["attn_mask"] = _with_heads(mask, masks, (shape_of(sources[0]) or (0, 0, 0))[2] // depth)
        options |= {"dropout_p": rate} if rate else {}
        fused = graph.call_function(_ATEN.scaled_dot_product_attention.default, tuple(inputs), options)
        mixed = graph.call_function(_ATEN.permute.default, (fused, [2, 0, 1, 3]))
    _project(mixed, joined, last)
    return True
