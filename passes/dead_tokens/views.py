"""Rules of operations that move or join values: reshapes, permutations, expansions, concatenation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument, fake_value, target_name
from mpcompile.passes.dead_tokens.boxes import FULL, Box, box, count
from mpcompile.passes.dead_tokens.selections import SELECTIONS, ViewRule, Whole, sized, source_of

if TYPE_CHECKING:
    from mpcompile.passes.dead_tokens.rules import Builder

_RESHAPES = ("reshape", "view", "_unsafe_view", "flatten", "unflatten")


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the axes of a reshape's input and output that hold the same values, in the smallest groups.

    Example:
        >>> list(_groups((2, 5, 12), (2, 5, 3, 4)))
        [([0], [0]), ([1], [1]), ([2], [2, 3])]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(left), j + len(right)
        while (sizes := [math.prod(before[a] for a in left), math.prod(after[a] for a in right)])[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        yield left, right


def _reshape(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    """Follow an axis that stays one, or is the first of those that it becomes.

    An axis that is joined with another is not followed: where its indices lie then depends on the batch.
    """
    source, asked = source_of(node), dict(part)
    before, after = sized(source), sized(node)
    if 0 in before:
        raise Whole
    own = {}
    for left, right in _groups(before, after):
        held = [axis for axis in right if axis in asked]
        if not held:
            continue
        if len(left) != 1 or held != right[:1]:
            raise Whole
        runs, inner = asked[held[0]], math.prod(after[axis] for axis in right[1:])
        if len(right) > 1 and any(start < 0 for start, _ in runs):
            raise Whole
        own[left[0]] = tuple((start * inner, stop * inner) for start, stop in runs)
    value = b.tensor(source, box(own))
    if part == FULL:
        return b.again(node, (value, *fx.node.map_arg(node.args[1:], b.number)), node.kwargs)
    return _resized(gm, b, node, value, [count(asked[axis]) if axis in asked else None for axis in range(len(after))])


def _inserted(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    """Follow ``unsqueeze``, and ``squeeze`` of one axis."""
    source, dim = source_of(node), argument(node, 1, "dim")
    if not isinstance(dim, int):
        raise Whole
    new = target_name(gm, node) == "unsqueeze"
    long = len(sized(node if new else source))
    dim %= long
    if not new and sized(source)[dim] != 1:
        return b.again(node, (b.tensor(source, part), dim))
    if new and dim in dict(part):
        raise Whole
    step = -1 if new else 1
    own = box({axis + step * (axis > dim if new else axis >= dim): runs for axis, runs in part})
    return b.again(node, (b.tensor(source, own), dim))


def _resized(gm: IRModule, b: Builder, node: fx.Node, value: Any, sizes: list[int | None]) -> Any:
    """Repeat a reshape on a part, with other lengths where ``sizes`` has one."""
    name, rest = target_name(gm, node), node.args[1:]
    if name == "flatten":
        return b.again(node, (value, *rest), node.kwargs)  # a part of an axis that stays as it is
    if name == "unflatten":
        dim, given = argument(node, 1, "dim"), argument(node, 2, "sizes")
        if not isinstance(given, (tuple, list)) or not isinstance(dim, int):
            raise Whole
        first = dim % len(sized(source_of(node)))
        fresh = [b.number(size) if s is None else s for size, s in zip(given, sizes[first:], strict=False)]
        return b.again(node, (value, dim, fresh))
    shape: Any = rest[0] if len(rest) == 1 and not isinstance(rest[0], int) else rest
    if isinstance(shape, fx.Node) and isinstance(fake_value(shape), int):
        shape = (shape,)
    if isinstance(shape, fx.Node):  # the shape of another tensor
        fresh = [b.size(shape, axis) if size is None else size for axis, size in enumerate(sizes)]
    elif isinstance(shape, (tuple, list)) and len(shape) == len(sizes):
        fresh = [b.number(given) if size is None else size for given, size in zip(shape, sizes, strict=True)]
    else:
        raise Whole
    return b.call(torch.reshape, (value, fresh))


def _permute(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    source, rank = source_of(node), len(sized(node))
    name = target_name(gm, node)
    order = list(range(rank))
    if name == "permute":
        dims = argument(node, 1, "dims")
        given = list(dims if isinstance(dims, (tuple, list)) else node.args[1:])
        if len(given) != rank or not all(isinstance(d, int) for d in given):
            raise Whole
        order = [d % rank for d in given]
    elif name in ("t", "mT", "getattr"):
        order[-2:] = reversed(order[-2:])
    else:
        i, j = (argument(node, place, key) for place, key in ((1, "dim0"), (2, "dim1")))
        if not isinstance(i, int) or not isinstance(j, int):
            raise Whole
        order[i], order[j] = order[j], order[i]
    own = box({order[axis]: runs for axis, runs in part})
    return b.again(node, (b.tensor(source, own), *node.args[1:]), node.kwargs)


def _expand(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    source = source_of(node)
    before, after = sized(source), sized(node)
    shift, asked = len(after) - len(before), dict(part)
    own = {axis - shift: runs for axis, runs in part if axis >= shift and before[axis - shift] != 1}
    given = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    if not isinstance(given, (tuple, list)) or len(given) != len(after):
        raise Whole
    sizes = [count(asked[a]) if a in asked else b.number(size) for a, size in enumerate(given)]
    value = b.tensor(source, box(own))
    return b.again(node, (value, *sizes) if node.op == "call_method" else (value, sizes), node.kwargs)


def _cat(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(tensors, (tuple, list)) or not isinstance(dim, int) or node.kwargs.get("out") is not None:
        raise Whole
    dim %= len(sized(node))
    rest, runs = {axis: r for axis, r in part if axis != dim}, dict(part).get(dim)
    if runs is None:
        values = [b.tensor(each, box(rest)) for each in tensors]
        return b.again(node, (values, dim))
    lengths = [sized(each)[dim] for each in tensors]
    ends = list(itertools.accumulate(lengths, initial=0))
    values = []
    for start, stop in runs:
        total = ends[-1] if start < 0 else 0
        for each, first, last in zip(tensors, ends, ends[1:], strict=False):
            low, high = max(start + total, first) - first, min(stop + total, last) - first
            if low >= high:
                continue
            ahead = tensors[: ends.index(first)] if start >= 0 else ()
            if (start < 0 and each is not tensors[-1]) or not all(_is_constant(gm, t, dim) for t in ahead):
                raise Whole
            own = ((low - last + first, high - last + first),) if start < 0 else ((low, high),)
            whole = (low, high) == (0, last - first)
            values.append(b.tensor(each, box(rest if whole else {**rest, dim: own})))
    return values[0] if len(values) == 1 else b.again(node, (values, dim))


def _is_constant(gm: IRModule, node: fx.Node, axis: int) -> bool:
    """Return True if the length of an axis is that of a parameter, or of a slice with fixed ends."""
    if node.op == "get_attr":
        return True
    name = target_name(gm, node)
    if name in ("expand", "to", "type_as", "clone", "contiguous") and node.args and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        same = len(sized(source)) == len(sized(node)) and sized(source)[axis] == sized(node)[axis]
        return same and _is_constant(gm, source, axis)
    if name == "getitem" and isinstance(node.args[1], tuple) and axis < len(node.args[1]):
        pick = node.args[1][axis]
        return (
            isinstance(pick, slice) and isinstance(pick.stop, int) and pick.stop >= 0 and Ellipsis not in node.args[1]
        )
    return False


def _stack(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(tensors, (tuple, list)) or not isinstance(dim, int):
        raise Whole
    dim %= len(sized(node))
    if dim in dict(part):
        raise Whole
    own = box({axis - (axis > dim): runs for axis, runs in part})
    return b.again(node, ([b.tensor(each, own) for each in tensors], dim))


VIEWS: dict[str, ViewRule] = {
    **SELECTIONS,
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(("unsqueeze", "squeeze"), _inserted),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "t", "mT"), _permute),
    "expand": _expand,
    **dict.fromkeys(("cat", "concat"), _cat),
    "stack": _stack,
}
"""Name of an operation -> its rule."""
