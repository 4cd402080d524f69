"""Block outputs of a student and its teacher, side by side, for feature matching.

A block is what repeats in a network: a path of modules up to its last number, such as ``blocks.3``, ``layer2.0`` or
``stages.1.blocks.0``. Its output is where its last module leads to, through the residual addition. Channels that
mpcompile reordered are read from the Plan, and put back into the teacher's order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.capture.importers import import_model
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import shape_of
from mpcompile.ir.shapes import propagate
from mpcompile.kernels import ops

_BLOCK = re.compile(r"^((?:.*\.)?\d+)\.")


@dataclass(frozen=True)
class Feature:
    """The output of one block.

    Attributes:
        block: its path.
        node: of the graph, (batch, tokens, channels) or (batch, channels, height, width).
        size: node with how many tokens each one stands for, (batch, tokens, 1), where tokens were merged; else None.
    """

    block: str
    node: fx.Node
    size: fx.Node | None = None


def _path(node: fx.Node) -> str | None:
    """The module that a node calls, or that owns what it reads."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_function":
        owners = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
        return owners[0] if owners else None
    return None


def _block(path: str | None) -> str | None:
    found = _BLOCK.match(path or "")
    return found.group(1) if found else None


def _keeps(node: fx.Node, before: fx.Node) -> bool:
    """Whether ``node`` merely adds to, activates or reorders the axes of ``before``."""
    old, new = shape_of(before), shape_of(node)
    return old is not None and new is not None and len(old) == len(new) and sorted(old) == sorted(new)


def block_outputs(gm: fx.GraphModule) -> list[Feature]:
    """The output of every block, in the graph's order. The graph has to carry shapes."""
    last: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        block = _block(_path(node))
        if block is not None and shape_of(node) is not None:
            last.pop(block, None)
            last[block] = node
    sizes = {n.args[0]: n for n in gm.graph.nodes if getattr(n.target, "__name__", "") == "getitem" and n.args[1] == 1}
    found, order = [], {node: i for i, node in enumerate(gm.graph.nodes)}
    merges = [n for n in gm.graph.nodes if n.target is ops.token_merge]
    for block, node in last.items():
        while len(node.users) == 1:
            (user,) = node.users
            if _path(user) is not None or user.op not in ("call_function", "call_method") or not _keeps(user, node):
                break
            node = user
        if len(shape_of(node) or ()) in (3, 4):
            before = [m for m in merges if order[m] < order[node]]
            found.append(Feature(block, node, sizes.get(before[-1]) if before else None))
    return found


class WithFeatures(nn.Module):
    """A graph that also returns the outputs of the named blocks; parameters are those of the module it is made from.

    Returns ``(output, [(feature, size or None), ...])``.
    """

    def __init__(self, gm: fx.GraphModule, blocks: Sequence[str]) -> None:
        super().__init__()
        features = {f.block: f for f in block_outputs(gm)}
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(gm.graph, copies)
        chosen = [features[block] for block in blocks]
        pairs = [(copies[f.node], None if f.size is None else copies[f.size]) for f in chosen]
        graph.output((output, pairs))
        self.gm = fx.GraphModule(gm, graph)

    def forward(self, *inputs: Any) -> Any:
        return self.gm(*inputs)


def channel_orders(student: nn.Module) -> dict[str, Tensor]:
    """Block -> where each of its channels is in the original model, for those whose channels were reordered."""
    found: dict[str, Tensor] = {}
    plan = student.plan if isinstance(student, IRModule) else None
    for record in plan.passes if plan is not None else ():
        if record.name == "permute":
            for entry in record.decision.get("classes", ()):
                for writer in entry.get("writers", ()):
                    block = _block(f"{writer}.")
                    if block is not None:
                        found[block] = torch.tensor(entry["order"][0])
    return found


