"""Streams with the tokens on axis 0, (N, B, C), as ``batch_first=False`` has them, seen as (B, N, C) for merging."""

from __future__ import annotations

import torch
from torch import fx

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import fake_value, shape_of
from mpcompile.passes.merge_tokens.sites import TURNED, attention_residual, find_attentions


def sequence_first(gm: IRModule) -> list[fx.Node]:
    """Return the attention residuals of blocks whose stream is (N, B, C).

    A stream with as many tokens as samples counts as (B, N, C).
    """
    found: dict[fx.Node, None] = {}
    for attention in find_attentions(gm):
        residual, keys = attention_residual(attention), attention.key_shape
        stream = shape_of(residual) or () if residual is not None else ()
        if (
            residual is not None
            and keys
            and len(stream) == 3
            and stream[:2] == (keys[2], keys[0]) != (keys[0], keys[2])
        ):
            found[residual] = None
    return list(found)


def turn(gm: IRModule) -> None:
    """Put (B, N, C) and back behind each residual of :func:`sequence_first`: merges come in between."""
    for residual in sequence_first(gm):
        users = list(residual.users)
        with gm.graph.inserting_before(residual.next):
            turned = gm.graph.call_function(torch.transpose, (residual, 0, 1))
            back = gm.graph.call_function(torch.transpose, (turned, 0, 1))
        value = fake_value(residual)
        turned.meta = {TURNED: True, "val": value.transpose(0, 1), "macs": 0}
        back.meta = {"val": value, "macs": 0}
        for user in users:
            user.replace_input_with(residual, back)
