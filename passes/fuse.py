"""Fuse: activations, residual additions and whole MLPs become part of the native operators.

A native operator has a tile of its output in cache when it is done with it: bias, activation and residual cost nothing
there, and a pass over memory each when they are nodes of their own. ``nm_mlp`` doesn't write its hidden layer to memory
at all. The pass walks from each ``nm_gemm`` and ``nm_conv`` along single users, through what does nothing in inference,
to the activation, then to the addition (or, as in a ResNet, to the addition and then the activation), then to the next
``nm_gemm``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.ir.effects import writes
from mpcompile.ir.macs import is_add
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import argument, fake_value, real_inputs, shape_of, target_name
from mpcompile.kernels import ops
from mpcompile.kernels.nm_linear.packed import BEHIND
from mpcompile.layers import ByMode
from mpcompile.passes.base import Context, Pass
from mpcompile.passes.lower import PACKED

_VALUES, _RESIDUAL = 1, 4  # positions in the schemas of nm_gemm and nm_conv; the activation is last
_KINDS = ("activations", "residuals", "behind", "mlps")

_aten = torch.ops.aten
_RELU = frozenset({F.relu, torch.relu, torch.relu_, _aten.relu.default, _aten.relu_.default})
_GELU = frozenset({F.gelu, _aten.gelu.default})
_SILU = frozenset({F.silu, _aten.silu.default})
_APPROXIMATE = {"none": "gelu", "tanh": "gelu_tanh"}
_ACTIVATION_MODULES = {  # exact types; subclasses may compute something else
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
}
_DROPOUT = frozenset({F.dropout, torch.dropout, _aten.dropout.default})
_DROPOUT_MODULES = {"torch.nn.modules.dropout.Dropout": "p", "timm.layers.drop.DropPath": "drop_prob"}


def _class_name(module: nn.Module) -> str | None:
    """Qualified name of a module's class, or None where hooks may do something else besides."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    return f"{type(module).__module__}.{type(module).__qualname__}"


