"""Sites: the attention blocks in which tokens can merge, grouped by the stream of tokens that they work on."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from mpcompile import _moved
from mpcompile.errors import GraphError
from mpcompile.ir.macs import is_add
from mpcompile.ir.nodes import ATTENTION, MATMUL, argument, shape_of
from mpcompile.ir.view import LEFT_WHOLE

__getattr__ = _moved.renamed(__name__, {"count_prefix": "passes.merge_tokens.ends.count_ends"})
TURNED = "mpcompile.turned"  # key in the meta of a stream (N, B, C) that is seen as (B, N, C)
PAIR_BIAS = "mpcompile.pair_bias"  # key in the meta of a fixed attention bias for every pair of tokens
CAT = frozenset({torch.cat, torch.concat, torch.ops.aten.cat.default})
_SOFTMAX = frozenset({F.softmax, torch.softmax, torch.ops.aten.softmax.int, torch.ops.aten._softmax.default})
_MATMUL = (MATMUL - {torch.einsum}) | {operator.matmul, operator.imatmul}
_PRODUCTS = (operator.mul, torch.mul, torch.ops.aten.mul.Tensor, "mul")
_SHAPE_ATTRIBUTES = ("shape", "dtype", "device", "ndim")


@dataclass(frozen=True)
class Attention:
    """One attention. ``anchor`` is its fused call, or the softmax of an attention that is written out.

    Attributes:
        query: (B, heads, N, D).
        keys: (B, heads, N, D), or (B, heads, D, N) where ``transposed``.
        mask: the mask that the fused call adds to its logits, or None.
    """

    anchor: fx.Node
    query: fx.Node
    keys: fx.Node
    transposed: bool = False
    mask: fx.Node | None = None

    @property
    def key_shape(self) -> tuple[int, ...]:
        """(B, heads, N, D); empty unless the keys are known to have four axes."""
        shape = shape_of(self.keys) or ()
        if len(shape) != 4:
            return ()
        return (*shape[:2], shape[3], shape[2]) if self.transposed else shape


@dataclass(frozen=True)
class Site:
    """One block: its attentions (several if it runs them in parallel), and the addition after which tokens merge."""

    attentions: tuple[Attention, ...]
    residual: fx.Node

    @property
    def name(self) -> str:
        return self.attentions[0].anchor.name


def asks_shape(node: fx.Node) -> bool:
    """Return True if a node reads nothing but a tensor's shape, dtype or device."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    return (node.op == "call_method" and node.target in ("size", "dim")) or "sym_size" in str(node.target)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return all nodes that a node is computed from."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _is_softmax(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), nn.Softmax)
    return node.target in _SOFTMAX or (node.op == "call_method" and node.target == "softmax")


def is_matmul(node: fx.Node) -> bool:
    """Return True if a node is a matrix product of two tensors, as an operator, a function or a method."""
    if node.op == "call_method":
        return node.target in ("matmul", "bmm", "__matmul__")
    return node.target in _MATMUL


def _logits(softmax: fx.Node) -> fx.Node | None:
    """Return the product of queries and keys that a softmax normalises: the nearest one upstream of the same size."""
    size = shape_of(softmax)
    if size is None or len(size) != 4:
        return None
    seen, queue = {softmax}, [softmax]
    while queue:
        node = queue.pop(0)
        for source in node.all_input_nodes:
            shape = shape_of(source)
            if source in seen or shape is None or sorted(shape[1:]) != sorted(size[1:]):
                continue
            if is_matmul(source):
                return source
            seen.add(source)
            queue.append(source)
    return None


def find_attentions(gm: fx.GraphModule) -> list[Attention]:
    """Return every attention over tokens, fused or written out, in graph order."""
    attentions = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in ATTENTION:
            mask = argument(node, 3, "attn_mask")
            query, keys = argument(node, 0, "query"), argument(node, 1, "key")
            attentions.append(Attention(node, query, keys, mask=mask if isinstance(mask, fx.Node) else None))
        elif _is_softmax(gm, node):
            product = _logits(node)
            if product is not None:
                query, keys = argument(product, 0, "input"), argument(product, 1, "mat2", product.kwargs.get("other"))
                if isinstance(query, fx.Node) and isinstance(keys, fx.Node):
                    attentions.append(Attention(node, query, keys, transposed=True))
    return attentions


def other_softmax(gm: fx.GraphModule) -> str | None:
    """Return what the first softmax weighs in a model without attention over tokens; None if it has no softmax."""
    found = (node for node in gm.graph.nodes if _is_softmax(gm, node) and len(shape_of(node) or ()) > 2)
    node = next(found, None)
    return None if node is None else f"a softmax of shape {shape_of(node)}, which does not weigh tokens in heads"


def opaque_attentions(gm: fx.GraphModule) -> dict[str, str]:
    """Return the calls that hide an attention and could not be rewritten, each with the reason."""
    return {str(node.target): str(node.meta[LEFT_WHOLE]) for node in gm.graph.nodes if LEFT_WHOLE in node.meta}


