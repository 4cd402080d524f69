"""Block outputs of a student and its teacher, side by side, for feature matching.

A block is the repeating unit of a network: a module path up to its last number, such as ``blocks.3``, ``layer2.0`` or
``stages.1.blocks.0``. Its output is the output of its last module, followed through the residual addition. The Plan
records which channels mpcompile reordered; the teacher's channels are compared in that order. Of a block in which the
student computes only some tokens, since nothing reads the others, these tokens are compared.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile._moved import renamed
from mpcompile.capture.importers import import_model
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import shape_of
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from mpcompile.passes.merge_tokens.sites import ancestors

__getattr__ = renamed(__name__, {"Pair": "training.features.FeaturePair"})
_BLOCK = re.compile(r"^((?:.*\.)?\d+)\.")


@dataclass(frozen=True)
class Feature:
    """The output of one block.

    Attributes:
        block: module path of the block.
        node: output of the block in the graph, (batch, tokens, channels) or (batch, channels, height, width).
        size: if tokens were merged, the node that counts the tokens merged into each, (batch, tokens, 1); else None.
        tokens: slices of tokens by which it, or a stream before it, became shorter; see :func:`_selections`.
    """

    block: str
    node: fx.Node
    size: fx.Node | None = None
    tokens: tuple[slice, ...] = ()


def _path(node: fx.Node) -> str | None:
    """Return the path of the module that a node calls, or that owns the parameters it reads."""
    if node.op == "call_module":
        return str(node.target)
    if node.op == "call_function":
        owners = [str(n.target).rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr"]
        return owners[0] if owners else None
    return None


def _block(path: str | None) -> str | None:
    match = _BLOCK.match(path or "")
    return match.group(1) if match else None


def _same_axes(node: fx.Node, before: fx.Node) -> bool:
    """Return True if ``node`` only adds to, activates or reorders the axes of ``before``."""
    old, new = shape_of(before), shape_of(node)
    return old is not None and new is not None and len(old) == len(new) and sorted(old) == sorted(new)


def _selections(node: fx.Node) -> tuple[slice, ...]:
    """Return the slices of tokens by which a block's output, (batch, tokens, channels), became shorter than a stream.

    They are searched upwards along tensors of as many tokens, such as the branches of residual additions.
    """
    tokens, stack, seen = (shape_of(node) or ())[1], [node], {node}
    found: list[slice] = []
    while stack:
        current = stack.pop()
        for source in current.all_input_nodes:
            shape = shape_of(source) or ()
            index = current.args[1] if current.target is operator.getitem else None
            if len(shape) != 3 or source in seen:
                continue
            if shape[1] == tokens:
                seen.add(source)
                stack.append(source)
            elif isinstance(index, tuple) and len(index) > 1 and isinstance(index[1], slice) and index[1] not in found:
                found.append(index[1])
    return tuple(found)


def block_outputs(gm: fx.GraphModule) -> list[Feature]:
    """Return the output of every block, in graph order. The graph has to carry shapes."""
    last: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        block = _block(_path(node))
        if block is not None and shape_of(node) is not None:
            last.pop(block, None)
            last[block] = node
    sizes = {n.args[0]: n for n in gm.graph.nodes if getattr(n.target, "__name__", "") == "getitem" and n.args[1] == 1}
    outputs = []
    merges = [n for n in gm.graph.nodes if n.target is ops.token_merge]
    for block, node in last.items():
        while len(node.users) == 1:
            (user,) = node.users
            if _path(user) is not None or user.op not in ("call_function", "call_method") or not _same_axes(user, node):
                break
            node = user
        if len(shape_of(node) or ()) in (3, 4):
            upstream = ancestors(node)  # other streams of tokens have merges of their own
            before = [m for m in merges if m in upstream]
            parts = _selections(node) if len(shape_of(node) or ()) == 3 else ()
            outputs.append(Feature(block, node, sizes.get(before[-1]) if before else None, parts))
    return outputs


class WithFeatures(nn.Module):
    """A graph that also returns the outputs of the named blocks, and shares its parameters with the original module.

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


def channel_orders(student: fx.GraphModule, features: Iterable[Feature]) -> dict[str, Tensor]:
    """Return block -> the index of each channel of its output in the original model, for blocks with reordered outputs.

    Channels are those of the layers that write the output: the nearest upstream, with as many outputs. Channels inside
    of a block have orders of their own.
    """
    plan = student.plan if isinstance(student, IRModule) else None
    orders: dict[str, list[int]] = {}
    for record in plan.passes if plan is not None else ():
        for entry in record.decision.get("classes", ()) if record.name == "permute" else ():
            orders |= dict.fromkeys(entry.get("writers", ()), entry["order"][0])
    order_at = {layer.node: orders.get(layer.name) for layer in layers(student)} if orders else {}
    found = {feature.block: _order(feature.node, order_at) for feature in features}
    return {block: torch.tensor(order) for block, order in found.items() if order is not None}


