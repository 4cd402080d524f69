"""Axes that a reshape joins: tokens or heads with the batch, as in an exported ``nn.MultiheadAttention``."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import fx, nn

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument, element_count, fake_value, target_name
from mpcompile.layers import MaskedLinear

RESHAPES = frozenset({"reshape", "view", "_unsafe_view"})
_REGROUPS = RESHAPES | {"flatten", "unflatten", "unsqueeze", "squeeze"}
_ROW_BY_ROW = frozenset({"linear", "masked_linear", "dropout", "contiguous", "clone", "to", "alias"})
_Shape = Callable[[fx.Node], tuple[int, ...]]


def group_of(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> tuple[int, range] | None:
    """Return the axis of a reshape's result that holds ``axis`` of its input, and all axes of the input that it joins.

    None if the reshape splits the axis.
    """
    for place, length in enumerate(after):
        ahead = element_count(after[:place])
        for first in range(axis, -1, -1):
            if element_count(before[:first]) != ahead:
                continue
            for last in range(axis + 1, len(before) + 1):
                if element_count(before[first:last]) == length:
                    return place, range(first, last)
    return None


def unjoin(gm: IRModule, node: fx.Node, axis: int, shape: _Shape) -> bool:
    """Keep axes apart that a reshape joins if all that follows works row by row, until they are split again.

    Args:
        gm: the graph.
        node: the reshape.
        axis: one of the axes of its input that it may join.
        shape: the shapes of nodes.

    Returns:
        True if the graph was changed: the reshape and its successors, up to those that split the axis, have more axes.
    """
    source, sizes = node.args[0], node.args[1]
    before, group = shape(source), group_of(shape(source), shape(node), axis)  # type: ignore[arg-type]
    if group is None or len(group[1]) == 1 or not isinstance(sizes, (tuple, list)):
        return False
    place, joined = group
    apart = tuple(before[a] for a in joined)
    chain = [node]
    for current in chain:
        for user in current.users:
            name, whole = target_name(gm, user), shape(user)
            if name in RESHAPES and whole[:place] == shape(current)[:place] and whole[place:][: len(apart)] == apart:
                continue
            module = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
            by_row = name in _ROW_BY_ROW or isinstance(module, (nn.Linear, nn.Dropout, MaskedLinear))
            if not by_row or len(whole) != len(shape(current)) or place == len(whole) - 1:
                return False
            chain.append(user)
    with gm.graph.inserting_before(node):
        lengths = [gm.graph.call_method("size", (source, a)) for a in joined]
    node.args = (source, [*sizes[:place], *lengths, *sizes[place + 1 :]])
    for part in chain:
        whole = shape(part)
        part.meta["val"] = fake_value(part).reshape(*whole[:place], *apart, *whole[place + 1 :])
    return True


def rows_per_sample(
    gm: IRModule, node: fx.Node, tokens: fx.Node, carriers: Collection[fx.Node], moves: Collection[str], shape: _Shape
) -> int | None:
    """Return how many consecutive rows axis 0 has for each sample, such as heads; None if it is not known.

    Args:
        gm: the graph.
        node: yields a value that is computed from ``tokens``.
        tokens: (B, N, C).
        carriers: nodes that carry tokens.
        moves: names of the ops that move axes.
        shape: the shapes of nodes.
    """
    times, axis = 1, 0
    while node is not tokens:
        source = next((n for n in node.all_input_nodes if n in carriers), None)
        if source is None:
            return None
        before, after, name = shape(source), shape(node), target_name(gm, node)
        if name in ("transpose", "swapaxes"):
            i, j = (int(argument(node, p, key)) % len(after) for p, key in ((1, "dim0"), (2, "dim1")))
            axis = {i: j, j: i}.get(axis, axis)
        elif name == "permute":
            order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
            axis = int(order[axis]) % len(after)  # type: ignore[arg-type]
        elif name == "select":
            axis += int(argument(node, 1, "dim")) % len(before) <= axis
        elif name in _REGROUPS:
            ahead = element_count(after[:axis])
            first = next((a for a in range(len(before)) if element_count(before[:a]) == ahead), None)
            if first is None or after[axis] % before[first]:
                return None
            times *= after[axis] // before[first]
            axis = first
        elif name in moves or len(before) != len(after) or axis == len(after) - 1:
            return None
        node = source
    return times if axis == 0 else None