def attention_residual(attention: Attention) -> fx.Node | None:
    """Return the addition that brings an attention's result back into the stream that its query came from.

    If further branches that do not depend on the sum are added to it directly (blocks whose attention and MLP run in
    parallel), return the last of these additions; if the stream has been turned, return it as (B, N, C).
    """
    upstream = ancestors(attention.query)
    reached = {attention.anchor}
    node = attention.anchor
    residual: fx.Node | None = None
    while (node := node.next).op != "root":
        if asks_shape(node) or not reached.intersection(node.all_input_nodes):
            continue
        reached.add(node)
        if residual is None:
            returns = is_add(node) and any(
                _scaled(s) in upstream and shape_of(s) == shape_of(node) for s in node.all_input_nodes
            )
            if returns:
                residual, reached = node, {node}
        elif _adds_branch(node, residual):
            residual, reached = node, {node}
        else:
            break
    if residual is None:
        return None
    views = [residual, *residual.users, *(view for user in residual.users for view in user.users)]
    return next((view for view in views if TURNED in view.meta), residual)


def _scaled(node: fx.Node) -> fx.Node:
    """Return what a node passes on, or multiplies by a parameter as a scaled residual; the node itself if neither."""
    while True:
        same = [source for source in node.all_input_nodes if shape_of(source) == shape_of(node)]
        scales = node.target in _PRODUCTS and len(node.all_input_nodes) == 2
        owner = node.graph.owning_module
        passes = node.op == "call_module" and owner is not None
        passes = passes and isinstance(owner.get_submodule(str(node.target)), nn.Identity)  # type: ignore[union-attr]
        if len(same) != 1 or not (scales or passes):
            return node
        node = same[0]


def _adds_branch(node: fx.Node, total: fx.Node) -> bool:
    """Return True if a node is the only reader of ``total`` and adds a branch to it that does not depend on it."""
    return (
        is_add(node)
        and total in node.all_input_nodes
        and len([u for u in total.users if not asks_shape(u)]) == 1
        and not any(s is not total and total in ancestors(s) for s in node.all_input_nodes)
        and all(shape_of(s) == shape_of(total) for s in node.all_input_nodes)
    )


def _obstacle(attention: Attention, residual: fx.Node | None) -> str | None:
    """Return why no tokens can merge after an attention, or None."""
    if residual is None:
        return "no addition brings its result back to where its query came from"
    stream, keys = shape_of(residual) or (), attention.key_shape
    if not keys:
        return f"its keys are {shape_of(attention.keys)}, not (batch, heads, tokens, channels)"
    if len(stream) not in (3, 4):
        return f"its stream is {stream}, not (batch, tokens, channels) or a grid"
    if len(stream) == 4 or stream[0] != keys[0] or stream[1] != keys[2]:
        why = "windows" if stream[0] != keys[0] else "fewer tokens, or channels"
        return f"its keys {keys} are not the tokens of its stream {stream}: {why}"
    if (shape_of(attention.query) or (0, 0, 0))[-2] != keys[2]:
        return f"its queries {shape_of(attention.query)} are not the tokens of its keys {keys}"
    return None


def find_sites(gm: fx.GraphModule) -> tuple[list[Site], dict[str, str]]:
    """Return the self-attention blocks on (B, N, C) streams in graph order, and why other attentions cannot merge."""
    grouped: dict[fx.Node, list[Attention]] = {}
    reasons: dict[str, str] = {}
    for attention in find_attentions(gm):
        residual = attention_residual(attention)
        why = _obstacle(attention, residual)
        if why is None and residual is not None:
            grouped.setdefault(residual, []).append(attention)
        else:
            reasons[attention.anchor.name] = why or ""
    return [Site(tuple(attentions), residual) for residual, attentions in grouped.items()], reasons


def has_bias(attention: Attention) -> bool:
    """Return True if a fused attention adds a fixed bias for every pair of tokens, which can follow a merge."""
    return attention.mask is not None and PAIR_BIAS in attention.mask.meta


def _refuse_causal(sites: list[Site]) -> None:
    for attention in (attention for site in sites for attention in site.attentions):
        if not attention.transposed and argument(attention.anchor, 5, "is_causal", False) is not False:
            raise GraphError(
                "attention is causal, and merging moves tokens",
                layer=attention.anchor.name,
                expected="attention of every token to every other",
                found="is_causal",
                hint="use tome_r=0 for this model",
            )


def key_mask(sites: list[Site]) -> fx.Node | None:
    """Return the attention mask over keys that every block uses, or None if none does.

    Raises:
        GraphError: a mask differs between queries, heads or blocks; causal attention.
    """
    _refuse_causal(sites)
    masks = {attention.mask: attention for site in sites for attention in site.attentions if not has_bias(attention)}
    if not masks.keys() - {None}:
        return None
    mask, attention = next((m, a) for m, a in masks.items() if m is not None)
    shape = shape_of(mask) or ()
    tokens = attention.key_shape[2]
    if len(masks) > 1 or len(shape) != 4 or shape[1:] != (1, 1, tokens):
        plain = len(shape) >= 2 and shape[-2:] == (tokens, tokens)
        raise GraphError(
            "a mask for every query cannot follow merged tokens"
            if plain
            else "its attention mask cannot follow merged tokens",
            layer=attention.anchor.name,
            expected=f"no mask, or one over keys, (batch, 1, 1, {tokens}), the same in every block",
            found=f"{mask.name} of shape {shape}" + (", not in every block" if len(masks) > 1 and not plain else ""),
            hint="use tome_r=0 for this model",
        )
    return mask
