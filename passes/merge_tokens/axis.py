"""Follow the token axis after a merge: rewrite sizes and tables of unmerged tokens, refuse ops it cannot follow."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import fx, nn

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import (
    ALONG_LAST,
    ATTENTION,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    LAST_AXIS_MODULES,
    argument,
    fake_value,
    target_name,
)
from mpcompile.kernels import ops, schema
from mpcompile.layers import ByMode, MaskedLinear
from mpcompile.passes.merge_tokens.grids.axes import GridAxes
from mpcompile.passes.merge_tokens.joined import rows_per_sample
from mpcompile.passes.merge_tokens.moves import GridError, Level, State
from mpcompile.passes.merge_tokens.sites import is_matmul

_LAST_AXIS = (*LAST_AXIS_MODULES, MaskedLinear)
_POINTWISE = (*ELEMENTWISE_MODULES, ByMode)
_POINTWISE_NAMES = ELEMENTWISE | ALONG_LAST
_ASSERTS = "_assert_tensor_metadata"
_SHAPE_QUERIES = frozenset({"size", "sym_size", "dim", "numel"})


class TokenAxis(GridAxes):
    """One walk over the graph, in order.

    Args:
        levels: node of merged tokens -> their level.
        size: node of the sizes of the input tokens.
        count: number of input tokens.
        prefix: number of tokens in front that never merge.
        suffix: number of tokens behind the others that never merge.
        mask: the attention mask, which the sizes already contain, or None.
        proportional: True if log(size) is added to attention logits.

    Attributes:
        extents: node -> (level, start, axis) of each token axis that its arithmetic runs over; the axis is that of its
            output, None if it sums over the tokens.
        spread: values per token that the model returns, which are spread over the places of the input tokens.
    """

    def __init__(
        self,
        gm: IRModule,
        levels: dict[fx.Node, Level],
        size: fx.Node,
        count: int,
        prefix: int,
        suffix: int = 0,
        mask: fx.Node | None = None,
        proportional: bool = True,
    ) -> None:
        super().__init__(gm, prefix, suffix, mask, proportional, size, count)
        self.levels = levels
        self.extents: dict[fx.Node, list[tuple[Level, int, int | None]]] = {}
        self.spread: list[fx.Node] = []
        self._followed: dict[tuple[fx.Node, Level, int, int], fx.Node] = {}
        self.rules: dict[str, Callable[[fx.Node, State], State | None]] = {
            **self.moves,
            **dict.fromkeys(("mean", "sum", "var", "std", "norm", "max", "amax", "min", "amin"), self._reduce),
            **dict.fromkeys(("cat", "concat"), self._cat),
            **dict.fromkeys(("softmax", "Softmax", "_softmax"), self._softmax),
            **dict.fromkeys(("BatchNorm1d", "batch_norm"), self._channel_norm),
            "stack": self._stack,
            "normalize": self._along_another,
            "repeat_interleave": self._along_another,
        }

    def follow(self, original: Iterable[fx.Node]) -> None:
        """Walk the nodes that were in the graph before any merge, and rewrite the graph in place.

        Raises:
            GraphError: an op on merged tokens cannot be followed; the message names it.
        """
        for tokens, level in self.levels.items():
            self.states[tokens] = State(level, {1: 0})
        for node in original:
            carriers = [n for n in node.all_input_nodes if n in self.states]
            if target_name(self.gm, node) == _ASSERTS:
                self._forget_sizes(node)
                continue
            if not carriers or self._is_number(node):
                if not carriers and any(n in self.numbers for n in node.all_input_nodes):
                    self._restore(node)
                if carriers and self.states[carriers[0]].grid is not None:
                    self._fix_sides(node)
                else:
                    self._note_number(node, carriers)
                continue
            if node.op == "output":
                self._spread_over(node, carriers)
                continue
            keys = self._keys_axis(node, carriers)
            state = self._step(node, carriers)
            if state is not None:
                self.states[node] = state
                if keys is not None:
                    self.weights[node] = keys
                    if self.proportional and self._is_linear(node, target_name(self.gm, node)):
                        self._count_bias(node, state, keys)
                self.extents.setdefault(node, [(state.level, start, axis) for axis, start in state.axes.items()])

    @staticmethod
    def _forget_sizes(node: fx.Node) -> None:
        """Let export's check of a tensor's metadata check its dtype and device, but not sizes and strides."""
        node.args = (node.args[0], None, None, *node.args[3:])

    def _spread_over(self, output: fx.Node, carriers: list[fx.Node]) -> None:
        """Give each input token, in what the model returns, the value of the merged token that holds it."""
        graph = self.gm.graph
        for source in carriers:
            state = self.states[source]
            if state.grid is not None:
                output.replace_input_with(source, self._for_all_tokens(output, source))
                self.spread.append(source)
                continue
            if source in self.weights or len(state.axes) > 1 or state.many:
                raise self._refusal(output, f"the model returns {source.name}, with a weight for each unmerged key")
            ((axis, start),) = state.axes.items()
            self._check_batch(output, self._shape(source), state.level)
            args = schema.TokenSpreadArgs(x=source, place=state.level.places(), start=start, dim=axis)
            with graph.inserting_before(output):
                output.replace_input_with(source, graph.call_function(ops.token_spread, tuple(args)))
            self.spread.append(source)

    def _step(self, node: fx.Node, carriers: list[fx.Node]) -> State | None:
        """Follow an op; one that needs a grid gets all input tokens, and its result counts as unmerged."""
        on_grid = any(self.states[n].grid is not None for n in carriers)
        try:
            return self._on_grid(node, carriers) if on_grid else self._next(node, carriers)
        except GridError:
            state = None if on_grid else self._to_grid(node, self.states[carriers[0]])
            if state is None:
                self._leave(node, carriers)
            return state

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
            raise self._refusal(node, "an unknown op")
        return None

    def _is_number(self, node: fx.Node) -> bool:
        """Return True if a node reads a shape, or computes with numbers read from one."""
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

    def _check_batch(self, node: fx.Node, shape: tuple[int, ...], level: Level) -> None:
        """Refuse a tensor whose axis 0 is not the batch: sizes of tokens differ from sample to sample."""
        if shape[0] != self._shape(level.tokens)[0]:
            raise self._refusal(node, f"axis 0 of {shape} is not the batch")

    def _rows(self, node: fx.Node, level: Level) -> int:
        """Return how many rows of axis 0 each sample has: 1, or the number of heads that are joined with the batch."""
        shape, batch = self._shape(node), self._shape(level.tokens)[0]
        if shape[0] != batch:
            rows = rows_per_sample(self.gm, node, level.tokens, self.states, self.moves, self._shape)
            if rows is None or rows * batch != shape[0]:
                raise self._refusal(node, f"axis 0 of {shape} is not the batch")
            return rows
        return 1

    def _bring(self, node: fx.Node, table: fx.Node, level: Level, start: int, dim: int) -> None:
        """Average a value per input token over the tokens that merged, and let ``node`` read the averages."""
        value = fake_value(table)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or start < 0:
            raise self._refusal(node, f"{table.name} holds a value for each of the unmerged tokens")
        if self._shape(table)[dim] != self.count - start:
            raise self._refusal(node, f"{table.name} holds {self._shape(table)[dim]} values for {self.count} tokens")
        self._check_batch(node, self._shape(node), level)
        key = (table, level, start, dim)
        if key not in self._followed:
            args = schema.TokenFollowArgs(
                table=table,
                place=level.places(),
                before=self.size,
                size=level.size,
                start=start,
                dim=dim,
                rank=len(self._shape(node)),
            )
            with self.gm.graph.inserting_before(node):
                self._followed[key] = self.gm.graph.call_function(ops.token_follow, tuple(args))
        node.replace_input_with(table, self._followed[key])

    def _join(self, node: fx.Node, operands: Iterable[fx.Node], rank: int) -> State:
        """Return the state of tensors that are combined with broadcasting, aligned at the last axis."""
        operands = list(operands)
        carriers = [self.states[n] for n in operands if n in self.states]
        level = carriers[0].level
        axes: dict[int, int] = {}
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
            if not full or self._added_bias(node, operand, level, axes):
                continue
            if operand in self.states or len(axes) > 1:
                why = "a value for each of the unmerged tokens (a relative position bias, or an attention mask)"
                raise self._refusal(node, f"{operand.name} holds {why}")
            self._bring(node, operand, level, axes[full[0]], full[0] - rank)
        return State(level, axes)

    def _pointwise(self, node: fx.Node, carriers: list[fx.Node]) -> State:
        """Follow an op that is elementwise or runs along the last axis: counted from the end, the token axis stays."""
        rank = len(self._shape(node))
        along = node.op == "call_module" or target_name(self.gm, node) in ALONG_LAST
        tensors = carriers[:1] if along else [n for n in node.all_input_nodes if self._shape(n)]
        state = self._join(node, tensors, rank)
        known = node.op == "call_module" and not isinstance(self.gm.get_submodule(str(node.target)), _LAST_AXIS)
        if along and not known and rank - 1 in state.axes:
            raise self._refusal(node, "it mixes the tokens")
        return state

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

    def _reduce(self, node: fx.Node, state: State) -> State | None:
        """Weight a mean over tokens by their sizes, leave a maximum or minimum as it is, and refuse anything else."""
        name, rank = target_name(self.gm, node), len(self._shape(node.args[0]))
        place = 2 if name == "norm" else 1
        dim, keep = argument(node, place, "dim"), bool(argument(node, place + 1, "keepdim", False))
        axes = {d % rank for d in (range(rank) if dim is None else (dim,) if isinstance(dim, int) else dim)}
        over = axes & state.axes.keys()
        left = {a if keep else a - sum(b < a for b in axes): s for a, s in state.axes.items() if a not in over}
        if over:
            if name == "mean" and len(axes) == 1 and self.mask is None:
                self._weigh(node, state, min(over), keep)
            elif name not in ("max", "amax", "min", "amin"):
                why = "it averages over tokens and other axes at once" if name == "mean" else "it runs over the tokens"
                raise self._refusal(node, why if self.mask is None else "it averages over tokens, hidden ones included")
        many = isinstance(fake_value(node), (tuple, list))
        return replace(state, axes=left, many=many) if left else None

    def _weigh(self, node: fx.Node, state: State, axis: int, keep: bool) -> None:
        """Turn a mean over tokens into a mean over the input tokens that they stand for."""
        graph, x, shape = self.gm.graph, node.args[0], self._shape(node.args[0])
        first = axis == 0 and len(shape) == 3  # (N, B, C)
        self._check_batch(node, shape[1:] if first else shape, state.level)
        with graph.inserting_before(node):
            size, start = state.level.size, state.axes[axis]
            x = graph.call_function(torch.transpose, (x, 0, 1)) if first else x
            args = schema.TokenMeanArgs(x=x, size=size, start=start, dim=1 if first else axis, keepdim=keep)
            new = graph.call_function(ops.token_mean, tuple(args))
            new = graph.call_function(torch.transpose, (new, 0, 1)) if first and keep else new
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
            rows = self._rows(node, state.level)
            with self.gm.graph.inserting_before(node):
                args = tuple(schema.TokenBiasArgs(state.level.size, logits, state.axes[dim], dim, rows))
                bias = self.gm.graph.call_function(ops.token_bias, args if rows > 1 else args[:-1])
                total = self.gm.graph.call_function(operator.add, (logits, bias))
            node.replace_input_with(logits, total)  # type: ignore[arg-type]
        self.weights[node] = dim
        return state

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
        weighs = self.weights.get(left) == ranks[0] - 1 or self.weights.get(right) == ranks[1] - 2
        if inner != (None, None) and (inner[0] != inner[1] or not weighs):
            raise self._refusal(node, "it sums over tokens, without attention weights")
        if any(theirs.get(axis, start) != start for axis, start in ours.items()):
            raise self._refusal(node, "its operands hold different tokens")
        axes = {**ours, **theirs}
        summed = [(level, start, None) for start in inner[:1] if start is not None]
        self.extents[node] = [*((level, start, axis) for axis, start in axes.items()), *summed]
        return State(level, axes) if axes else None

    def _attention(self, node: fx.Node) -> State | None:
        """Make attention proportional: log(size) is added to the logits of merged keys."""
        query, key, value = (argument(node, i, k) for i, k in enumerate(("query", "key", "value")))
        keys, values, state = self.states.get(key), self.states.get(value), self.states.get(query)
        if keys is None and values is None and argument(node, 3, "attn_mask") is None:
            return state  # merged tokens as queries over keys that never merge
        if keys is None or values is None or keys.level is not values.level or keys.axes != values.axes:
            raise self._refusal(node, "its keys and values hold different tokens")
        if set(keys.axes) != {2} or len(self._shape(key)) != 4:
            raise self._refusal(node, "its keys do not have shape (batch, heads, tokens, channels)")
        mask, causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
        if causal is not False:
            raise self._refusal(node, "it is causal, and merging moves tokens")
        start = keys.axes[2]
        if mask is not None and mask is not self.mask:
            self._fused_bias(node, mask, keys.level, None if state is None else state.axes.get(2), start)
        elif self.proportional:
            args = schema.TokenAttentionArgs(
                query=query,
                key=key,
                value=value,
                size=keys.level.size,
                start=start,
                dropout_p=argument(node, 4, "dropout_p", 0.0),
                scale=argument(node, 6, "scale"),
                enable_gqa=argument(node, 7, "enable_gqa", False),
            )
            node.target, node.args, node.kwargs = ops.token_attention, tuple(args), {}
        axes = {} if state is None else {2: state.axes[2]}
        self.extents[node] = [(keys.level, start, None), *((keys.level, s, axis) for axis, s in axes.items())]
        return State(keys.level, axes) if axes else None

    def _along_another(self, node: fx.Node, state: State) -> State:
        """``F.normalize`` and ``repeat_interleave`` along any axis but the tokens'."""
        where = (2, "dim", 1) if target_name(self.gm, node) == "normalize" else (2, "dim", None)
        axis = argument(node, *where)
        if axis is None or axis % len(self._shape(node)) in state.axes:
            raise self._refusal(node, "it runs over the tokens")
        return state
