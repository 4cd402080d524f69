"""Follow the token axis behind a merge: rewrite burnt-in token counts, refuse what can't be followed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from mpcompile.errors import GraphError
from mpcompile.graph import ATTENTION, IRModule, Lifted, argument, element_count, fake_value, shape_of, target_name
from mpcompile.kernels import ops
from mpcompile.layers import ByMode, MaskedLinear

_LAST_AXIS = (nn.Linear, MaskedLinear, nn.LayerNorm)
_POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Mish),
    *(nn.LeakyReLU, nn.ELU, nn.Softplus, ByMode),
)
_ARITHMETIC = ("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "div", "div_", "truediv", "addcmul")
_ACTIVATIONS = ("gelu", "relu", "silu", "sigmoid", "tanh", "hardswish", "mish", "leaky_relu", "dropout", "DropPath")
_UNARY = ("neg", "pow", "sqrt", "rsqrt", "exp", "square", "abs", "clamp", "contiguous", "clone", "detach")
_CASTS = ("to", "type", "type_as", "float", "half", "bfloat16")
_ALONG_LAST = ("linear", "masked_linear", "layer_norm", "rms_norm")
_POINTWISE_NAMES = frozenset(_ARITHMETIC + _ACTIVATIONS + _UNARY + _CASTS + _ALONG_LAST)
_RESHAPES = frozenset({"reshape", "view", "flatten", "_unsafe_view"})
_SHAPE_QUERIES = frozenset({"getattr", "size", "sym_size", "dim", "numel"})


@dataclass(frozen=True)
class State:
    """Where a node carries tokens.

    Attributes:
        axis: which axis, counted from the front.
        start: index of its first token in the whole sequence (behind a slice).
        tokens: the merged tokens that it descends from, which identifies its token count.
        many: whether it is a tuple of such tensors.
    """

    axis: int
    start: int
    tokens: fx.Node
    many: bool = False


class TokenAxis:
    """One walk over the graph, in order.

    Args:
        sizes: merged tokens (B, N', C) -> their sizes (B, N', 1).
        prefix: tokens in front that never merge.
    """

    def __init__(self, gm: IRModule, lifted: Lifted, sizes: dict[fx.Node, fx.Node], prefix: int) -> None:
        self.gm, self.lifted, self.sizes, self.prefix = gm, lifted, sizes, prefix
        self.states: dict[fx.Node, State] = {}
        self.counts: dict[fx.Node, fx.Node] = {}  # numbers read from a shape -> merged tokens whose shape that is
        self.rules: dict[str, Callable[[fx.Node, State], State | None]] = {
            **dict.fromkeys(_RESHAPES, self._reshape),
            **dict.fromkeys(("permute",), self._permute),
            **dict.fromkeys(("transpose", "swapaxes"), self._transpose),
            **dict.fromkeys(("unbind", "chunk", "split", "tensor_split"), self._split),
            **dict.fromkeys(("mean",), self._mean),
            **dict.fromkeys(("max", "amax"), self._maximum),
            "getitem": self._getitem,
            "select": self._select,
            "slice": self._slice,
            "cat": self._cat,
            "softmax": self._softmax,
        }

    def follow(self) -> None:
        """Walk the graph, rewriting it in place.

        Raises:
            GraphError: an op on merged tokens that can't be followed; it names the op.
        """
        for node in list(self.gm.graph.nodes):
            if node in self.sizes:
                self.states[node] = State(1, 0, node)
                continue
            if node.target in ops.MERGING or node.op == "output":
                continue
            carriers = [n for n in node.all_input_nodes if n in self.states]
            name = target_name(self.gm, node)
            if name in _SHAPE_QUERIES or not carriers:
                self._note_count(node, carriers)
                continue
            if node.target in ATTENTION:
                state = self._attention(node)
            elif name in self.rules:
                state = self.rules[name](node, self.states[carriers[0]])
            elif self._is_pointwise(node, name):
                state = self._pointwise(node, carriers)
            elif isinstance(fake_value(node), (torch.Tensor, tuple, list)):
                raise self._refusal(node, "an op that it doesn't know")
            else:
                state = None
            if state is not None:
                self.states[node] = state

    def _note_count(self, node: fx.Node, carriers: list[fx.Node]) -> None:
        if carriers:
            self.counts[node] = self.states[carriers[0]].tokens
        else:
            known = [self.counts[n] for n in node.all_input_nodes if n in self.counts]
            if known:
                self.counts[node] = known[0]

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

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape before any merge."""
        original = node.meta.get("mpcompile.original", node)
        return shape_of(original) or ()

    def _pointwise(self, node: fx.Node, carriers: list[fx.Node]) -> State:
        """Elementwise, or along the last axis: the token axis stays, from the right."""
        rank = len(self._shape(node))
        state = self.states[carriers[0]]
        axis = state.axis + rank - len(self._shape(carriers[0]))
        if node.op == "call_module" or target_name(self.gm, node) in _ALONG_LAST:
            if axis == rank - 1:
                raise self._refusal(node, "it mixes the tokens")
            return replace(state, axis=axis)
        for other in node.all_input_nodes:
            shape = self._shape(other)
            place = axis - (rank - len(shape))
            if other in self.states:
                twin = self.states[other]
                if (twin.tokens, twin.start) != (state.tokens, state.start) or place != twin.axis:
                    raise self._refusal(node, "its operands hold different tokens")
            elif place >= 0 and shape and shape[place] != 1:
                raise self._refusal(node, f"{other.name} holds a value for each of the unmerged tokens")
        return replace(state, axis=axis)

    def _reshape(self, node: fx.Node, state: State) -> State:
        source = node.args[0]
        before, after = self._shape(source), self._shape(node)  # type: ignore[arg-type]
        for axis, length in enumerate(after):
            ahead = element_count(before[: state.axis]) == element_count(after[:axis])
            if ahead and length == before[state.axis]:
                break
        else:
            raise self._refusal(node, "it joins the token axis with another")
        if target_name(self.gm, node) == "flatten":
            return replace(state, axis=axis)
        packed = isinstance(node.args[1], (tuple, list))
        sizes = list(node.args[1] if packed else node.args[1:])  # type: ignore[arg-type]
        fresh = isinstance(sizes[axis], fx.Node) and self.counts.get(sizes[axis]) is state.tokens
        if sizes[axis] != -1 and not fresh:
            if -1 in sizes:  # that place is known: only the batch and the token count may vary
                other = sizes.index(-1)
                if other == 0:
                    raise self._refusal(node, "both its batch and its token count would have to be inferred")
                sizes[other] = after[other]
            sizes[axis] = -1
            node.args = (source, sizes) if packed else (source, *sizes)
        return replace(state, axis=axis)

    def _permute(self, node: fx.Node, state: State) -> State:
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        rank = len(self._shape(node))
        return replace(state, axis=[int(i) % rank for i in order].index(state.axis))  # type: ignore[arg-type]

    def _transpose(self, node: fx.Node, state: State) -> State:
        rank = len(self._shape(node))
        i, j = (int(argument(node, p, key)) % rank for p, key in ((1, "dim0"), (2, "dim1")))
        return replace(state, axis={i: j, j: i}.get(state.axis, state.axis))

    def _split(self, node: fx.Node, state: State) -> State:
        unbind = target_name(self.gm, node) == "unbind"
        axis = argument(node, 1 if unbind else 2, "dim", 0) % len(self._shape(node.args[0]))  # type: ignore[arg-type]
        if axis == state.axis:
            raise self._refusal(node, "it splits the tokens")
        return replace(state, axis=state.axis - (unbind and axis < state.axis), many=True)

    def _getitem(self, node: fx.Node, state: State) -> State | None:
        source, index = node.args
        if state.many:
            return replace(state, many=False)
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in index:
            gap = len(self._shape(source)) - (len(index) - 1 - index.count(None))  # type: ignore[arg-type]
            place = index.index(Ellipsis)
            index = (*index[:place], *[slice(None)] * gap, *index[place + 1 :])
        axis = read = 0
        for item in index:
            if read == state.axis and item is not None:
                return self._cut(node, state, item, axis)
            axis += item is None or isinstance(item, slice)
            read += item is not None
        return replace(state, axis=axis + state.axis - read)

    def _cut(self, node: fx.Node, state: State, item: Any, axis: int) -> State | None:
        """Indexing on the token axis: prefix tokens by number, or what is left behind them."""
        if item == slice(None):
            return replace(state, axis=axis)
        if isinstance(item, int) and 0 <= item + state.start < self.prefix:
            return None
        if isinstance(item, slice) and item.step is None:
            start, stop = item.start or 0, item.stop
            if isinstance(start, int) and 0 <= start <= self.prefix - state.start and stop is None:
                return replace(state, axis=axis, start=state.start + start)
            if isinstance(stop, int) and isinstance(start, int) and 0 <= start <= stop <= self.prefix - state.start:
                return None
        raise self._refusal(node, "it picks tokens by their place, and merging moves them")

    def _select(self, node: fx.Node, state: State) -> State | None:
        dim, index = int(node.args[1]) % len(self._shape(node.args[0])), node.args[2]  # type: ignore[arg-type]
        if dim == state.axis:
            return self._cut(node, state, index, dim)
        return replace(state, axis=state.axis - (dim < state.axis))

    def _slice(self, node: fx.Node, state: State) -> State | None:
        dim = int(argument(node, 1, "dim", 0)) % len(self._shape(node))
        start, stop = argument(node, 2, "start"), argument(node, 3, "end")
        if dim != state.axis:
            return state
        stop = None if stop is None or stop >= 2**31 else stop
        return self._cut(node, state, slice(start, stop), dim)

    def _cat(self, node: fx.Node, state: State) -> State:
        rank = len(self._shape(node))
        axis = argument(node, 1, "dim", 0) % rank
        twins = [self.states.get(part) for part in argument(node, 0, "tensors")]
        if axis == state.axis or any(twin != state for twin in twins):
            raise self._refusal(node, "it joins merged tokens with others")
        return state

    def _softmax(self, node: fx.Node, state: State) -> State:
        rank = len(self._shape(node))
        if argument(node, 1, "dim", -1) % rank == state.axis:
            raise self._refusal(node, "it is an attention over tokens that is written out")
        return state

    def _reduced_axes(self, node: fx.Node) -> tuple[set[int], bool]:
        rank = len(self._shape(node.args[0]))  # type: ignore[arg-type]
        dim = argument(node, 1, "dim")
        dims = range(rank) if dim is None else (dim,) if isinstance(dim, int) else dim
        return {d % rank for d in dims}, bool(argument(node, 2, "keepdim", False))

    def _mean(self, node: fx.Node, state: State) -> State | None:
        axes, keep = self._reduced_axes(node)
        if state.axis not in axes:
            return replace(state, axis=state.axis if keep else state.axis - sum(a < state.axis for a in axes))
        if len(axes) != 1:
            raise self._refusal(node, "it averages over tokens and other axes at once")
        with self.gm.graph.inserting_before(node):
            size = self.sizes[state.tokens]
            new = self.gm.graph.call_function(ops.token_mean, (node.args[0], size, state.start, state.axis, keep))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        self.gm.graph.erase_node(node)
        return None

    def _maximum(self, node: fx.Node, state: State) -> State | None:
        axes, keep = self._reduced_axes(node)
        if state.axis in axes:
            return None
        return replace(state, axis=state.axis if keep else state.axis - sum(a < state.axis for a in axes))

    def _attention(self, node: fx.Node) -> State | None:
        """Proportional attention: log(size) joins the logits of merged keys."""
        query, key, value = (argument(node, i, k) for i, k in enumerate(("query", "key", "value")))
        keys, values = self.states.get(key), self.states.get(value)
        if keys is None or values is None or keys.tokens is not values.tokens or keys.start != values.start:
            raise self._refusal(node, "its keys and values hold different tokens")
        if keys.axis != len(self._shape(key)) - 2 or len(self._shape(key)) != 4:
            raise self._refusal(node, "its keys don't have shape (batch, heads, tokens, channels)")
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        if mask is not None or causal is not False:
            raise self._refusal(node, "it has an attention mask or bias of its own, or is causal")
        if keys.start:
            raise self._refusal(node, "its keys leave out prefix tokens")
        with self.gm.graph.inserting_before(node):
            bias = self.gm.graph.call_function(ops.token_bias, (self.sizes[keys.tokens], query))
        node.args = (query, key, value)
        names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        dropout = argument(node, 4, "dropout_p", 0.0)
        node.kwargs = {**{k: v for k, v in node.kwargs.items() if k in names}, "attn_mask": bias, "dropout_p": dropout}
        state = self.states.get(query)
        return None if state is None else replace(state, axis=2)
