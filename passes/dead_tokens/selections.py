"""Rules of operations that select values: indexing, slices, parts of splits, and tokens that pass a merge."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import ELEMENTWISE, argument, fake_value, hint, shape_of, target_name
from mpcompile.kernels import ops, schema
from mpcompile.passes.dead_tokens.boxes import Box, Runs, box

if TYPE_CHECKING:
    from mpcompile.passes.dead_tokens.rules import Builder

_ALL = (slice(None), slice(0, None), slice(None, None, 1), slice(0, None, 1))
_SPLITS = ("unbind", "chunk", "split", "split_with_sizes")


class Whole(Exception):
    """Only all of a value can be computed, from all of its operands."""


class Wider(Exception):
    """A value can only be computed whole along some axes.

    Attributes:
        axes: these axes.
    """

    def __init__(self, axes: Iterable[int]) -> None:
        super().__init__()
        self.axes = frozenset(axes)


def sized(node: fx.Node) -> tuple[int, ...]:
    shape = shape_of(node)
    if shape is None:
        raise Whole
    return shape


def source_of(node: fx.Node) -> fx.Node:
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise Whole
    return node.args[0]


def _taken(start: int, stop: int | None, size: int, fixed: bool) -> Runs | None:
    """Return the runs of a slice; None if they depend on the length of the axis, or are all of it."""
    if start < 0:
        return ((start, 0 if stop is None else stop),) if stop is None or stop < 0 else None
    if stop is None or stop >= size:
        return ((start, size),) if fixed and start else None
    return ((start, stop),) if stop > start else None


def _through(runs: Runs, start: int, stop: int | None) -> Runs | None:
    """Return the runs, in a whole axis, of those in its slice from ``start`` to ``stop``; None if that is unknown."""
    if any(first < 0 for first, _ in runs):
        return runs if start == 0 and stop is None else None
    if start < 0 and any(start + last > 0 for _, last in runs):
        return None
    return tuple((start + first, start + last) for first, last in runs)


def _is_fixed(gm: IRModule, node: fx.Node, axis: int) -> bool:
    """Return True if an axis holds the channels of a linear layer, whose number is that of its weight's rows."""
    if axis != len(sized(node)) - 1:
        return False
    while target_name(gm, node) in ELEMENTWISE and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return target_name(gm, node) in ("linear", "masked_linear", "Linear", "MaskedLinear")


def _indexed(gm: IRModule, b: Builder, source: fx.Node, picks: Sequence[Any], part: Box) -> Any:
    """Index with numbers, slices and None, one entry for each axis of the source and each new axis.

    Each axis is asked for what is needed of it; what is left to do is to drop axes, add them, and cut.
    """
    shape, asked = sized(source), dict(part)
    own: dict[int, Runs] = {}
    then: list[Any] = []
    axis = out = 0
    for pick in picks:
        if pick is None:
            then.append(None)
            out += 1
            continue
        if isinstance(pick, int):
            own[axis] = ((pick, pick + 1),)
            then.append(0)
            axis += 1
            continue
        start, stop = pick.start or 0, pick.stop
        runs = None
        if pick.step in (None, 1) and isinstance(start, int) and isinstance(stop, (int, type(None))):
            if out in asked:
                runs = _through(asked[out], start, stop)
            else:
                runs = _taken(start, stop, shape[axis], _is_fixed(gm, source, axis))
        if runs is None and out in asked:
            raise Whole
        if runs is not None:
            own[axis] = runs
        then.append(pick if runs is None else slice(None))
        axis, out = axis + 1, out + 1
    value = b.tensor(source, box(own))
    then = [slice(None) if pick in _ALL else fx.node.map_arg(pick, b.number) for pick in then]
    while then and then[-1] == slice(None):
        then.pop()
    return b.call(operator.getitem, (value, tuple(then))) if then else value