def _in_order(feature: Tensor, order: Tensor | None) -> Tensor:
    """A teacher's feature with its channels in the student's order."""
    if order is None:
        return feature
    axis = 1 if feature.dim() == 4 and feature.shape[1] == len(order) else -1
    return feature.index_select(axis, order.to(feature.device))


def _summary(tokens: Tensor, size: Tensor | None, prefix: int) -> Tensor:
    """Prefix tokens, and the mean of the others weighted by size: (batch, prefix + 1, channels)."""
    rest = tokens[:, prefix:]
    if size is None:
        mean = rest.mean(1, keepdim=True)
    else:
        weight = size.reshape(len(size), -1, 1)[:, prefix:].to(rest.dtype)
        mean = (rest * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return torch.cat([tokens[:, :prefix], mean], 1)


def feature_loss(
    student: Sequence[tuple[Tensor, Tensor | None]],
    teacher: Sequence[tuple[Tensor, Tensor | None]],
    orders: Sequence[Tensor | None],
    prefix: int = 0,
) -> Tensor:
    """Mean over the blocks of ||student - teacher||^2 / ||teacher||^2.

    Where the student merged tokens, prefix tokens and the mean over the others are compared in place of each token.
    """
    losses = []
    for (found, size), (wanted, _), order in zip(student, teacher, orders, strict=True):
        wanted = _in_order(wanted, order)
        if found.shape != wanted.shape:
            found, wanted = _summary(found, size, prefix), _summary(wanted, None, prefix)
        found, wanted = found.float(), wanted.float()
        losses.append((found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30))
    return torch.stack(losses).mean()


@dataclass
class Pair:
    """Student and teacher as modules that return their block outputs too, and how to compare these."""

    student: WithFeatures
    teacher: WithFeatures
    blocks: list[str]
    orders: list[Tensor | None]
    prefix: int

    def loss(self, student: Any, teacher: Any) -> Tensor:
        """:func:`feature_loss` of what the two modules returned beside their outputs."""
        return feature_loss(student, teacher, self.orders, self.prefix)


def _merged_prefix(student: nn.Module) -> int:
    plan = student.plan if isinstance(student, IRModule) else None
    records = [r for r in plan.passes if r.name == "merge_tokens"] if plan is not None else []
    return int(records[0].decision.get("prefix", 0)) if records else 0


def pair(student: nn.Module, teacher: nn.Module, inputs: Sequence[Any]) -> Pair:
    """Match the blocks of a student from :func:`mpcompile.transform` with those of its teacher.

    Args:
        inputs: example inputs; shapes alone matter.

    Raises:
        InputError: the student is no transformed graph, or the two share no block of the same width.
    """
    if not isinstance(student, fx.GraphModule):
        raise InputError(
            "block outputs can't be found in this student",
            expected="the graph that mpcompile.transform returns",
            found=type(student).__name__,
            hint="distil without feature matching (features=0)",
        )
    propagate(student, inputs)
    other = import_model(teacher, tuple(inputs)).gm
    propagate(other, inputs)
    ours, theirs = (_widths(block_outputs(gm)) for gm in (student, other))
    blocks = [block for block, width in ours.items() if theirs.get(block) == width]
    if not blocks:
        raise InputError(
            "student and teacher share no block to match features of",
            expected=", ".join(list(ours)[:4]) or "a student with numbered blocks",
            found=", ".join(list(theirs)[:4]) or "none",
            hint="distil without feature matching (features=0)",
        )
    orders = channel_orders(student)
    return Pair(
        WithFeatures(student, blocks),
        WithFeatures(other, blocks).requires_grad_(False).eval(),
        blocks,
        [orders.get(block) for block in blocks],
        _merged_prefix(student),
    )


def _widths(features: Sequence[Feature]) -> Mapping[str, int]:
    """Block -> channels: the last axis of tokens, axis 1 of images."""
    shapes = {f.block: shape_of(f.node) or () for f in features}
    return {block: shape[1] if len(shape) == 4 else shape[-1] for block, shape in shapes.items()}
