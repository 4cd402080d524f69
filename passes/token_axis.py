"""Follow the token axis behind a merge: rewrite what held for unmerged tokens, refuse what can't be followed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from mpcompile.errors import GraphError
from mpcompile.graph import ATTENTION, IRModule, argument, element_count, fake_value, shape_of, target_name
from mpcompile.kernels import ops
from mpcompile.layers import ByMode, MaskedLinear
from mpcompile.passes.token_sites import is_matmul

_LAST_AXIS = (nn.Linear, MaskedLinear, nn.LayerNorm, nn.RMSNorm)
_POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Mish),
    *(nn.LeakyReLU, nn.ELU, nn.Softplus, ByMode),
)
_ARITHMETIC = ("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "div", "div_", "truediv", "addcmul")
_ACTIVATIONS = ("gelu", "relu", "silu", "sigmoid", "tanh", "hardswish", "mish", "leaky_relu", "dropout", "DropPath")
_UNARY = ("neg", "pow", "sqrt", "rsqrt", "exp", "square", "abs", "clamp", "contiguous", "clone", "detach", "softplus")
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "_to_copy", "maybe_add_mask")
_ALONG_LAST = ("linear", "masked_linear", "layer_norm", "rms_norm", "native_layer_norm")
_POINTWISE_NAMES = frozenset(_ARITHMETIC + _ACTIVATIONS + _UNARY + _CASTS + _ALONG_LAST)
_SIZED = ("reshape", "view", "_unsafe_view", "expand")  # their arguments name every axis
_REGROUPS = ("flatten", "unflatten", "unsqueeze", "squeeze")
_SHAPE_QUERIES = frozenset({"size", "sym_size", "dim", "numel"})


@dataclass(eq=False)
class Level:
    """The tokens behind one merge (or more), and what is known of them.

    Attributes:
        tokens: node of the merged tokens (B, N, C).
        size: node of their sizes (B, N, 1).
        step: node of the places of the tokens before this merge.
        count: N.
        before: the level that was merged, None at the first merge.
    """

    tokens: fx.Node
    size: fx.Node
    step: fx.Node
    count: int
    before: Level | None
    _places: fx.Node | None = field(default=None, repr=False)

    def places(self) -> fx.Node:
        """Node of the place of every input token; put into the graph when first asked for."""
        if self._places is None:
            self._places = self.step
            if self.before is not None:
                source = self.before.places()
                with self.step.graph.inserting_after(self.step):
                    self._places = self.step.graph.call_function(torch.gather, (self.step, 1, source))
        return self._places


@dataclass(frozen=True)
class State:
    """Where a node carries tokens.

    Attributes:
        level: which tokens.
        axes: axis, counted from the front -> number of its first token in the whole sequence (behind a slice; negative
            where other tokens stand in front).
        many: whether it is a tuple of such tensors.
        weights: whether it is attention weights, whose sum over keys is proportional to sizes already.
    """

    level: Level
    axes: Mapping[int, int]
    many: bool = False
    weights: bool = False


class TokenAxis:
    """One walk over the graph, in order.

    Args:
        levels: merged tokens -> their level.
        size: sizes of the input tokens, a node.
        count: number of input tokens.
        prefix: tokens in front that never merge.
        mask: the attention mask that the sizes contain already.
        proportional: whether log(size) joins attention logits.

    Attributes:
        extents: node -> (level, start) of each token axis that its arithmetic runs over.
    """

    def __init__(
        self,
        gm: IRModule,
        levels: dict[fx.Node, Level],
        size: fx.Node,
        count: int,
        prefix: int,
        mask: fx.Node | None = None,
        proportional: bool = True,
    ) -> None:
        self.gm, self.levels, self.size, self.count, self.prefix = gm, levels, size, count, prefix
        self.mask, self.proportional = mask, proportional
        self.states: dict[fx.Node, State] = {}
        self.numbers: dict[fx.Node, Level] = {}  # read from a shape -> the tokens whose shape that is
        self.extents: dict[fx.Node, list[tuple[Level, int]]] = {}
        self._followed: dict[tuple[fx.Node, Level, int, int], fx.Node] = {}
        self.rules: dict[str, Callable[[fx.Node, State], State | None]] = {
            **dict.fromkeys(_SIZED, self._reshape),
            **dict.fromkeys(_REGROUPS, self._regroup),
            **dict.fromkeys(("permute",), self._permute),
            **dict.fromkeys(("transpose", "swapaxes"), self._transpose),
            **dict.fromkeys(("unbind", "chunk", "split", "split_with_sizes", "tensor_split"), self._split),
            **dict.fromkeys(("mean", "sum", "var", "std", "norm", "max", "amax", "min", "amin"), self._reduce),
            **dict.fromkeys(("cat", "concat"), self._cat),
            **dict.fromkeys(("softmax", "Softmax", "_softmax"), self._softmax),
            "stack": self._stack,
            "getitem": self._getitem,
            "select": self._select,
            "slice": self._slice,
            "normalize": self._normalize,
            "repeat_interleave": self._normalize,
        }

    def follow(self, original: Iterable[fx.Node]) -> None:
        """Walk the nodes that were in the graph before any merge, rewriting it in place.

        Raises:
            GraphError: an op on merged tokens that can't be followed; it names the op.
        """
        for tokens, level in self.levels.items():
            self.states[tokens] = State(level, {1: 0})
        for node in original:
            carriers = [n for n in node.all_input_nodes if n in self.states]
            if not carriers or self._is_number(node):
                self._note_number(node, carriers)
                continue
            if node.op == "output":
                raise self._refusal(node, "the model returns a value for each of the unmerged tokens")
            state = self._next(node, carriers)
            if state is not None:
                self.states[node] = state
                self.extents.setdefault(node, [(state.level, start) for start in state.axes.values()])

    def _next(self, node: fx.Node, carriers: list[fx.Node]) -> State | None:
        name = target_name(self.gm, node)
        if node.target in ATTENTION:
            return self._attention(node)
        if is_matmul(node):
            return self._matmul(node)
        if name in self.rules:
            return self.rules[name](node, self.states[carriers[0]])
        if self._is_pointwise(node, name):
            return self._pointwise(node, carriers)
        if isinstance(fake_value(node), (torch.Tensor, tuple, list)):
            raise self._refusal(node, "an op that it doesn't know")
        return None

    def _is_number(self, node: fx.Node) -> bool:
        """Whether a node reads a shape, or computes with what was read from one."""
        value = fake_value(node)
        if target_name(self.gm, node) in _SHAPE_QUERIES or (node.target is getattr and node.args[1] == "shape"):
            return True
        return node.target is getattr and not isinstance(value, torch.Tensor)

    def _note_number(self, node: fx.Node, carriers: list[fx.Node]) -> None:
        if carriers:
            self.numbers[node] = self.states[carriers[0]].level
        else:
            known = [self.numbers[n] for n in node.all_input_nodes if n in self.numbers]
            if known:
                self.numbers[node] = known[0]

    def _is_pointwise(self, node: fx.Node, name: str) -> bool:
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
                return False
            return isinstance(module, _LAST_AXIS + _POINTWISE) or name in _POINTWISE_NAMES
        return name in _POINTWISE_NAMES

    def _refusal(self, node: fx.Node, why: str) -> GraphError:
        name = target_name(self.gm, node)
        return GraphError(
            f"token merging can't follow the tokens through {name!r}: {why}",
            layer=str(node.target) if node.op == "call_module" else node.name,
            expected="tokens on an axis of their own from block to block",
            found=f"{name} on {self._shape(node.all_input_nodes[0])}",
            hint="use tome_r=0 for this model",
        )

    def _shape(self, node: Any) -> tuple[int, ...]:
        """Shape before any merge."""
        return (shape_of(node.meta.get("mpcompile.original", node)) if isinstance(node, fx.Node) else None) or ()

    def _bring(self, node: fx.Node, table: fx.Node, level: Level, start: int, dim: int) -> None:
        """Average a value per input token over what merged, and let ``node`` read that instead."""
        value = fake_value(table)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or start < 0:
            raise self._refusal(node, f"{table.name} holds a value for each of the unmerged tokens")
        if self._shape(table)[dim] != self.count - start:
            raise self._refusal(node, f"{table.name} holds {self._shape(table)[dim]} values for {self.count} tokens")
        key = (table, level, start, dim)
        if key not in self._followed:
            args = (table, level.places(), self.size, level.size, start, dim, len(self._shape(node)))
            with self.gm.graph.inserting_before(node):
                self._followed[key] = self.gm.graph.call_function(ops.token_follow, args)
        node.replace_input_with(table, self._followed[key])

    def _join(self, node: fx.Node, operands: Iterable[fx.Node], rank: int) -> State:
        """The state of tensors that are combined with broadcasting, aligned at the last axis."""
        operands = list(operands)
        carriers = [self.states[n] for n in operands if n in self.states]
        level, axes = carriers[0].level, {}
        for operand in (n for n in operands if n in self.states):
            state, shift = self.states[operand], rank - len(self._shape(operand))
            if state.level is not level:
                raise self._refusal(node, "its operands hold different tokens")
            for axis, start in state.axes.items():
                if axes.setdefault(axis + shift, start) != start:
                    raise self._refusal(node, "its operands hold different tokens")
        for operand in operands:
            shape = self._shape(operand)
            shift = rank - len(shape)
            own = {a + shift for a in self.states[operand].axes} if operand in self.states else set()
            full = [a for a in axes if a not in own and a >= shift and shape[a - shift] != 1]
            if not full:
                continue
            if operand in self.states or len(axes) > 1:
                why = "a value for each of the unmerged tokens (a relative position bias, or an attention mask)"
                raise self._refusal(node, f"{operand.name} holds {why}")
            self._bring(node, operand, level, axes[full[0]], full[0] - rank)
        return State(level, axes, weights=any(s.weights for s in carriers))

    def _pointwise(self, node: fx.Node, carriers: list[fx.Node]) -> State:
        """Elementwise, or along the last axis: the token axis stays, counted from the back."""
        rank = len(self._shape(node))
        along = node.op == "call_module" or target_name(self.gm, node) in _ALONG_LAST
        tensors = carriers[:1] if along else [n for n in node.all_input_nodes if self._shape(n)]
        state = self._join(node, tensors, rank)
        known = node.op == "call_module" and not isinstance(self.gm.get_submodule(str(node.target)), _LAST_AXIS)
        if along and not known and rank - 1 in state.axes:
            raise self._refusal(node, "it mixes the tokens")
        return state

    def _places(self, node: fx.Node, state: State) -> dict[int, int]:
        """Token axes of the input of a reshape -> those of its output."""
        before, after = self._shape(node.args[0]), self._shape(node)
        found = {}
        for axis in state.axes:
            for place, length in enumerate(after):
                ahead = element_count(before[:axis]) == element_count(after[:place])
                if target_name(self.gm, node) == "expand":
                    ahead = place == axis + len(after) - len(before)
                if ahead and length == before[axis]:
                    found[axis] = place
                    break
            else:
                raise self._refusal(node, "it joins the token axis with another, or splits it (windows, a grid)")
        return found

    def _regroup(self, node: fx.Node, state: State) -> State:
        return replace(state, axes={place: state.axes[axis] for axis, place in self._places(node, state).items()})

    def _reshape(self, node: fx.Node, state: State) -> State:
        source, places = node.args[0], self._places(node, state)
        result = replace(state, axes={place: state.axes[axis] for axis, place in places.items()})
        if len(node.args) == 2 and isinstance(node.args[1], fx.Node):
            if self.numbers.get(node.args[1]) is not state.level:
                raise self._refusal(node, "it takes its whole shape from unmerged tokens")
            return result
        packed = isinstance(node.args[1], (tuple, list))
        sizes: list[Any] = list(node.args[1] if packed else node.args[1:])  # type: ignore[arg-type]
        for place, start in result.axes.items():
            fresh = isinstance(sizes[place], fx.Node) and self.numbers.get(sizes[place]) is state.level
            if sizes[place] == -1 or fresh:
                continue
            free = -1 not in sizes or target_name(self.gm, node) == "expand"
            sizes[place] = -1 if free else state.level.count - start
        node.args = (source, sizes) if packed else (source, *sizes)
        return result

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
        unbind = target_name(self.gm, node) == "unbind"
        axis = argument(node, 1 if unbind else 2, "dim", 0) % len(self._shape(node.args[0]))
        if axis in state.axes:
            raise self._refusal(node, "it splits the tokens")
        axes = {a - (unbind and axis < a): start for a, start in state.axes.items()}
        return replace(state, axes=axes, many=True)

    def _getitem(self, node: fx.Node, state: State) -> State | None:
        source, index = node.args
        if state.many:
            return replace(state, many=False)
        index = index if isinstance(index, tuple) else (index,)
        if any(isinstance(item, (fx.Node, list, torch.Tensor)) for item in index):
            raise self._refusal(node, "it picks tokens by an index that is computed")
        if Ellipsis in index:
            gap = len(self._shape(source)) - (len(index) - 1 - index.count(None))
            place = index.index(Ellipsis)
            index = (*index[:place], *[slice(None)] * gap, *index[place + 1 :])
        axes: dict[int, int] = {}
        axis = read = 0
        for item in itertools.chain(index, itertools.repeat(slice(None), len(self._shape(source)))):
            if item is not None and read in state.axes:
                start = self._cut(node, state.axes[read], item)
                if start is not None:
                    axes[axis] = start
            axis += item is None or isinstance(item, slice)
            read += item is not None
        return replace(state, axes=axes) if axes else None

    def _cut(self, node: fx.Node, first: int, item: Any) -> int | None:
        """Indexing on a token axis whose first token is number ``first``: the first one of what is left.

        None for prefix tokens, whose number stays.
        """
        if item == slice(None):
            return first
        if isinstance(item, int) and 0 <= item and item + first < self.prefix:
            return None
        if isinstance(item, slice) and item.step in (None, 1):
            start, stop = item.start or 0, item.stop
            if isinstance(start, int) and 0 <= start <= self.prefix - first and stop is None:
                return first + start
            if isinstance(stop, int) and isinstance(start, int) and 0 <= start <= stop <= self.prefix - first:
                return None
        raise self._refusal(node, "it picks tokens by their place, and merging moves them")

    def _one_axis(self, node: fx.Node, state: State, dim: int, item: Any, gone: bool) -> State | None:
        axes = {a - (gone and dim < a): start for a, start in state.axes.items() if a != dim}
        if dim in state.axes:
            start = self._cut(node, state.axes[dim], item)
            if start is not None:
                axes[dim] = start
        return replace(state, axes=axes) if axes else None

    def _select(self, node: fx.Node, state: State) -> State | None:
        dim = int(argument(node, 1, "dim")) % len(self._shape(node.args[0]))
        return self._one_axis(node, state, dim, argument(node, 2, "index"), True)

    def _slice(self, node: fx.Node, state: State) -> State | None:
        dim = int(argument(node, 1, "dim", 0)) % len(self._shape(node))
        start, stop = argument(node, 2, "start"), argument(node, 3, "end")
        stop = None if stop is None or (isinstance(stop, int) and stop >= 2**31) else stop
        step = argument(node, 4, "step", 1)
        return self._one_axis(node, state, dim, slice(start or None, stop, None if step == 1 else step), False)

    def _cat(self, node: fx.Node, state: State) -> State:
        rank = len(self._shape(node))
        axis = argument(node, 1, "dim", 0) % rank
        parts = list(argument(node, 0, "tensors"))
        *front, last = parts
        if axis not in state.axes:
            return self._join(node, parts, rank)
        if any(part in self.states for part in front) or last not in self.states:
            raise self._refusal(node, "it puts merged tokens before others")
        ahead = sum(self._shape(part)[axis] for part in front)
        return replace(self.states[last], axes={**self.states[last].axes, axis: state.axes[axis] - ahead})

    def _stack(self, node: fx.Node, _: State) -> State:
        rank = len(self._shape(node))
        axis = argument(node, 1, "dim", 0) % rank
        state = self._join(node, argument(node, 0, "tensors"), rank - 1)
        return replace(state, axes={a + (a >= axis): start for a, start in state.axes.items()})

    def _normalize(self, node: fx.Node, state: State) -> State:
        """``F.normalize`` and ``repeat_interleave``, along another axis than the tokens'."""
        where = (2, "dim", 1) if target_name(self.gm, node) == "normalize" else (2, "dim", None)
        axis = argument(node, *where)
        if axis is None or axis % len(self._shape(node)) in state.axes:
            raise self._refusal(node, "it runs over the tokens")
        return state

    def _reduce(self, node: fx.Node, state: State) -> State | None:
        name, rank = target_name(self.gm, node), len(self._shape(node.args[0]))
        place = 2 if name == "norm" else 1
        dim, keep = argument(node, place, "dim"), bool(argument(node, place + 1, "keepdim", False))
        axes = {d % rank for d in (range(rank) if dim is None else (dim,) if isinstance(dim, int) else dim)}
        over = axes & state.axes.keys()
        left = {a if keep else a - sum(b < a for b in axes): s for a, s in state.axes.items() if a not in over}
        if over:
            if name == "mean" and len(axes) == 1 and self.mask is None:
                self._weigh(node, state, *over, keep)
            elif name not in ("max", "amax", "min", "amin"):
                why = "it averages over tokens and other axes at once" if name == "mean" else "it runs over the tokens"
                raise self._refusal(node, why if self.mask is None else "it averages over tokens, hidden ones included")
        many = isinstance(fake_value(node), (tuple, list))
        return replace(state, axes=left, many=many) if left else None

    def _weigh(self, node: fx.Node, state: State, axis: int, keep: bool) -> None:
        """A mean over tokens becomes one over what they stand for."""
        with self.gm.graph.inserting_before(node):
            args = (node.args[0], state.level.size, state.axes[axis], axis, keep)
            new = self.gm.graph.call_function(ops.token_mean, args)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)

    def _softmax(self, node: fx.Node, state: State) -> State:
        rank = len(self._shape(node))
        if node.op == "call_module":
            dim = getattr(self.gm.get_submodule(str(node.target)), "dim", None)
        else:
            dim = argument(node, 1, "dim", -1)
        dim = (-1 if dim is None else dim) % rank
        if dim not in state.axes:
            return state
        logits = node.args[0]
        if self.proportional:
            with self.gm.graph.inserting_before(node):
                args = (state.level.size, logits, state.axes[dim], dim)
                bias = self.gm.graph.call_function(ops.token_bias, args)
                total = self.gm.graph.call_function(operator.add, (logits, bias))
            node.replace_input_with(logits, total)  # type: ignore[arg-type]
        return replace(state, weights=True)

    def _matmul(self, node: fx.Node) -> State | None:
        left, right = argument(node, 0, "input"), argument(node, 1, "mat2", node.kwargs.get("other"))
        rank = len(self._shape(node))
        a, b = self.states.get(left), self.states.get(right)
        ranks = (len(self._shape(left)), len(self._shape(right)))
        if rank < 2 or min(ranks) < 2:
            raise self._refusal(node, "a product with a vector")
        ours = {} if a is None else {x + rank - ranks[0]: s for x, s in a.axes.items()}
        theirs = {} if b is None else {x + rank - ranks[1]: s for x, s in b.axes.items()}
        level = (a or b).level  # type: ignore[union-attr]
        if a is not None and b is not None and a.level is not b.level:
            raise self._refusal(node, "its operands hold different tokens")
        inner = (ours.pop(rank - 1, None), theirs.pop(rank - 2, None))
        if inner != (None, None) and (inner[0] != inner[1] or not (a is not None and a.weights)):
            raise self._refusal(node, "it sums over tokens, without weights of attention")
        if any(theirs.get(axis, start) != start for axis, start in ours.items()):
            raise self._refusal(node, "its operands hold different tokens")
        axes = {**ours, **theirs}
        self.extents[node] = [(level, s) for s in axes.values()] + [(level, s) for s in inner[:1] if s is not None]
        return State(level, axes) if axes else None

    def _attention(self, node: fx.Node) -> State | None:
        """Proportional attention: log(size) joins the logits of merged keys."""
        query, key, value = (argument(node, i, k) for i, k in enumerate(("query", "key", "value")))
        keys, values = self.states.get(key), self.states.get(value)
        if keys is None or values is None or keys.level is not values.level or keys.axes != values.axes:
            raise self._refusal(node, "its keys and values hold different tokens")
        if set(keys.axes) != {2} or len(self._shape(key)) != 4:
            raise self._refusal(node, "its keys don't have shape (batch, heads, tokens, channels)")
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        if causal is not False:
            raise self._refusal(node, "it is causal, and merging moves tokens")
        if mask is not None and mask is not self.mask:
            raise self._refusal(node, "it has an attention mask or bias of its own")
        state, start = self.states.get(query), keys.axes[2]
        if self.proportional:
            scale, gqa = argument(node, 6, "scale"), argument(node, 7, "enable_gqa", False)
            args = (query, key, value, keys.level.size, start, argument(node, 4, "dropout_p", 0.0), scale, gqa)
            node.target, node.args, node.kwargs = ops.token_attention, args, {}
        axes = {} if state is None else {2: state.axes[2]}
        self.extents[node] = [(keys.level, s) for s in (start, *axes.values())]
        return State(keys.level, axes) if axes else None
