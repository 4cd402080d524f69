"""The token axes of each node during a walk over a graph, and the rules of ops that only move axes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from mpcompile.errors import GraphError
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument, element_count, fake_value, hint, shape_of, target_name
from mpcompile.passes.merge_tokens.joined import RESHAPES, unjoin

SIZED = ("reshape", "view", "_unsafe_view", "expand")  # their arguments name every axis
REGROUPS = ("flatten", "unflatten", "unsqueeze", "squeeze")
_SPLITS = ("unbind", "chunk", "split", "split_with_sizes", "tensor_split")


class GridError(GraphError):
    """An op needs tokens on a grid, or another axis that merged tokens have no place on."""


@dataclass(eq=False)
class Level:
    """The tokens after one or more merges.

    Attributes:
        tokens: node of the merged tokens (B, N, C).
        size: node of their sizes (B, N, 1).
        step: node that holds, for every token before this merge, its place after it.
        count: N.
        before: the level whose tokens were merged; None for the first merge.
    """

    tokens: fx.Node
    size: fx.Node
    step: fx.Node
    count: int
    before: Level | None
    _places: fx.Node | None = field(default=None, repr=False)

    def places(self) -> fx.Node:
        """Return the node that holds the place of every input token; the first call adds it to the graph."""
        if self._places is None:
            self._places = self.step
            if self.before is not None:
                source = self.before.places()
                with self.step.graph.inserting_after(self.step):
                    self._places = self.step.graph.call_function(torch.gather, (self.step, 1, source))
        return self._places


@dataclass(frozen=True)
class State:
    """The axes on which a node carries tokens.

    Attributes:
        level: which tokens.
        axes: axis, counted from the front -> number of its first token in the whole sequence: positive after a slice,
            negative where other tokens were put in front.
        many: True if the node yields a tuple of such tensors.
        grid: the axis of widths if the tokens lie on a grid, whose height is the one token axis. Merged tokens have the
            length of that axis there, and a width of 1.
        parts: the state of each part of a tuple whose parts hold different tokens; None for prefix tokens alone.
    """

    level: Level
    axes: Mapping[int, int]
    many: bool = False
    parts: tuple[State | None, ...] = ()
    grid: int | None = None


def fixed(number: Any) -> Any:
    """Return the number that a node yields if it is the same in each call; anything else unchanged."""
    value = fake_value(number) if isinstance(number, fx.Node) else number
    return value if isinstance(number, fx.Node) and type(value) is int else number


class AxisMoves:
    """Reshapes, permutations, splits and indexing.

    A rule takes a node and the state of its input. It returns the state of the node's output, or None if that holds no
    tokens that may move. It rewrites sizes that held for unmerged tokens.

    Args:
        prefix: number of tokens in front that never merge.
        suffix: number of tokens behind the others that never merge.

    Attributes:
        moves: name of an op -> its rule.
        numbers: node that reads a number from a shape -> the tokens whose shape that is.
        picked: node that takes prefix tokens out of a sequence -> the numbers of these tokens.
    """

    def __init__(self, gm: IRModule, prefix: int, suffix: int) -> None:
        self.gm, self.prefix, self.suffix = gm, prefix, suffix
        self.numbers: dict[fx.Node, Level] = {}
        self.picked: dict[fx.Node, range] = {}
        self.moves: dict[str, Callable[[fx.Node, State], State | None]] = {
            **dict.fromkeys(SIZED, self._reshape),
            **dict.fromkeys(REGROUPS, self._regroup),
            "permute": self._permute,
            "transpose": self._transpose,
            "swapaxes": self._transpose,
            **dict.fromkeys(_SPLITS, self._split),
            "getitem": self._getitem,
            "select": self._select,
            "slice": self._slice,
        }

    def _refusal(self, node: fx.Node, why: str, kind: type[GraphError] = GraphError) -> GraphError:
        name = target_name(self.gm, node)
        return kind(
            f"token merging cannot follow the tokens through {name!r}: {why}",
            layer=str(node.target) if node.op == "call_module" else node.name,
            expected="tokens on an axis of their own from block to block",
            found=f"{name} on {self._shape(node.all_input_nodes[0])}",
            hint="use tome_r=0 for this model",
        )

    def _shape(self, node: Any) -> tuple[int, ...]:
        """Return the shape that a node's tensor had before any merge."""
        return (shape_of(node.meta.get("mpcompile.original", node)) if isinstance(node, fx.Node) else None) or ()

    def _places(self, node: fx.Node, state: State) -> dict[int, int]:
        """Return the token axes of a reshape's input -> their axes in the output."""
        before, after = self._shape(node.args[0]), self._shape(node)
        places = {}
        for axis in state.axes:
            for place, length in enumerate(after):
                ahead = element_count(before[:axis]) == element_count(after[:place])
                if target_name(self.gm, node) == "expand":
                    ahead = place == axis + len(after) - len(before)
                if ahead and length == before[axis]:
                    places[axis] = place
                    break
            else:
                why = "it joins the token axis with another, or splits it (windows, a grid)"
                raise self._refusal(node, why, GridError)
        return places

    def _regroup(self, node: fx.Node, state: State) -> State:
        return replace(state, axes={place: state.axes[axis] for axis, place in self._places(node, state).items()})

    def _reshape(self, node: fx.Node, state: State) -> State:
        if target_name(self.gm, node) in RESHAPES:
            for axis in state.axes:
                unjoin(self.gm, node, axis, self._shape)
        places = self._places(node, state)
        result = replace(state, axes={place: state.axes[axis] for axis, place in places.items()})
        self._resize(node, result.axes, state.level)
        return result

    def _resize(self, node: fx.Node, axes: Mapping[int, int], level: Level, width: int | None = None) -> None:
        """Give the axes of a reshape the lengths of merged tokens, and the axis ``width`` of a grid the length 1."""
        if len(node.args) == 2 and isinstance(node.args[1], fx.Node):
            if self.numbers.get(node.args[1]) is not level:
                raise self._refusal(node, "it takes its whole shape from unmerged tokens")
            return
        source, packed = node.args[0], isinstance(node.args[1], (tuple, list))
        sizes: list[Any] = list(node.args[1] if packed else node.args[1:])  # type: ignore[arg-type]
        if width is not None:
            sizes[width] = 1
        for place, start in axes.items():
            fresh = isinstance(sizes[place], fx.Node) and self.numbers.get(sizes[place]) is level
            if sizes[place] == -1 or (fresh and width is None):
                continue
            if -1 not in sizes or target_name(self.gm, node) == "expand":
                sizes[place] = -1
            elif isinstance(sizes[place], fx.Node):
                self._exchange(node, sizes, place)
            else:
                sizes[place] = level.count - start
        node.args = (source, sizes) if packed else (source, *sizes)

    def _exchange(self, node: fx.Node, sizes: list[Any], place: int) -> None:
        """Move the -1 of a reshape from another axis to the token axis; the other axis gets its fixed length."""
        other = sizes.index(-1)
        length = fake_value(node).shape[other]
        if not isinstance(length, int):
            raise self._refusal(node, "the number of tokens and the length of another axis both vary from call to call")
        sizes[other], sizes[place] = length, -1

    def _permute(self, node: fx.Node, state: State) -> State:
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        rank = len(self._shape(node))
        order = [int(i) % rank for i in order]  # type: ignore[arg-type]
        return replace(state, axes={order.index(axis): start for axis, start in state.axes.items()})

    def _transpose(self, node: fx.Node, state: State) -> State:
        rank = len(self._shape(node))
        i, j = (int(argument(node, p, key)) % rank for p, key in ((1, "dim0"), (2, "dim1")))
        return replace(state, axes={{i: j, j: i}.get(axis, axis): start for axis, start in state.axes.items()})

    def _split(self, node: fx.Node, state: State) -> State:
        name = target_name(self.gm, node)
        rank, axis = len(self._shape(node.args[0])), argument(node, 1 if name == "unbind" else 2, "dim", 0)
        axis %= rank
        if axis in state.axes:
            if name not in ("split", "split_with_sizes"):
                raise self._refusal(node, "it splits the tokens")
            return self._split_tokens(node, state, axis)
        axes = {a - (name == "unbind" and axis < a): start for a, start in state.axes.items()}
        return replace(state, axes=axes, many=True)

    def _split_tokens(self, node: fx.Node, state: State, axis: int) -> State:
        """Split prefix tokens from the rest, as rotary embeddings of the patches alone do (DINOv3)."""
        lengths = [int(hint(part.shape[axis])) for part in fake_value(node)]
        first = state.axes[axis]
        *front, last = itertools.accumulate(lengths[:-1], initial=first)
        sizes = argument(node, 1, "split_size_or_sections")
        if not isinstance(sizes, (tuple, list)) or last > self.prefix or first < 0:
            raise self._refusal(node, "it splits the tokens")
        self.picked[node] = range(first, last)
        length: Any = state.level.count - last
        if isinstance(sizes[-1], fx.Node):  # the number of tokens varies from call to call
            graph = self.gm.graph
            with graph.inserting_before(node):
                count = graph.call_method("size", (state.level.tokens, 1))
                length = graph.call_function(operator.sub, (count, last))
        if len(node.args) > 1:
            node.update_arg(1, [*lengths[:-1], length])
        else:
            node.update_kwarg("split_size_or_sections", [*lengths[:-1], length])
        rest = replace(state, axes={**state.axes, axis: last})
        others = {a: start for a, start in state.axes.items() if a != axis}
        prefix = replace(state, axes=others) if others else None
        return replace(state, axes=rest.axes, many=True, parts=(*[prefix] * len(front), rest))

    def _getitem(self, node: fx.Node, state: State) -> State | None:
        source, index = node.args
        if state.many:
            return state.parts[int(index)] if state.parts else replace(state, many=False)  # type: ignore[arg-type]
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(entry, (fx.Node, list, torch.Tensor)) for entry in index):
            raise self._refusal(node, "it picks tokens by a computed index")
        if Ellipsis in index:
            gap = len(self._shape(source)) - (len(index) - 1 - index.count(None))
            place = index.index(Ellipsis)
            index = (*index[:place], *[slice(None)] * gap, *index[place + 1 :])
        axes: dict[int, int] = {}
        axis = read = 0
        for entry in itertools.chain(index, itertools.repeat(slice(None), len(self._shape(source)))):
            if entry is not None and read in state.axes:
                start = self._cut(node, state.axes[read], entry, self._shape(source)[read])
                if start is not None:
                    axes[axis] = start
            axis += entry is None or isinstance(entry, slice)
            read += entry is not None
        return replace(state, axes=axes) if axes else None

    def _cut(self, node: fx.Node, first: int, index: Any, length: int) -> int | None:
        """Index a token axis whose first token is number ``first``; return the number of the first token left.

        None if only tokens are left that never merge, whose numbers are fixed.
        """
        if index == slice(None):
            return first
        ahead, behind = self.prefix - first, self.suffix
        if isinstance(index, int) and 0 <= index < ahead:
            self.picked[node] = range(first + index, first + index + 1)
            return None
        if isinstance(index, int) and 0 < -index <= behind:
            return None
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop = fixed(index.start) or 0, fixed(index.stop)
            if isinstance(stop, int) and stop >= length:
                stop = None
            if isinstance(start, int) and 0 <= start <= ahead and stop is None:
                return first + start
            if isinstance(start, int) and 0 < -start <= behind and (stop is None or stop in range(start, 0)):
                return None
            if isinstance(stop, int) and isinstance(start, int) and 0 <= start <= stop <= ahead:
                self.picked[node] = range(first + start, first + stop)
                return None
        raise self._refusal(node, "it picks tokens by position, and merging moves them")

    def picked_after(self, residual: fx.Node) -> list[int]:
        """Return the prefix tokens that are taken out of the sequence after a node: those that the output reads."""
        order = {node: place for place, node in enumerate(self.gm.graph.nodes)}
        taken = (tokens for node, tokens in self.picked.items() if order.get(node, -1) > order[residual])
        return sorted({token for tokens in taken for token in tokens if token >= 0})

    def _index_axis(self, node: fx.Node, state: State, dim: int, index: Any, gone: bool) -> State | None:
        """Index one axis, which is ``gone`` afterwards if ``index`` is a number."""
        axes = {a - (gone and dim < a): start for a, start in state.axes.items() if a != dim}
        if dim in state.axes:
            start = self._cut(node, state.axes[dim], index, self._shape(node.args[0])[dim])
            if start is not None:
                axes[dim] = start
        return replace(state, axes=axes) if axes else None

    def _select(self, node: fx.Node, state: State) -> State | None:
        dim = int(argument(node, 1, "dim")) % len(self._shape(node.args[0]))
        return self._index_axis(node, state, dim, argument(node, 2, "index"), True)

    def _slice(self, node: fx.Node, state: State) -> State | None:
        dim = int(argument(node, 1, "dim", 0)) % len(self._shape(node))
        start, stop = argument(node, 2, "start"), argument(node, 3, "end")
        stop = None if stop is None or (isinstance(stop, int) and stop >= 2**31) else stop
        step = argument(node, 4, "step", 1)
        return self._index_axis(node, state, dim, slice(start or None, stop, None if step == 1 else step), False)
