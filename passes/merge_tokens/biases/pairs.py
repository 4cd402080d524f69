"""Follow biases over pairs of tokens: a merged token gets a row and a column made of those of its parts."""

from __future__ import annotations

import operator

import torch
from torch import fx

from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import CASTS, target_name
from mpcompile.kernels import ops, schema
from mpcompile.passes.merge_tokens.moves import Level
from mpcompile.passes.merge_tokens.sites import PAIR_BIAS, asks_shape
from mpcompile.passes.merge_tokens.weights import AttentionWeights

_ADDITIONS = ("add", "iadd", "add_")


class PairBiases(AttentionWeights):
    """Merges rows and columns of attention biases.

    Args:
        size: node of the sizes of the input tokens.
        count: number of input tokens.
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
        super().__init__(gm, prefix, suffix, mask, proportional)
        self.size, self.count = size, count
        self._pairs: dict[tuple[fx.Node, Level, int, int, bool], fx.Node] = {}
        self._biased: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # logits + bias -> the logits, the unmerged bias

    def _fused_bias(self, node: fx.Node, mask: fx.Node, level: Level, queries: int | None, keys: int) -> None:
        """Let fused attention read the bias of merged tokens, with log(size) if attention is proportional."""
        if PAIR_BIAS not in mask.meta or self.mask is not None:
            raise self._refusal(node, "it has an attention mask or bias of its own")
        starts = (-1 if queries is None else queries, keys)
        bias = self._merged_bias(node, mask, level, starts, self.proportional)
        node.replace_input_with(mask, bias)

    def _added_bias(self, node: fx.Node, table: fx.Node, level: Level, axes: dict[int, int]) -> bool:
        """Merge a fixed bias that is added to written-out logits; return False if ``table`` is something else.

        Several biases that are added one after the other are merged as one.
        """
        rank = len(self._shape(node))
        plain = len(node.args) == 2 and not node.kwargs and target_name(self.gm, node) in _ADDITIONS
        if PAIR_BIAS not in table.meta or not plain or axes.keys() not in ({rank - 1, rank - 2}, {rank - 1}):
            return False
        if rank != 4 or self._shape(node)[0] != self._shape(level.tokens)[0] or not self._feeds_softmax(node):
            return False
        logits = next(n for n in node.all_input_nodes if n is not table)
        graph, whole = self.gm.graph, table
        if logits in self._biased:
            earlier, (logits, other) = logits, self._biased[logits]
            with graph.inserting_before(node):
                whole = graph.call_function(operator.add, (other, table))
            shapes = (self._shape(other), self._shape(table))
            whole.meta = {"val": torch.empty(torch.broadcast_shapes(*shapes), device="meta"), PAIR_BIAS: True}
            node.replace_input_with(earlier, logits)
            self._drop(earlier)
        self._biased[node] = (logits, whole)
        bias = self._merged_bias(node, whole, level, (axes.get(rank - 2, -1), axes[rank - 1]), False)
        node.replace_input_with(table, bias)
        return True

    def _drop(self, total: fx.Node) -> None:
        """Remove an addition that nothing reads, and the bias that it added unless another reads it."""
        bias = [node for node in total.all_input_nodes if node.target is ops.token_pairs]
        self.gm.graph.erase_node(total)
        for node in bias:
            if not node.users:
                self._pairs = {key: kept for key, kept in self._pairs.items() if kept is not node}
                self.gm.graph.erase_node(node)

    def _feeds_softmax(self, node: fx.Node) -> bool:
        """Return True if nothing but casts and additions stand between logits and their softmax."""
        while True:
            users = [user for user in node.users if not asks_shape(user)]
            if len(users) != 1:
                return False
            (node,) = users
            name = target_name(self.gm, node)
            if name in ("softmax", "Softmax", "_softmax"):
                return True
            if name not in CASTS + _ADDITIONS + ("contiguous", "clone"):
                return False

    def _merged_bias(
        self, node: fx.Node, table: fx.Node, level: Level, starts: tuple[int, int], counted: bool
    ) -> fx.Node:
        """Return the node of a bias of merged tokens, which ``node`` is about to read."""
        shape, wanted = self._shape(table), tuple(self.count - start for start in starts)
        rows = shape[-2] if len(shape) > 1 else 1
        fits = starts[0] == -1 or (starts[0] >= 0 and rows in (1, wanted[0]))
        if starts[1] < 0 or shape[-1] != wanted[1] or not fits:
            raise self._refusal(node, f"the bias {table.name} of shape {shape} is not one of {wanted} tokens")
        key = (table, level, *starts, counted)
        if key not in self._pairs:
            args = schema.TokenPairsArgs(
                table=table,
                place=level.places(),
                before=self.size,
                size=level.size,
                queries=starts[0],
                keys=starts[1],
                counted=counted,
            )
            with self.gm.graph.inserting_before(node):
                self._pairs[key] = self.gm.graph.call_function(ops.token_pairs, tuple(args))
        return self._pairs[key]