def _getitem(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    source, index = node.args
    assert isinstance(source, fx.Node)
    if not isinstance(fake_value(source), Tensor):
        return _of_several(gm, b, source, index, part)
    given = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(i, (int, slice, type(None), type(Ellipsis))) or isinstance(i, bool) for i in given):
        raise Whole
    rank = len(sized(source))
    missing = rank - sum(i is not None and i is not Ellipsis for i in given)
    if Ellipsis in given:
        place = given.index(Ellipsis)
        given = (*given[:place], *[slice(None)] * missing, *given[place + 1 :])
    else:
        given = (*given, *[slice(None)] * missing)
    return _indexed(gm, b, source, given, part)


def _axis_picks(source: fx.Node, dim: int, pick: Any) -> list[Any]:
    picks: list[Any] = [slice(None)] * len(sized(source))
    picks[dim] = pick
    return picks


def _select(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    source, dim, index = source_of(node), argument(node, 1, "dim"), argument(node, 2, "index")
    if not isinstance(dim, int) or not isinstance(index, int):
        raise Whole
    return _indexed(gm, b, source, _axis_picks(source, dim, index), part)


def _slice(gm: IRModule, b: Builder, node: fx.Node, part: Box) -> Any:
    source, dim = source_of(node), argument(node, 1, "dim", 0)
    start, stop, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
    if target_name(gm, node) == "narrow":
        length = argument(node, 3, "length")
        if not isinstance(start, int) or not isinstance(length, int):
            raise Whole
        stop = start + length if start >= 0 else (start + length) or None
    if not isinstance(dim, int):
        raise Whole
    stop = None if isinstance(stop, int) and stop >= 2**31 else stop
    return _indexed(gm, b, source, _axis_picks(source, dim, slice(start, stop, None if step == 1 else step)), part)


def _of_several(gm: IRModule, b: Builder, source: fx.Node, index: Any, part: Box) -> Any:
    """Take one of the tensors that an operation yields."""
    if not isinstance(index, int):
        raise Whole
    name = target_name(gm, source)
    if source.target is ops.token_merge:
        return _unmerged(b, source, index, part)
    if name not in _SPLITS or source.op == "call_module":
        raise Whole
    whole = source_of(source)
    dim = argument(source, 1 if name == "unbind" else 2, "dim", 0)
    if not isinstance(dim, int):
        raise Whole
    rank = len(sized(whole))
    dim %= rank
    if name == "unbind":
        return _indexed(gm, b, whole, _axis_picks(whole, dim, index), part)
    lengths = [int(hint(each.shape[dim])) for each in fake_value(source)]
    index %= len(lengths)
    start = sum(lengths[:index])
    if not (_is_fixed(gm, whole, dim) or _is_listed(source, name, index, len(lengths))):
        raise Whole  # where the part lies may vary from call to call
    asked = dict(part)
    runs = _through(asked[dim], start, None) if dim in asked else ((start, start + lengths[index]),)
    if runs is None:
        raise Whole
    return b.tensor(whole, box({**asked, dim: runs}))


def _is_listed(split: fx.Node, name: str, index: int, count: int) -> bool:
    """Return True if a split itself says where one of its parts lies."""
    sizes = argument(split, 1, "split_size_or_sections", split.kwargs.get("split_size"))
    if name == "chunk":
        return False
    if isinstance(sizes, (tuple, list)):
        return all(isinstance(size, int) for size in sizes[: index + 1])
    return isinstance(sizes, int) and index < count - 1


def _unmerged(b: Builder, merge: fx.Node, index: int, part: Box) -> Any:
    """Take tokens in front of those that merge: they and their sizes pass a merge unchanged."""
    args, runs = schema.bind(merge), dict(part).get(1)
    if index not in (0, 1) or runs is None or any(start < 0 or stop > args.prefix for start, stop in runs):
        raise Whole
    return b.tensor(args.x if index == 0 else args.size, part)


ViewRule = Callable[[IRModule, "Builder", fx.Node, Box], Any]
SELECTIONS: dict[str, ViewRule] = {
    "getitem": _getitem,
    "select": _select,
    **dict.fromkeys(("slice", "narrow"), _slice),
}
"""Name of an operation -> its rule."""