def _order(output: fx.Node, order_at: Mapping[fx.Node, list[int] | None]) -> list[int] | None:
    """Return the order of a tensor's channels, from the nearest layers before it; None if they are as they were."""
    queue, seen = [output], {output}
    for node in queue:  # grows meanwhile
        if node in order_at:
            order = order_at[node]
            if order is not None and len(order) in (shape_of(output) or ()):
                return order
            continue
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        queue += new
    return None


def _in_order(feature: Tensor, order: Tensor | None) -> Tensor:
    """Return a teacher's feature with its channels, on axis 1 of images or on the last one, in the student's order."""
    if order is None:
        return feature
    axis = 1 if feature.dim() == 4 and feature.shape[1] == len(order) else -1
    return feature.index_select(axis, order.to(feature.device))


def _summary(tokens: Tensor, size: Tensor | None, prefix: int) -> Tensor:
    """Return the prefix tokens and the size-weighted mean of the others: (batch, prefix + 1, channels)."""
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
    tokens: Sequence[slice | None] | None = None,
) -> Tensor:
    """Return the mean over the blocks of ||student - teacher||^2 / ||teacher||^2, a scalar.

    If the student merged tokens, the prefix tokens and the mean over the others are compared instead of every token.
    If it does not compute all tokens, those that it computes are compared.

    Args:
        student, teacher: (feature, size or None) of each block.
        orders: for each block, the index of each student channel in the teacher's feature, or None.
        prefix: tokens at the start that are never merged, such as the class token.
        tokens: for each block, the tokens that the student computes, or None for all.
    """
    losses = []
    parts = tokens or [None] * len(student)
    for (feature, size), (target, _), order, part in zip(student, teacher, orders, parts, strict=True):
        target, first = _in_order(target, order), prefix
        if part is not None:
            target, size = target[:, part], None if size is None else size[:, part]
            first = max(0, prefix - (part.start or 0))
        if feature.shape != target.shape:
            feature, target = _summary(feature, size, first), _summary(target, None, first)
        feature, target = feature.float(), target.float()
        losses.append((feature - target).square().sum() / target.square().sum().clamp(min=1e-30))
    return torch.stack(losses).mean()


@dataclass
class FeaturePair:
    """Student and teacher as modules that also return their block outputs, and how to compare the two."""

    student: WithFeatures
    teacher: WithFeatures
    blocks: list[str]
    orders: list[Tensor | None]
    prefix: int
    tokens: list[slice | None]

    def loss(self, student: Any, teacher: Any) -> Tensor:
        """Return the :func:`feature_loss` of the block outputs that the two modules returned."""
        return feature_loss(student, teacher, self.orders, self.prefix, self.tokens)


def _merged_prefix(student: nn.Module) -> int:
    plan = student.plan if isinstance(student, IRModule) else None
    records = [r for r in plan.passes if r.name == "merge_tokens"] if plan is not None else []
    decision = records[0].decision if records else {}
    return min(int(stream.get("prefix", 0)) for stream in decision.get("streams") or [decision])


def pair(student: nn.Module, teacher: nn.Module, inputs: Sequence[Any]) -> FeaturePair:
    """Match the blocks of a student from :func:`mpcompile.transform` with those of its teacher.

    Args:
        inputs: example inputs; only their shapes matter.

    Raises:
        InputError: the student is not a transformed graph, or the two share no block of the same width.
    """
    if not isinstance(student, fx.GraphModule):
        raise InputError(
            "this student has no graph to read block outputs from",
            expected="the graph that mpcompile.transform returns",
            found=type(student).__name__,
            hint="distil without feature matching (features=0)",
        )
    propagate(student, inputs)
    other = import_model(teacher, tuple(inputs)).gm
    propagate(other, inputs)
    features, references = ({f.block: f for f in block_outputs(gm)} for gm in (student, other))
    ours, theirs = _widths(features.values()), _widths(references.values())
    tokens = {
        block: _computed(features[block], references[block]) for block in ours if theirs.get(block) == ours[block]
    }
    blocks = [block for block, part in tokens.items() if part]
    if not blocks:
        raise InputError(
            "student and teacher share no block of the same width",
            expected=", ".join(list(ours)[:4]) or "a student with numbered blocks",
            found=", ".join(list(theirs)[:4]) or "none",
            hint="distil without feature matching (features=0)",
        )
    orders = channel_orders(student, features.values())
    return FeaturePair(
        WithFeatures(student, blocks),
        WithFeatures(other, blocks).requires_grad_(False).eval(),
        blocks,
        [orders.get(block) for block in blocks],
        _merged_prefix(student),
        [tokens[block][0] for block in blocks],
    )


def _computed(feature: Feature, reference: Feature) -> list[slice | None]:
    """Return a list of the tokens of a teacher's block that the student computes, None for all; [] if unknown."""
    if feature.tokens == reference.tokens:
        return [None]
    return list(feature.tokens) if len(feature.tokens) == 1 and not reference.tokens else []


def _widths(features: Iterable[Feature]) -> Mapping[str, int]:
    """Return the number of channels of each block: the last axis of tokens, axis 1 of images."""
    shapes = {f.block: shape_of(f.node) or () for f in features}
    return {block: shape[1] if len(shape) == 4 else shape[-1] for block, shape in shapes.items()}
