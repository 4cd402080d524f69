"""Streams of another shape, (N, B, C), (B, C, H, W) or (B, H, W, C), seen as (B, N, C) for merging."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument, fake_value, shape_of, target_name
from mpcompile.passes.merge_tokens.sites import TURNED, Attention, attention_residual, find_attentions

_Step = tuple[str, tuple[Any, ...]]  # a method of tensors and its arguments


def _steps(residual: fx.Node, attention: Attention) -> tuple[list[_Step], list[_Step]] | None:
    """Return the methods that turn a stream into (B, N, C), and those that turn it back; None if it has that shape.

    A stream with as many tokens as samples counts as (B, N, C).
    """
    stream, keys = shape_of(residual) or (), attention.key_shape
    if not keys:
        return None
    if len(stream) == 3 and stream[:2] == (keys[2], keys[0]) != (keys[0], keys[2]):
        swap: list[_Step] = [("transpose", (0, 1))]
        return swap, swap
    value = fake_value(residual)
    if len(stream) != 4 or stream[0] != keys[0] or not all(isinstance(size, int) for size in value.shape[1:]):
        return None
    if stream[2] * stream[3] == keys[2]:
        return [("flatten", (2,)), ("transpose", (1, 2))], [("transpose", (1, 2)), ("unflatten", (2, stream[2:]))]
    if stream[1] * stream[2] == keys[2]:
        return [("flatten", (1, 2))], [("unflatten", (1, stream[1:3]))]
    return None


def turnable(gm: IRModule) -> dict[fx.Node, tuple[list[_Step], list[_Step]]]:
    """Return the attention residuals of blocks whose stream is not (B, N, C), and how to turn them there and back."""
    found = {}
    for attention in find_attentions(gm):
        residual = attention_residual(attention)
        steps = None if residual is None or TURNED in residual.meta else _steps(residual, attention)
        if residual is not None and steps is not None:
            found[residual] = steps
    return found


def turn(gm: IRModule) -> None:
    """Put (B, N, C) and back behind each residual of :func:`turnable`: merges come in between."""
    for residual, (there, back) in turnable(gm).items():
        users = list(residual.users)
        turned = _called(residual, there)
        turned.meta[TURNED] = True
        again = _called(turned, back)
        for user in users:
            user.replace_input_with(residual, again)


def _called(node: fx.Node, steps: list[_Step]) -> fx.Node:
    for method, args in steps:
        with node.graph.inserting_before(node.next):
            result = node.graph.call_method(method, (node, *args))
        call: Callable[..., Tensor] = getattr(fake_value(node), method)
        result.meta = {"val": call(*args), "macs": 0}
        node = result
    return node


def rows_of_norms(gm: IRModule) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
    """Return each flatten(0, 1), BatchNorm1d, reshape_as in a row: a norm of channels that joins tokens and batch."""
    found = []
    for norm in gm.graph.nodes:
        if norm.op != "call_module" or type(gm.get_submodule(str(norm.target))) is not nn.BatchNorm1d:
            continue
        flat, users = norm.args[0], list(norm.users)
        if not isinstance(flat, fx.Node) or target_name(gm, flat) != "flatten" or len(flat.users) != 1:
            continue
        ends = (argument(flat, 1, "start_dim", 0), argument(flat, 2, "end_dim", -1))
        shaped = len(users) == 1 and target_name(gm, users[0]) == "reshape_as" and users[0].args[1] is flat.args[0]
        if ends == (0, 1) and shaped and len(shape_of(flat.args[0]) or ()) == 3:  # type: ignore[arg-type]
            found.append((flat, norm, users[0]))
    return found


def part_rows(gm: IRModule) -> None:
    """Let the norms of :func:`rows_of_norms` read (B, C, N), where tokens have an axis of their own."""
    for flat, norm, shaped in rows_of_norms(gm):
        source = flat.args[0]
        with gm.graph.inserting_before(norm):
            turned = gm.graph.call_function(torch.transpose, (source, 1, 2))
        turned.meta = {"val": fake_value(source).transpose(1, 2), "macs": 0}  # type: ignore[arg-type]
        norm.args = (turned, *norm.args[1:])
        norm.meta["val"] = turned.meta["val"]
        with gm.graph.inserting_before(shaped):
            back = gm.graph.call_function(torch.transpose, (norm, 1, 2))
        back.meta = dict(shaped.meta)
        shaped.replace_all_uses_with(back)
        gm.graph.erase_node(shaped)
        gm.graph.erase_node(flat)
