"""Rules: how an operation computes a part of its value from parts of its operands.

A rule serves twice: with :class:`mpcompile.passes.dead_tokens.demand.Asked` it only says which parts it needs, and with
:class:`mpcompile.passes.dead_tokens.rewrite.Rewriter` it adds the nodes that compute them. An operation without a rule
is computed in full.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from mpcompile.ir.effects import writes, written
from mpcompile.ir.macs import is_add
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import (
    ALONG_LAST,
    ATTENTION,
    CASTS,
    ELEMENTWISE,
    ELEMENTWISE_MODULES,
    LAST_AXIS_MODULES,
    argument,
    fake_value,
    shape_of,
    target_name,
)
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels import ops, schema
from mpcompile.passes.dead_tokens.boxes import FULL, Box, box, without
from mpcompile.passes.dead_tokens.selections import Whole, Wider
from mpcompile.passes.dead_tokens.views import VIEWS
from mpcompile.passes.rewriting import exact_class

__all__ = ["Builder", "Rules", "Whole"]

_NORMALISED = {"softmax": 1, "_softmax": 1, "log_softmax": 1, "normalize": 2}  # op -> position of dim
_REDUCTIONS = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "norm": 2}  # op -> position of dim


class Builder(Protocol):
    """What rules ask for parts of operands, and what they build their results with."""

    def tensor(self, node: fx.Node, part: Box = FULL) -> Any:
        """Return a part of a node's value."""

    def number(self, value: Any) -> Any:
        """Return a number, or another argument that holds no tensor, for use in a new node."""

    def form(self, node: fx.Node) -> Any:
        """Return any part of a node's value, for an operation that reads nothing but its dtype, device and rank."""

    def size(self, value: Any, axis: int) -> Any:
        """Return one length of a shape that a node yields."""

    def read(self, path: str, part: Box) -> Any:
        """Return a part of the parameter or buffer at ``path``."""

    def call(self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        """Return the result of a function, or of a method if ``target`` is a name."""

    def again(self, node: fx.Node, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        """Return the result of a node's own operation on other arguments."""


def _check_whole(part: Box, axes: Iterable[int]) -> None:
    """Refuse a part that is not whole along some axes."""
    cut = {axis for axis, _ in part}.intersection(axes)
    if cut:
        raise Wider(cut)


def _operand(node: fx.Node, name: str = "input") -> fx.Node:
    """Return the first operand."""
    source = argument(node, 0, name)
    if not isinstance(source, fx.Node):
        raise Whole
    return source


Rule = Callable[[Builder, fx.Node, Box], Any]


class Rules:
    """The rules of a graph's operations.

    Args:
        gm: a graph whose nodes carry shapes.
        lifted: parameters that are graph inputs.
    """

    def __init__(self, gm: IRModule, lifted: Lifted) -> None:
        self.gm, self.lifted = gm, lifted
        self.layers = {layer.node: layer for layer in layers(gm, lifted) if layer.kind == "linear"}
        self.named: dict[str, Rule] = {
            **dict.fromkeys(ALONG_LAST, self._along_last),
            **dict.fromkeys(_NORMALISED, self._normalised),
            **dict.fromkeys(_REDUCTIONS, self._reduced),
            **dict.fromkeys(("matmul", "bmm", "__matmul__", "imatmul"), self._matmul),
        }

    def apply(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        """Compute a part of a node's value.

        Raises:
            Whole: only all of it can be computed, from all of its operands.
            Wider: some axes have to be whole.
        """
        rule = self.rule_of(node)
        if rule is None or self.writes(node):
            raise Whole
        return rule(builder, node, part)

    def writes(self, node: fx.Node) -> bool:
        """Return True if a node writes into a tensor that something else may read, or may do so.

        An activation or dropout that overwrites the result of a layer or of an addition is no statement for others.
        """
        if not writes(self.gm, node):
            return False
        return not self._elementwise_call(node) or not all(map(self._is_private, written(self.gm, node)))

    def _elementwise_call(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self._module_rule(node) == self._elementwise
        return target_name(self.gm, node).removesuffix("_") in ELEMENTWISE

    def _is_private(self, node: fx.Node) -> bool:
        """Return True if one node alone reads a tensor, directly or as another name of a layer's result."""
        if len(node.users) != 1:
            return False
        inputs = [source for source in node.all_input_nodes if isinstance(fake_value(source), Tensor)]
        named = self._elementwise_call(node) and bool(inputs) and all(map(self._is_private, inputs))
        return node in self.layers or is_add(node) or named

    def rule_of(self, node: fx.Node) -> Rule | None:
        """Return the rule of a node's operation, or None if it has none."""
        if node.op == "call_module":
            return self._module_rule(node)
        if node in self.layers:
            return self._linear
        if node.target in ATTENTION or node.target is ops.token_attention:
            return self._attention
        if node.target is ops.token_bias:
            return self._bias
        name = str(node.args[1]) if node.target is getattr else target_name(self.gm, node)
        if name in VIEWS:
            return functools.partial(VIEWS[name], self.gm)
        if name in self.named:
            return self.named[name]
        return self._elementwise if name.removesuffix("_") in ELEMENTWISE else None

    def _module_rule(self, node: fx.Node) -> Rule | None:
        """Return the rule of a module: of torch's own forward, without hooks, which would see other tensors."""
        module = self.gm.get_submodule(str(node.target))
        kind: Any = type(module)
        base: Any = next((k for k in kind.__mro__ if k.__module__.startswith(("torch.nn.", "mpcompile."))), None)
        own = base is not None and kind.forward is base.forward and "forward" not in vars(module)
        drops = kind.__name__ == "DropPath" and kind.__module__.startswith("timm.")
        if not (own or drops) or exact_class(module) is None or module._backward_hooks or module._backward_pre_hooks:
            return None
        if node in self.layers:
            return self._linear if self.layers[node].obstacle is None else None
        if isinstance(module, nn.Softmax):
            return self._normalised
        if isinstance(module, LAST_AXIS_MODULES):
            single = not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) == 1
            return self._along_last if single else None
        return self._elementwise if drops or isinstance(module, ELEMENTWISE_MODULES) else None

    def _elementwise(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        rank = len(shape_of(node) or ())

        def operand(source: fx.Node) -> Any:
            shape = shape_of(source)
            if shape is None:
                return builder.number(source)
            shift = rank - len(shape)
            own = {axis - shift: runs for axis, runs in part if axis >= shift and shape[axis - shift] != 1}
            return builder.tensor(source, box(own))

        first, *others = node.args
        if target_name(self.gm, node) in CASTS and isinstance(first, fx.Node):  # to(tensor) reads the tensor's form

            def form(source: fx.Node) -> Any:
                return builder.number(source) if shape_of(source) is None else builder.form(source)

            rest = fx.node.map_arg(tuple(others), form)
            return builder.again(node, (operand(first), *rest), fx.node.map_arg(node.kwargs, form))
        return builder.again(node, fx.node.map_arg(node.args, operand), fx.node.map_arg(node.kwargs, operand))

    def _others(self, builder: Builder, node: fx.Node, first: Any) -> Any:
        """Repeat a call with another first operand; the other operands are read in full."""
        source = _operand(node)

        def operand(other: fx.Node) -> Any:
            if other is source:
                return first
            return builder.tensor(other) if isinstance(fake_value(other), Tensor) else builder.number(other)

        return builder.again(node, fx.node.map_arg(node.args, operand), fx.node.map_arg(node.kwargs, operand))

    def _along_last(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        """Follow a norm, or a product whose weight is computed: the last axes stay whole."""
        rank, many = len(shape_of(node) or ()), 1
        if target_name(self.gm, node) in ("layer_norm", "rms_norm"):
            many = len(argument(node, 1, "normalized_shape"))
        elif node.op == "call_module":
            many = len(getattr(self.gm.get_submodule(str(node.target)), "normalized_shape", (0,)))
        return self._first(builder, node, part, range(rank - many, rank))

    def _first(self, builder: Builder, node: fx.Node, part: Box, whole: Iterable[int]) -> Any:
        """Follow the first operand, axis by axis; some axes have to be whole."""
        _check_whole(part, whole)
        return self._others(builder, node, builder.tensor(_operand(node), part))

    def _linear(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        layer = self.layers[node]
        last = len(shape_of(node) or ()) - 1
        rows = dict(part).get(last)
        if rows is None or len(rows) != 1 or layer.obstacle is not None or not self._reads_rows(layer):
            return self._first(builder, node, part, [last])
        needed = without(part, [last])
        x = builder.tensor(layer.input, needed)
        along: Box = ((0, rows),)
        if node.op == "call_module":
            tensors = [builder.read(f"{layer.name}.weight", along)]
            tensors += [] if layer.mask is None else [builder.read(f"{layer.name}.mask", along)]
            bias = None if layer.bias is None else builder.read(f"{layer.name}.bias", along)
        else:
            sources: list[Any] = [argument(node, 1, "weight")]
            sources += [] if layer.mask is None else [schema.bind(node).mask]
            tensors = [builder.tensor(source, along) for source in sources]
            bias = builder.tensor(layer.bias, along) if isinstance(layer.bias, fx.Node) else layer.bias
        if layer.pattern is None:
            return builder.call(torch.nn.functional.linear, (x, tensors[0], bias))
        return builder.call(ops.masked_linear, (x, *tensors, bias, *layer.pattern))

    @staticmethod
    def _reads_rows(layer: LayerOp) -> bool:
        """Return True if a layer's tensors are whole parameters, of which rows can be taken."""
        return layer.weight.whole is None and (layer.mask is None or layer.mask.whole is None)

    def _normalised(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        """Follow an operation that reads a whole axis to compute any value along it."""
        rank = len(shape_of(node) or ())
        if node.op == "call_module":
            dim = getattr(self.gm.get_submodule(str(node.target)), "dim", None)
        else:
            name = target_name(self.gm, node)
            dim = argument(node, _NORMALISED[name], "dim", 1 if name == "normalize" else None)
        if not isinstance(dim, int):
            raise Whole
        return self._first(builder, node, part, [dim % rank])

    def _reduced(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        name, source = target_name(self.gm, node), _operand(node)
        rank = len(shape_of(source) or ())
        dim = argument(node, _REDUCTIONS[name], "dim")
        keep = argument(node, _REDUCTIONS[name] + 1, "keepdim", False)
        over = [dim] if isinstance(dim, int) else dim
        if not isinstance(over, (tuple, list)) or not all(isinstance(d, int) for d in over) or not over:
            raise Whole
        gone = {d % rank for d in over}
        axes = list(range(rank)) if keep else [axis for axis in range(rank) if axis not in gone]
        own = box({axes[axis]: runs for axis, runs in part if axes[axis] not in gone})
        return self._others(builder, node, builder.tensor(source, own))

    def _matmul(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        left, right = _operand(node), argument(node, 1, "mat2", node.kwargs.get("other"))
        if not isinstance(right, fx.Node):
            raise Whole
        rank, ranks = len(shape_of(node) or ()), [len(shape_of(n) or ()) for n in (left, right)]
        if min(ranks) < 2:
            raise Whole
        operands = []
        for source, own_rank, contracted in ((left, ranks[0], rank - 1), (right, ranks[1], rank - 2)):
            shift, shape = rank - own_rank, shape_of(source) or ()
            own = {a - shift: runs for a, runs in part if a != contracted and a >= shift and shape[a - shift] != 1}
            operands.append(builder.tensor(source, box(own)))
        return builder.again(node, tuple(operands))

    def _attention(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        """Compute the results of some queries: keys and values stay whole."""
        rank = len(shape_of(node) or ())
        fused = node.target in ATTENTION
        causal = argument(node, 5, "is_causal", False) if fused else False
        _check_whole(part, [axis for axis in range(rank) if axis != rank - 2 or causal is not False])
        query, mask = _operand(node, "query"), argument(node, 3, "attn_mask") if fused else None

        def operand(source: fx.Node) -> Any:
            shape = shape_of(source)
            if shape is None:
                return builder.number(source)
            if source is mask and len(shape) > 1 and shape[-2] != 1:
                return builder.tensor(source, box({len(shape) - 2: runs for _, runs in part}))
            return builder.tensor(source)

        queries = builder.tensor(query, part)
        args = fx.node.map_arg(node.args[1:], operand)
        kwargs = {k: v for k, v in node.kwargs.items() if k != "query"}
        return builder.again(node, (queries, *args), fx.node.map_arg(kwargs, operand))

    def _bias(self, builder: Builder, node: fx.Node, part: Box) -> Any:
        """Compute log(size) for logits, of which only dtype and rank are read."""
        args = schema.TokenBiasArgs.bind(node)
        if args.rows != 1 or any(axis in (0, args.dim) for axis, _ in part):
            raise Whole
        return builder.again(node, (builder.tensor(args.size), builder.form(args.logits), *node.args[2:]))