def activation_of(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """The activation that a node computes, by its name in the native operators, or None."""
    target: Any = node.target
    if node.op == "call_module":
        module = gm.get_submodule(target)
        name = _class_name(module)
        if name == "torch.nn.modules.activation.GELU":
            return _APPROXIMATE.get(str(module.approximate))
        return _ACTIVATION_MODULES.get(name or "")
    if node.op != "call_function":
        return "relu" if node.op == "call_method" and target in ("relu", "relu_") else None
    if target in _GELU:
        return _APPROXIMATE.get(argument(node, 1, "approximate", "none"))
    if target in _RELU:
        return "relu"
    return "silu" if target in _SILU else None


def _number(gm: fx.GraphModule, value: Any) -> Any:
    """A literal, or what a :class:`ByMode` yields in the present mode; None where it isn't known."""
    if not isinstance(value, fx.Node):
        return value
    module = gm.get_submodule(str(value.target)) if value.op == "call_module" else None
    return module() if isinstance(module, ByMode) else None


def does_nothing(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node yields its input: an identity, or dropout that is off."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        name = _class_name(module) or ""
        if name in _DROPOUT_MODULES:
            return not module.training or not getattr(module, _DROPOUT_MODULES[name])
        return name == "torch.nn.modules.linear.Identity"
    if node.op != "call_function" or node.target not in _DROPOUT:
        return False
    p, on = argument(node, 1, "p", 0.5), argument(node, 2, "training", node.kwargs.get("train", True))
    return _number(gm, p) == 0 or _number(gm, on) in (False, 0)


def follow(gm: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
    """From a node along single users: what does nothing, and the first user that does something (None: several)."""
    idle: list[fx.Node] = []
    while len(node.users) == 1:
        user = next(iter(node.users))
        if not does_nothing(gm, user) or argument(user, 0, "input") is not node:
            return idle, user
        idle.append(user)
        node = user
    return idle, None


def _operands(add: fx.Node) -> tuple[Any, Any]:
    return argument(add, 0, "input", add.kwargs.get("self")), argument(add, 1, "other")


def _from_data(gm: fx.GraphModule, lifted: Lifted) -> set[fx.Node]:
    """Nodes that depend on an input that is no parameter."""
    found = set(real_inputs(gm, lifted))
    for node in gm.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


class _Plan:
    """The walk over one graph.

    Attributes:
        paths: operator -> the nodes whose work it takes over, from itself to the one whose value it will yield.
    """

    def __init__(self, gm: IRModule, lifted: Lifted) -> None:
        self.gm, self.data = gm, _from_data(gm, lifted)
        self.nodes = list(gm.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.natives = [n for n in self.nodes if n.target in (ops.nm_gemm, ops.nm_conv)]
        self.paths = {op: [op] for op in self.natives}
        self.activations: dict[fx.Node, fx.Node] = {}
        self.residuals: dict[fx.Node, fx.Node] = {}
        self.behind: dict[fx.Node, fx.Node] = {}  # activations of the sum
        self.mlps: dict[fx.Node, fx.Node] = {}
        self.left: dict[fx.Node, str] = {}

    def walk(self) -> None:
        for op in self.natives:
            self._activation(op)
        for op in reversed(self.natives):  # of two operators that are added up, the later one doesn't have to move
            self._residual(op)
        for op in self.residuals:
            self._activation(op)
        for op in self.natives:
            self._mlp(op)
        fused = {*self.activations, *self.residuals, *self.mlps, *self.mlps.values()}
        for op in self.natives:
            if op not in fused and op not in self.left:
                idle, user = follow(self.gm, op)
                users = len((idle or [op])[-1].users)
                self.left[op] = f"{users} users" if user is None else f"followed by {target_name(self.gm, user)}"

    def _activation(self, op: fx.Node) -> None:
        path = self.paths[op]
        idle, user = follow(self.gm, path[-1])
        if user is None or activation_of(self.gm, user) is None or argument(user, 0, "input") is not [*path, *idle][-1]:
            return
        if op.args[_RESIDUAL] is None and op.args[-1] == "none" and op not in self.activations:
            table = self.behind if op in self.residuals else self.activations
            table[op], self.paths[op] = user, [*path, *idle, user]

    def _residual(self, op: fx.Node) -> None:
        idle, add = follow(self.gm, self.paths[op][-1])
        if add is None or not is_add(add) or op.args[_RESIDUAL] is not None or add in self.residuals.values():
            return
        path = [*self.paths[op], *idle]
        why = self._refusal(path, add)
        if why is None:
            self.residuals[op], self.paths[op] = add, [*path, add]
        else:
            self.left[op] = why

    def _refusal(self, path: list[fx.Node], add: fx.Node) -> str | None:
        """Why an addition can't be part of the operator at the head of ``path``, or None."""
        operands, last = _operands(add), path[-1]
        other = operands[operands[0] is last]
        if not isinstance(other, fx.Node):
            return "adds no tensor"
        if other is last:
            return "added to itself"
        if argument(add, 2, "alpha", 1) != 1 or "out" in add.kwargs:
            return "a scaled addition, or one into a given tensor"
        if add.target in (operator.iadd, "add_") and other is operands[0]:
            return "the addition writes into its other operand"
        mine, its = fake_value(last), fake_value(other)
        if not isinstance(mine, Tensor) or not isinstance(its, Tensor):
            return "shapes are not known"
        if shape_of(last) != shape_of(other) or mine.dtype != its.dtype:
            found = [f"{tuple(shape_of(n) or ())} {t.dtype}" for n, t in ((last, mine), (other, its))]
            return f"adds unlike tensors: {found[0]} and {found[1]}"
        if other not in self.data:
            return "adds what doesn't depend on the input: it broadcasts at another batch size"
        return self._written(path[0], add, path)

    def _mlp(self, op: fx.Node) -> None:
        idle, user = follow(self.gm, self.paths[op][-1])
        if user is None or {op.target, user.target} != {ops.nm_gemm} or op in self.mlps.values():
            return
        last = [*self.paths[op], *idle][-1]
        alone = user.args[0] is last and last not in user.args[1:]
        plain = op.args[_RESIDUAL] is None and op not in self.residuals
        if not alone or not plain or user.args[-1] != "none" or user in self.activations or user in self.behind:
            return
        why = self._written(op, self.paths[user][-1], [*self.paths[op], *idle, *self.paths[user]])
        if why is None:
            self.mlps[op] = user
        else:
            self.left.setdefault(op, why)

    def _written(self, op: fx.Node, place: fx.Node, own: Iterable[fx.Node]) -> str | None:
        """Why an operator can't read its input as late as ``place``, or None."""
        between = self.nodes[self.order[op] + 1 : self.order[place]]
        guilty = [n.name for n in between if n not in own and writes(self.gm, n)]
        return f"{guilty[0]} writes in place before {place.name}" if guilty else None


class Fuse(Pass):
    """Native operators take in the activation, the residual addition and the second linear layer behind them.

    Runs after Lower. Dropout and whatever else depends on the mode counts as the module's flags say.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower
        >>> Pipeline([*Pipeline(), Lower(), Fuse()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, lower, fuse])
    """

    name = "fuse"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        found = _Plan(gm, ctx.lifted)
        found.walk()
        tables = zip(_KINDS, (found.activations, found.residuals, found.behind, found.mlps), strict=True)
        decision: dict[str, Any] = {k: [[a.name, b.name] for a, b in table.items()] for k, table in tables}
        return {**decision, "left": {node.name: why for node, why in found.left.items()}}

    def summary(self, decision: dict[str, Any]) -> str:
        ahead, residuals, behind, mlps = (len(decision[key]) for key in _KINDS)
        if not ahead + residuals + mlps:
            return "nothing to fuse"
        return f"{ahead + behind} activations, {residuals} residual additions, {mlps} mlps"

    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        nodes = {node.name: node for node in gm.graph.nodes}
        layers = {f"{PACKED}.{name}.values": plan for name, plan in ctx.plan.layers.items()}

        def note(op: fx.Node, key: str, value: Any) -> None:
            values = op.args[_VALUES]
            plan = layers.get(str(values.target)) if isinstance(values, fx.Node) else None
            if plan is not None:
                plan.notes.setdefault("fuse", {})[key] = value

        def activate(name: str, end: str, prefix: str) -> None:
            op, activation = nodes[name], activation_of(gm, nodes[end])
            note(op, "activation", activation)
            op.update_arg(len(op.args) - 1, f"{prefix}{activation}")
            self._absorb(gm, op, nodes[end])

        for name, end in decision["activations"]:
            activate(name, end, "")
        for name, end in decision["residuals"]:
            op, add = nodes[name], nodes[end]
            note(op, "residual", True)
            idle, _ = follow(gm, op)
            operands = _operands(add)
            add.prepend(op)  # the residual may be computed later than the operator was
            op.update_arg(_RESIDUAL, operands[operands[0] is [op, *idle][-1]])
            self._absorb(gm, op, add)
        for name, end in decision["behind"]:
            activate(name, end, BEHIND)
        for name, end in decision["mlps"]:
            note(nodes[name], "mlp", True)
            note(nodes[end], "mlp", True)
            self._join(gm, nodes[name], nodes[end])
        return any(decision[key] for key in _KINDS)

    @staticmethod
    def _absorb(gm: IRModule, op: fx.Node, end: fx.Node) -> None:
        """``op`` yields the value of ``end`` from now on; what lay between goes."""
        idle, _ = follow(gm, op)
        end.replace_all_uses_with(op)
        op.meta.update({key: end.meta[key] for key in ("val", "example_value") if key in end.meta})
        for gone in [end, *reversed(idle)]:
            gm.graph.erase_node(gone)

    @staticmethod
    def _join(gm: IRModule, first: fx.Node, second: fx.Node) -> None:
        idle, _ = follow(gm, first)
        x, *head1, _, hidden, n1, m1, layout1, activation = first.args
        _, *head2, residual, out, n2, m2, layout2, _ = second.args
        args = (x, *head1, *head2, residual, hidden, out, n1, m1, n2, m2, layout1, layout2, activation)
        with gm.graph.inserting_before(second):
            new = gm.graph.call_function(ops.nm_mlp, args)
        new.meta = dict(second.meta)
        second.replace_all_uses_with(new)
        for gone in [second, *reversed(idle), first]:
            gm.graph.erase_node(gone)
