"""Attention biases that depend on parameters alone, such as relative position biases."""

from __future__ import annotations

import torch
from torch import fx

from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import fake_value, shape_of
from mpcompile.passes.merge_tokens.ends import from_data
from mpcompile.passes.merge_tokens.idle_masks import Constants
from mpcompile.passes.merge_tokens.sites import PAIR_BIAS, Attention, ancestors, find_attentions

_HIDDEN = -1e3  # a constant bias below this hides a key, as a mask does


def _written_out(attention: Attention) -> set[fx.Node]:
    """Return all nodes that feed a softmax, but for those upstream of its queries and keys."""
    return ancestors(attention.anchor) - ancestors(attention.query) - ancestors(attention.keys)


def mark_biases(gm: IRModule, lifted: Lifted) -> None:
    """Mark every fixed bias over pairs of tokens, so that copies of the graph know it too.

    A bias is fixed if it does not depend on the model's input. Boolean masks, and constants that hide keys, are masks
    and stay unmarked.

    Args:
        gm: the graph; the meta of its nodes is changed.
        lifted: parameters that are graph inputs.
    """
    data, constants = from_data(gm, lifted), Constants(gm, lifted)
    for attention in find_attentions(gm):
        fused = not attention.transposed
        masks = set() if attention.mask is None else {attention.mask}
        candidates = masks if fused else _written_out(attention)
        keys = attention.key_shape[2:3]
        for node in candidates - data:
            value, shape = fake_value(node), shape_of(node) or ()
            if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or shape[-1:] != keys:
                continue
            known = constants.fixed(node)
            if known is None or bool((known > _HIDDEN).all()):
                node.meta[PAIR_BIAS] = True
