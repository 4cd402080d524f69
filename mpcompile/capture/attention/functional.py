"""The functional form of attention: projections, heads, ``scaled_dot_product_attention``, and the output projection.

These functions compute on proxies, and so add nodes to a graph. They never ask for a size: the batch and the tokens
stay free, whatever the example inputs. The formulas are those of ``torch.nn.functional.multi_head_attention_forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Value = Any  # a proxy of a tensor: type checkers do not know that fx.Proxy has the methods of Tensor


@dataclass(frozen=True)
class Mask:
    """A mask as torch.nn takes it: boolean and true where hidden, or added to the logits.

    Attributes:
        value: the mask; see ``rank``.
        rank: 1 or 2 for a mask over keys, (S) or (B, S); 2 to 4 for a mask over queries and keys, (L, S),
            (B x heads, L, S) or (B, heads, L, S).
        boolean: True if it holds booleans.
    """

    value: Value
    rank: int
    boolean: bool


@dataclass(frozen=True)
class Attention:
    """The tensors and options of one attention.

    Attributes:
        embed: width of the queries, and of the result.
        heads: number of heads.
        packed: weight (3 embed, embed) of all three projections; None if each has its own.
        separate: weights of the projections of queries, keys and values, if ``packed`` is None.
        in_bias: bias (3 embed) of the projections, or None.
        out_weight, out_bias: the output projection; the bias may be None.
        extra: one more key and one more value, each (1, 1, embed), or None.
        add_zero: one more key and value of zeros.
        dropout: rate of the dropout of attention weights: a number, or a node that follows the mode.
        dtype: dtype of the queries.
    """

    embed: int
    heads: int
    packed: Value
    separate: tuple[Value, Value, Value] | None
    in_bias: Value
    out_weight: Value
    out_bias: Value
    extra: tuple[Value, Value] | None = None
    add_zero: bool = False
    dropout: Any = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def drops(self) -> bool:
        """True if attention weights are dropped out, at least in training."""
        return not isinstance(self.dropout, (int, float)) or self.dropout > 0


class Masks:
    """Makes the masks of ``scaled_dot_product_attention``, each once per graph, right after the mask it is made from.

    Token merging follows a mask only if all layers read the same node.
    """

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], Value] = {}

    def _form(
        self, mask: Mask, shape: Callable[[Value], Value], form: str, additive: bool, dtype: torch.dtype
    ) -> Value:
        """Return a mask of the shape that ``shape`` gives it: added to the logits, or true where tokens are seen."""
        node = mask.value.node
        key = (node.target if node.op == "get_attr" else node, form, additive)
        if key not in self.made:
            while node.op == "placeholder" and node.next.op == "placeholder":
                node = node.next
            with node.graph.inserting_before(node.next):
                shaped = shape(mask.value)
                if mask.boolean and additive:
                    shaped = torch.zeros_like(shaped, dtype=dtype).masked_fill(shaped, float("-inf"))
                elif mask.boolean:
                    shaped = shaped.logical_not()
                self.made[key] = shaped
        return self.made[key]

    def combined(
        self, over_keys: Mask | None, plain: Mask | None, heads: int, dtype: torch.dtype, additive: bool
    ) -> tuple[Value, bool]:
        """Return the mask of both, (B or 1, heads or 1, L or 1, S) or (L, S), and True if it is added to the logits.

        Args:
            over_keys: a mask over keys, the same for every query.
            plain: a mask over queries and keys.
            additive: make a mask that is added even of boolean ones.
        """
        given = [mask for mask in (over_keys, plain) if mask is not None]
        if not given:
            return None, additive
        additive = additive or not all(mask.boolean for mask in given)
        forms = []
        if over_keys is not None:
            index = (slice(None),) * (over_keys.rank - 1) + (None, None, slice(None))
            forms.append(self._form(over_keys, lambda m: m[index], "keys", additive, dtype))
        if plain is not None:
            split = plain.rank == 3
            shape: Callable[[Value], Value] = (lambda m: m.unflatten(0, (-1, heads))) if split else (lambda m: m)
            forms.append(self._form(plain, shape, f"plain{heads if split else ''}", additive, dtype))
        if len(forms) == 1:
            return forms[0], additive
        return (forms[0] + forms[1] if additive else torch.logical_and(*forms)), additive


def _rows(tensor: Value, start: int, stop: int, whole: int) -> Value:
    """Return rows of a weight or bias."""
    return tensor if tensor is None or (start, stop) == (0, whole) else tensor[start:stop]


def _split_heads(x: Value, parts: int, a: Attention, batch_first: bool) -> list[Value]:
    """Take a projection apart into its parts, each (B, heads, N, D)."""
    depth = a.embed // a.heads
    if parts == 1:
        return [x.unflatten(-1, (a.heads, depth)).permute(*((0, 2, 1, 3) if batch_first else (1, 2, 0, 3)))]
    split = x.unflatten(-1, (parts, a.heads, depth)).permute(*((2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)))
    several = split.unbind(0)
    return [several[i] for i in range(parts)]


def project(query: Value, key: Value, value: Value, a: Attention, batch_first: bool) -> list[Value]:
    """Return queries, keys and values, each (B, heads, N, D).

    Inputs that are the same tensor are projected by one linear layer: all rows of the packed weight, or some of them.
    """
    inputs, width = [query, key, value], a.embed
    if a.packed is None:
        assert a.separate is not None  # either is given
        biases = [_rows(a.in_bias, i * width, (i + 1) * width, 3 * width) for i in range(3)]
        calls = zip(inputs, a.separate, biases, strict=True)
        return [_split_heads(F.linear(x, w, b), 1, a, batch_first)[0] for x, w, b in calls]
    results: list[Value] = []
    start = 0
    while start < 3:
        stop = start + 1
        while stop < 3 and inputs[stop].node is inputs[start].node:
            stop += 1
        weight, bias = (_rows(t, start * width, stop * width, 3 * width) for t in (a.packed, a.in_bias))
        projected: Any = F.linear(inputs[start], weight, bias)
        results += _split_heads(projected, stop - start, a, batch_first)
        start = stop
    return results


def _append(k: Value, v: Value, mask: Value, additive: bool, a: Attention) -> tuple[Value, Value, Value]:
    """Append the extra key and value, and those of zeros; every query sees them."""
    if a.extra is not None:
        extra = [t.unflatten(-1, (a.heads, a.embed // a.heads)).permute(0, 2, 1, 3) for t in a.extra]
        k, v = (torch.cat([x, e.expand(x.size(0), -1, -1, -1)], 2) for x, e in zip((k, v), extra, strict=True))
    if a.add_zero:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    more = int(a.extra is not None) + int(a.add_zero)
    if mask is not None and more:
        mask = F.pad(mask, (0, more), value=0.0 if additive else True)
    return k, v, mask


def attend(
    inputs: Sequence[Value],
    a: Attention,
    masks: Masks,
    *,
    batch_first: bool,
    over_keys: Mask | None = None,
    plain: Mask | None = None,
    causal: bool = False,
    weights: str | None = None,
) -> tuple[Value, Value]:
    """Return the result of an attention, and its weights if they are asked for.

    Args:
        inputs: query, key and value, (B, N, C) if ``batch_first``, else (N, B, C).
        over_keys, plain: see :meth:`Masks.combined`.
        causal: hide the keys after each query; there is no mask then.
        weights: None, ``"heads"`` for (B, heads, L, S), or ``"mean"`` for their mean over heads.
    """
    query, key, value = inputs
    q, k, v = project(query, key, value, a, batch_first)
    mask, additive = masks.combined(over_keys, plain, a.heads, a.dtype, weights is not None)
    k, v, mask = _append(k, v, mask, additive, a)
    found: Value = None
    if weights is None:
        options: dict[str, Any] = {"attn_mask": mask} if mask is not None else {}
        options |= {"is_causal": True} if causal else {}
        options |= {"dropout_p": a.dropout} if a.drops else {}
        mixed: Any = F.scaled_dot_product_attention(q, k, v, **options)
    else:
        logits = (q * (a.embed // a.heads) ** -0.5) @ k.transpose(-2, -1)
        found = (logits if mask is None else logits + mask).softmax(-1)
        if a.drops:
            found = F.dropout(found, a.dropout)
        mixed = found @ v
        found = found.mean(1) if weights == "mean" else found
    joined = mixed.permute(*((0, 2, 1, 3) if batch_first else (2, 0, 1, 3))).flatten(2)
    return F.linear(joined, a.out_weight, a.out_bias), found
