"""Attention weights, from the softmax to the product with the values.

A merged key has the weight of all the tokens that it stands for. That holds as long as the ops on the weights are
linear in them; other ops are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import CASTS, argument, target_name
from mpcompile.kernels import ops, schema
from mpcompile.layers import MaskedLinear
from mpcompile.passes.merge_tokens.moves import REGROUPS, SIZED, AxisMoves, State
from mpcompile.passes.merge_tokens.sites import is_matmul

_SAME = frozenset((*CASTS, "contiguous", "clone", "detach", "neg", "dropout", "Dropout", "Identity"))
_PRODUCTS, _QUOTIENTS = frozenset(("mul", "imul", "mul_")), frozenset(("div", "div_", "truediv", "itruediv"))
_SUMS = frozenset(("add", "iadd", "add_", "sub", "isub", "sub_"))


class AttentionWeights(AxisMoves):
    """Follows the axis of keys in attention weights.

    Args:
        mask: the attention mask, which the sizes of the tokens already contain, or None.
        proportional: True if log(size) is added to attention logits.

    Attributes:
        states: node -> the tokens that it carries.
        weights: node that holds attention weights -> its axis of keys.
    """

    def __init__(self, gm: IRModule, prefix: int, suffix: int, mask: fx.Node | None, proportional: bool) -> None:
        super().__init__(gm, prefix, suffix)
        self.mask, self.proportional = mask, proportional
        self.states: dict[fx.Node, State] = {}
        self.weights: dict[fx.Node, int] = {}

    def _keys_axis(self, node: fx.Node, carriers: list[fx.Node]) -> int | None:
        """Return the axis of keys in the result of an op on attention weights.

        None if the op has no such weights among its inputs, or sums over the keys.

        Raises:
            GraphError: the op is not linear in the weights.
        """
        held = [n for n in carriers if n in self.weights]
        if not held or is_matmul(node) or node.op == "output":
            return None
        name, source = target_name(self.gm, node), held[0]
        keys, state = self.weights[source], self.states[source]
        if name in self.moves:
            return self._moved(node, name, State(state.level, {keys: state.axes[keys]}, state.many))
        back = len(self._shape(source)) - keys  # the axis of keys, counted from the end
        place = len(self._shape(node)) - back
        first = node.args[0] if node.args else None
        others = [n for n in node.all_input_nodes if n is not source]
        if name in _SAME and first is source:
            return place
        if name in _PRODUCTS and len(node.args) == 2 and node.args[0] is not node.args[1] and len(held) == 1:
            return place
        if name in _QUOTIENTS and first is source and len(held) == 1 and not node.kwargs:
            return place
        if name in _SUMS and others and all(self._has_keys_at(n, back) for n in (first, node.args[1])):
            return place
        if self._is_linear(node, name) and place != len(self._shape(node)) - 1:
            return place
        if name in ("mean", "sum"):
            return self._reduced(node, keys)
        if not self.proportional:  # every token has the weight of one, whatever is computed from it
            return place
        why = "it is not linear in the attention weights, where a merged key has the weight of all tokens it stands for"
        raise self._refusal(node, why)

    def _has_keys_at(self, node: Any, back: int) -> bool:
        """Return True if an operand holds attention weights whose axis of keys is ``back`` from the end."""
        return isinstance(node, fx.Node) and len(self._shape(node)) - self.weights.get(node, -1) == back

    def _is_linear(self, node: fx.Node, name: str) -> bool:
        if node.op == "call_module":
            return type(self.gm.get_submodule(str(node.target))) in (nn.Linear, MaskedLinear)
        return name in ("linear", "masked_linear")

    def _count_bias(self, node: fx.Node, state: State, keys: int) -> None:
        """Count the bias of a layer on attention weights (mixed heads) once per token that a key stands for."""
        graph, bias = self.gm.graph, None
        if node.op == "call_function":
            masked = node.target is ops.masked_linear
            bias = schema.MaskedLinearArgs.bind(node).bias if masked else argument(node, 2, "bias")
        elif self.gm.get_submodule(str(node.target)).bias is not None:
            with graph.inserting_before(node):
                bias = graph.get_attr(f"{node.target}.bias")
        if bias is None:
            return
        if self.mask is not None:
            raise self._refusal(node, "its bias gives weight to hidden tokens")
        users = list(node.users)
        with graph.inserting_after(node):
            log_args = schema.TokenBiasArgs(size=state.level.size, logits=node, start=state.axes[keys], dim=keys)
            log = graph.call_function(ops.token_bias, tuple(log_args)[:-1])
        with graph.inserting_after(log):
            more = graph.call_function(torch.expm1, (log,))  # size - 1: the layer has added its bias once
        with graph.inserting_after(more):
            total = graph.call_function(torch.addcmul, (node, more, bias))
        total.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, total)
        self.states[total], self.weights[total] = state, keys

    def _moved(self, node: fx.Node, name: str, state: State) -> int | None:
        """Return the axis to which an op moves the only axis of ``state``, without rewriting the op."""
        if name in SIZED or name in REGROUPS:
            return next(iter(self._places(node, state).values()))
        moved = self.moves[name](node, state)
        return next(iter(moved.axes)) if moved is not None and moved.axes else None

    def _reduced(self, node: fx.Node, keys: int) -> int | None:
        """Return the axis of keys after a reduction over other axes; None if it runs over the keys."""
        rank, dim = len(self._shape(node.args[0])), argument(node, 1, "dim")
        gone = {d % rank for d in (range(rank) if dim is None else (dim,) if isinstance(dim, int) else dim)}
        if keys in gone:
            return None
        return keys if argument(node, 2, "keepdim", False) else keys - sum(d < keys for d in gone)
