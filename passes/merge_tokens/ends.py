"""Tokens at both ends of a sequence that come from parameters: they keep their places and never merge.

Class, distillation and register tokens stand in front of the image's tokens, detection tokens behind them. Which they
are is read at the concatenations upstream of the first block, and followed from there: models slice a sequence, add
positions to each part, and join the parts again, with further tokens in between (registers of DINOv2).
"""

from __future__ import annotations

import itertools

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from mpcompile.errors import GraphError
from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import argument, element_count, fake_value, shape_of, target_name
from mpcompile.passes.merge_tokens.moves import fixed
from mpcompile.passes.merge_tokens.sites import CAT, Site, ancestors, asks_shape

_Origins = tuple[bool, ...]  # for every token along an axis, True if it comes from the model's input
_PERMUTES = frozenset({"permute", "transpose", "swapaxes", "t", "mT"})
_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "tensor_split"})
_REGROUPS = frozenset({"reshape", "view", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"})


def from_data(gm: fx.GraphModule, lifted: Lifted) -> set[fx.Node]:
    """Return the nodes that depend on the model's input, and not on parameters and shapes alone."""
    data: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            leaves = tree_leaves(fake_value(node))  # an input may be a dict of tensors; a symbolic size is not data
            is_data = node.name not in lifted.tensors and any(isinstance(x, Tensor) and x.dim() for x in leaves)
        else:
            is_data = not asks_shape(node) and not data.isdisjoint(node.all_input_nodes)
        if is_data:
            data.add(node)
    return data


class _Walk:
    """One walk from the inputs to the first block.

    Attributes:
        mixed: node -> axis -> origins, for the axes that hold tokens from parameters.
    """

    def __init__(self, gm: fx.GraphModule, lifted: Lifted) -> None:
        self.gm = gm
        self.data = from_data(gm, lifted)
        self.mixed: dict[fx.Node, dict[int, _Origins]] = {}

    def enter(self, node: fx.Node) -> None:
        """Find the origins of the tokens of a node, whose inputs have been entered before."""
        shape = shape_of(node)
        if node not in self.data or not shape:
            return
        axes = {axis: self._origins(node, axis, shape) for axis in range(len(shape))}
        axes = {axis: origins for axis, origins in axes.items() if origins is not None and not all(origins)}
        if axes:
            self.mixed[node] = axes  # type: ignore[assignment]

    def _along(self, node: fx.Node, axis: int) -> _Origins:
        known = self.mixed.get(node, {}).get(axis)
        return known or (node in self.data,) * (shape_of(node) or ())[axis]

    def _origins(self, node: fx.Node, axis: int, shape: tuple[int, ...]) -> _Origins | None:
        """Return the origins of the tokens along an axis; None if all of them depend on data."""
        name, source = target_name(self.gm, node), node.args[0] if node.args else None
        if node.target in CAT and argument(node, 1, "dim", 0) % len(shape) == axis:
            parts = argument(node, 0, "tensors")
            return tuple(itertools.chain.from_iterable(self._along(part, axis) for part in parts))
        if self.mixed.keys().isdisjoint(node.all_input_nodes):
            return None
        if name in ("getitem", "slice") and isinstance(source, fx.Node):
            return self._indexed(node, source, axis, name)
        if name in _PERMUTES | _REGROUPS and isinstance(source, fx.Node):
            before = self._source_axis(node, source, axis, name, shape)
            return None if before is None else self._along(source, before)
        return self._joined(node, axis, shape)

    def _joined(self, node: fx.Node, axis: int, shape: tuple[int, ...]) -> _Origins | None:
        """Return the origins after an op that keeps axes in place, counted from the last.

        A token's place counts, not what is added to it: attention adds data to a class token.
        """
        found: _Origins | None = None
        for operand in node.all_input_nodes:
            before = axis - len(shape) + len(shape_of(operand) or ())
            if operand in self.data and before >= 0 and (shape_of(operand) or ())[before] == shape[axis]:
                origins = self._along(operand, before)
                found = origins if found is None else tuple(a and b for a, b in zip(found, origins, strict=True))
        return found

    def _indexed(self, node: fx.Node, source: fx.Node, axis: int, name: str) -> _Origins | None:
        if isinstance(fake_value(source), (tuple, list)):
            return self._part(source, node.args[1], axis)
        rank = len(shape_of(source) or ())
        if name == "slice":
            along = argument(node, 1, "dim", 0) % rank
            cut = slice(argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1))
            origins = self._along(source, axis)
            return _sliced(origins, cut) if along == axis else origins
        entries = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if any(not isinstance(entry, (int, slice, type(None), type(Ellipsis))) for entry in entries):
            return None
        if Ellipsis in entries:
            place = entries.index(Ellipsis)
            gap = rank - (len(entries) - 1 - entries.count(None))
            entries = (*entries[:place], *[slice(None)] * gap, *entries[place + 1 :])
        read = written = 0
        for entry in itertools.chain(entries, itertools.repeat(slice(None), rank)):
            if written == axis and isinstance(entry, slice) and read < rank:
                return _sliced(self._along(source, read), entry)
            written += entry is None or isinstance(entry, slice)
            read += entry is not None
        return None

    def _part(self, split: fx.Node, index: object, axis: int) -> _Origins | None:
        """Return the origins of one part of a split tensor."""
        source = split.args[0]
        if target_name(self.gm, split) not in _SPLITS or not isinstance(source, fx.Node) or type(index) is not int:
            return None
        origins = self._along(source, axis)
        if argument(split, 2, "dim", 0) % len(shape_of(source) or ()) != axis:
            return origins
        lengths = [int(part.shape[axis]) for part in fake_value(split) if isinstance(part, Tensor)]
        index %= len(lengths)
        return origins[sum(lengths[:index]) :][: lengths[index]]

    def _source_axis(self, node: fx.Node, source: fx.Node, axis: int, name: str, shape: tuple[int, ...]) -> int | None:
        """Return the axis of the input that an op moves to ``axis``, or None."""
        before = shape_of(source) or ()
        if name == "permute":
            order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
            return int(order[axis]) % len(before)  # type: ignore[arg-type]
        if name in _PERMUTES:
            i, j = (int(argument(node, p, k, d)) % len(before) for p, k, d in ((1, "dim0", -2), (2, "dim1", -1)))
            return {i: j, j: i}.get(axis, axis)
        ahead = element_count(shape[:axis])
        same = (a for a, length in enumerate(before) if length == shape[axis] and element_count(before[:a]) == ahead)
        return next(same, None)


def _sliced(origins: _Origins, cut: slice) -> _Origins | None:
    """Return a slice of the origins; None if its bounds are not known before the model runs."""
    cut = slice(fixed(cut.start), fixed(cut.stop), cut.step)
    return origins[cut] if all(part is None or type(part) is int for part in (cut.start, cut.stop, cut.step)) else None


def count_ends(gm: fx.GraphModule, site: Site, lifted: Lifted) -> tuple[int, int]:
    """Count the tokens before and behind those of the image, which come from parameters.

    Args:
        gm: the graph.
        site: its first block.
        lifted: parameters that are graph inputs.

    Raises:
        GraphError: such tokens stand among those of the image.
    """
    walk, upstream = _Walk(gm, lifted), ancestors(site.residual)
    for node in gm.graph.nodes:
        if node in upstream or node is site.residual:
            walk.enter(node)
    origins = walk.mixed.get(site.residual, {}).get(1, (True,))
    if not any(origins):
        return len(origins), 0
    prefix, suffix = origins.index(True), origins[::-1].index(True)
    if not all(origins[prefix : len(origins) - suffix]):
        raise GraphError(
            "tokens from parameters stand among those of the image",
            layer=site.residual.name,
            expected="class, distillation and register tokens in front, detection tokens behind",
            found=f"{origins.count(False)} such tokens, not all of them at the ends",
            hint="use tome_r=0, or reorder the concatenation",
        )
    return prefix, suffix
