"""Follow tokens onto a grid: layers that work token by token keep them merged, all others get a grid of all tokens.

Merged tokens have no place on a grid. But (B, C, H, W) is only a shape to a convolution of size 1, a norm of channels
or an activation: there, merged tokens are (B, C, N, 1). In front of any other op (a larger convolution, pooling,
windows) each input token gets the value of the merged token that holds it, and the tokens count as unmerged.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import (
    ALONG_LAST,
    CONV2D,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    argument,
    element_count,
    fake_value,
    target_name,
)
from mpcompile.kernels import ops, schema
from mpcompile.layers import ByMode, MaskedConv2d
from mpcompile.passes.merge_tokens.biases.pairs import PairBiases
from mpcompile.passes.merge_tokens.joined import RESHAPES
from mpcompile.passes.merge_tokens.moves import GridError, Level, State
from mpcompile.passes.rewriting import fold_read

_WIDTH = -1 << 40  # stands for the number of the first token on the axis of widths, in rules that only move axes
_MOVES = ("permute", "transpose", "swapaxes", "unbind", "chunk", "split", "split_with_sizes")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class GridAxes(PairBiases):
    """Adds the rules of grids.

    Attributes:
        left: values of merged tokens that were given to all input tokens because an op needs a grid.
    """

    def __init__(
        self,
        gm: IRModule,
        prefix: int,
        suffix: int,
        mask: fx.Node | None,
        proportional: bool,
        size: fx.Node,
        count: int,
    ) -> None:
        super().__init__(gm, prefix, suffix, mask, proportional, size, count)
        self.left: dict[fx.Node, fx.Node] = {}

    def _to_grid(self, node: fx.Node, state: State) -> State | None:
        """Follow a reshape from an axis of tokens to a grid; None if it is something else."""
        name, before, after = target_name(self.gm, node), self._shape(node.args[0]), self._shape(node)
        if name not in (*RESHAPES, "unflatten") or len(state.axes) != 1 or state.many or len(after) != 4:
            return None
        ((axis, start),) = state.axes.items()
        for place in range(1, 3):
            same = element_count(before[:axis]) == element_count(after[:place])
            if not same or after[place] * after[place + 1] != before[axis]:
                continue
            if name == "unflatten":
                node.args = (*node.args[:2], (-1, 1))
            else:
                self._resize(node, {place: start}, state.level, place + 1)
            return State(state.level, {place: start}, grid=place + 1)
        return None

    def _on_grid(self, node: fx.Node, carriers: list[fx.Node]) -> State:
        """Follow an op on a grid of merged tokens.

        Raises:
            GridError: it needs the grid of all tokens.
        """
        name, state = target_name(self.gm, node), self.states[carriers[0]]
        if any(self.states[n].grid is None for n in carriers):
            raise GridError("tokens on a grid and others")
        if name in _MOVES or (name == "getitem" and state.many):
            return self._moved_grid(node, name, state)
        if name in (*RESHAPES, "flatten", "unflatten"):
            return self._from_grid(node, state)
        if self._is_local(node, name):
            return state
        if name in ELEMENTWISE | ALONG_LAST or self._is_elementwise(node):
            return self._elementwise(node, name, state)
        raise GridError("an op on a grid")

    def _is_elementwise(self, node: fx.Node) -> bool:
        known = (*ELEMENTWISE_MODULES, ByMode, nn.LayerNorm, nn.Linear)
        return node.op == "call_module" and isinstance(self.gm.get_submodule(str(node.target)), known)

    def _moved_grid(self, node: fx.Node, name: str, state: State) -> State:
        ((axis, start),) = state.axes.items()
        moved = self.moves[name](node, State(state.level, {axis: start, state.grid: _WIDTH}, state.many))  # type: ignore[dict-item]
        assert moved is not None
        (width,) = (a for a, first in moved.axes.items() if first == _WIDTH)
        rest = {a: first for a, first in moved.axes.items() if a != width}
        return replace(moved, axes=rest, grid=width)

    def _from_grid(self, node: fx.Node, state: State) -> State:
        """Follow a reshape that joins height and width to one axis of tokens, or leaves both where they are."""
        ((axis, start),) = state.axes.items()
        before, after = self._shape(node.args[0]), self._shape(node)
        if state.grid != axis + 1 or state.many:
            raise GridError("a grid of other order")
        for place, length in enumerate(after):
            if element_count(before[:axis]) != element_count(after[:place]):
                continue
            width = None if length == before[axis] * before[axis + 1] else place + 1
            if width is not None and (length, *after[width : width + 1]) != before[axis : axis + 2]:
                continue
            if target_name(self.gm, node) in RESHAPES:
                self._resize(node, {place: start}, state.level, width)
            return State(state.level, {place: start}, grid=width)
        raise GridError("a grid that is split")

    def _is_local(self, node: fx.Node, name: str) -> bool:
        """Return True for convolutions of size 1, and norms that shift and scale channels."""
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _NORMS):
            fixed = not module.training and module.running_mean is not None
            return fixed and self._channels_apart(node)
        if isinstance(module, (nn.Conv2d, MaskedConv2d)):
            return self._reads_points(node, module.kernel_size, module.stride, module.padding)
        if node.target in CONV2D:
            weight = self._shape(argument(node, 1, "weight"))
            return self._reads_points(node, weight[2:], argument(node, 3, "stride", 1), argument(node, 4, "padding", 0))
        if node.target is ops.masked_conv2d:
            args = schema.MaskedConv2dArgs.bind(node)
            return self._reads_points(node, self._shape(args.weight)[2:], args.stride, args.padding)
        return name == "batch_norm" and argument(node, 5, "training", False) is False and self._channels_apart(node)

    def norms_of_merged(self) -> list[str]:
        """Return the names of the norms that, in training mode, would take their statistics from merged tokens."""
        names = [str(node.target) for node in self.states if node.op == "call_module"]
        return [name for name in names if isinstance(self.gm.get_submodule(name), _NORMS)]

    def _channels_apart(self, node: fx.Node) -> bool:
        state = self.states[node.all_input_nodes[0]]
        return 1 not in (*state.axes, state.grid)

    def _reads_points(self, node: fx.Node, size: Any, stride: Any, padding: Any) -> bool:
        """Return True if each place of the result of a convolution depends on the same place of its input alone."""
        state = self.states.get(node.args[0])  # type: ignore[arg-type]
        numbers = [n for group in (size, stride) for n in (group if isinstance(group, (tuple, list)) else (group,))]
        pads = padding if isinstance(padding, (tuple, list)) else (padding,)
        points = all(n == 1 for n in numbers) and all(p in (0, "valid") for p in pads)
        return points and state is not None and (*state.axes, state.grid) == (2, 3)

    def _elementwise(self, node: fx.Node, name: str, state: State) -> State:
        rank = len(self._shape(node))
        along = node.op == "call_module" or name in ALONG_LAST
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        ((axis, start),) = state.axes.items()
        last = (axis, state.grid)
        if (name in ALONG_LAST or isinstance(module, (nn.LayerNorm, nn.Linear))) and rank - 1 in last:
            raise GridError("it mixes the tokens")
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            raise GridError("it mixes the tokens")
        first = next(n for n in node.all_input_nodes if n in self.states)
        operands = [first] if along else [n for n in node.all_input_nodes if self._shape(n)]
        from_end = tuple(a - len(self._shape(first)) for a in last)  # type: ignore[operator]
        tables = []
        for operand in operands:
            shape, known = self._shape(operand), self.states.get(operand)
            if known is not None:
                places = tuple(a - len(shape) for a in (*known.axes, known.grid))  # type: ignore[operator]
                if known.level is not state.level or places != from_end or [*known.axes.values()] != [start]:
                    raise GridError("its operands hold different tokens")
                continue
            lengths = [shape[a] if len(shape) + a >= 0 else 1 for a in from_end]
            if lengths != [1, 1]:
                tables.append((operand, lengths))
        if any(lengths != [self._shape(first)[a] for a in from_end] for _, lengths in tables):
            raise GridError("a value per row or column of the grid")
        for operand, _ in tables:
            self._bring_grid(node, operand, state.level, start, from_end)
        return State(state.level, {rank + from_end[0]: start}, grid=rank + from_end[1])

    def _bring_grid(self, node: fx.Node, table: fx.Node, level: Level, start: int, from_end: tuple[int, ...]) -> None:
        """Average a value per place of the grid over the tokens that merged, and let ``node`` read the averages."""
        rank, value = len(self._shape(node)), fake_value(table)
        if from_end[1] != from_end[0] + 1 or self._shape(node)[0] != self._shape(level.tokens)[0]:
            raise GridError("a grid of other order")
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or start < 0:
            raise GridError("no values that can be averaged")
        graph = self.gm.graph
        with graph.inserting_before(node):
            flat = graph.call_method("flatten", (table, *from_end))
            args = schema.TokenFollowArgs(
                table=flat,
                place=level.places(),
                before=self.size,
                size=level.size,
                start=start,
                dim=from_end[1],
                rank=rank - 1,
            )
            mean = graph.call_function(ops.token_follow, tuple(args))
            back = graph.call_method("unsqueeze", (mean, from_end[1]))
        node.replace_input_with(table, back)

    def _channel_norm(self, node: fx.Node, state: State) -> State:
        """Follow a norm that scales and shifts the channels of axis 1."""
        if not self._is_local(node, target_name(self.gm, node)):
            raise self._refusal(node, "it mixes the tokens, or takes its mean from the batch")
        return state

    def _fix_sides(self, node: fx.Node) -> None:
        """Let what reads the sides of a grid have those of the whole grid, as fixed numbers."""
        reads = [user for user in node.users if user.target is operator.getitem] if node.users else []
        for read in [node, *reads]:
            value = fake_value(read)
            first = read is not node and read.args[1] == 0  # the batch
            if type(value) is int and not first:
                fold_read(read, value)

    def _leave(self, node: fx.Node, carriers: list[fx.Node]) -> None:
        """Let an op that needs a grid read a value for every input token."""
        for source in carriers:
            node.replace_input_with(source, self._for_all_tokens(node, source))
        self._restore(node)

    def _for_all_tokens(self, node: fx.Node, source: fx.Node) -> fx.Node:
        """Return the node that gives each input token the value of the merged token that holds it."""
        if source in self.left:
            return self.left[source]
        state, shape = self.states[source], self._shape(source)
        if len(state.axes) > 1 or state.many or source in self.weights:
            raise self._refusal(node, "it needs a grid of tokens, and has a value for each pair of them")
        ((axis, start),) = state.axes.items()
        if shape[0] != self._shape(state.level.tokens)[0] or axis == 0:
            raise self._refusal(node, f"axis 0 of {shape} is not the batch")
        graph = self.gm.graph
        with graph.inserting_before(node):
            args = schema.TokenSpreadArgs(x=source, place=state.level.places(), start=start, dim=axis)
            result = graph.call_function(ops.token_spread, tuple(args))
            if state.grid is not None:
                sides = tuple(fake_value(source).shape[a] for a in (axis, state.grid))
                if state.grid != axis + 1 or not all(isinstance(side, int) for side in sides):
                    raise self._refusal(node, "it needs a grid whose sides are not fixed")
                result = graph.call_method("squeeze", (result, state.grid))
                result = graph.call_method("unflatten", (result, axis, sides))
        result.meta["mpcompile.original"] = source
        self.left[source] = result
        return result

    def _restore(self, node: fx.Node) -> None:
        """Give a reshape of all tokens fixed lengths in place of those that it read from merged tokens."""
        if target_name(self.gm, node) not in (*RESHAPES, "expand"):
            return
        packed = isinstance(node.args[1], (tuple, list))
        sizes: list[Any] = list(node.args[1] if packed else node.args[1:])  # type: ignore[arg-type]
        value = fake_value(node)
        if not isinstance(value, torch.Tensor) or len(sizes) != value.dim():
            return
        for place, size in enumerate(sizes):
            if place and isinstance(size, fx.Node) and size in self.numbers and isinstance(value.shape[place], int):
                sizes[place] = value.shape[place]
        node.args = (node.args[0], sizes) if packed else (node.args[0], *sizes)
