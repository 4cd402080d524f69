"""Fuse: make activations, residual additions and whole MLPs part of the native operators.

A native operator still has a tile of its output in cache when the tile is complete: bias, activation and residual
cost nothing there. As nodes of their own, each costs a pass over memory. ``nm_mlp`` never writes its hidden layer to
memory. The pass walks from each ``nm_gemm`` and ``nm_conv`` along single users, past nodes that do nothing in
inference, to the activation, then to the addition (or, as in a ResNet, to the addition and then the activation), then
to the next ``nm_gemm``.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpcompile.ir.effects import writes
from mpcompile.ir.macs import is_add
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import argument, fake_value, real_inputs, shape_of, target_name
from mpcompile.ir.spec import operator_of
from mpcompile.kernels import ops, schema
from mpcompile.kernels.nm_linear.packed import AFTER_RESIDUAL
from mpcompile.kernels.schema import NmGemmArgs, NmMlpArgs
from mpcompile.passes.base import Context, Decision, Pass
from mpcompile.passes.lower import PACKED
from mpcompile.passes.rewriting import does_nothing, exact_class, follow, supersede

__all__ = ["Fuse", "activation_of", "does_nothing", "follow"]


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


def activation_of(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """Return the activation that a node computes, by its name in the native operators, or None."""
    target: Any = node.target
    if node.op == "call_module":
        module = gm.get_submodule(target)
        name = exact_class(module)
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


def _operands(add: fx.Node) -> tuple[Any, Any]:
    return argument(add, 0, "input", add.kwargs.get("self")), argument(add, 1, "other")


def _other_operand(add: fx.Node, node: fx.Node) -> Any:
    """Return the operand that an addition adds to ``node``, its other operand."""
    first, second = _operands(add)
    return second if first is node else first


def _data_dependent(gm: fx.GraphModule, lifted: Lifted) -> set[fx.Node]:
    """Return the nodes that depend on an input that is not a parameter."""
    dependent = set(real_inputs(gm, lifted))
    for node in gm.graph.nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


class _Search:
    """One walk over a graph, which finds the nodes that each native operator can absorb.

    Attributes:
        paths: operator -> the nodes whose work it takes over, from itself to the one whose value it will yield.
        activations: operator -> the activation of its product.
        residuals: operator -> the addition that it absorbs.
        late: operator -> the activation of that sum.
        mlps: operator -> the second operator of its MLP.
        left: operator -> why it absorbs nothing, or not everything that it could.
    """

    def __init__(self, gm: IRModule, lifted: Lifted) -> None:
        self.gm, self.data = gm, _data_dependent(gm, lifted)
        self.nodes = list(gm.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.natives = [n for n in self.nodes if (row := operator_of(n)) is not None and row.epilogue]
        self.paths = {op: [op] for op in self.natives}
        self.activations: dict[fx.Node, fx.Node] = {}
        self.residuals: dict[fx.Node, fx.Node] = {}
        self.late: dict[fx.Node, fx.Node] = {}
        self.mlps: dict[fx.Node, fx.Node] = {}
        self.left: dict[fx.Node, str] = {}

    def walk(self) -> None:
        for op in self.natives:
            self._activation(op)
        for op in reversed(self.natives):  # if two are added up, the later one need not move
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
        args = schema.bind(op)
        if args.residual is None and args.activation == "none" and op not in self.activations:
            table = self.late if op in self.residuals else self.activations
            table[op], self.paths[op] = user, [*path, *idle, user]

    def _residual(self, op: fx.Node) -> None:
        idle, add = follow(self.gm, self.paths[op][-1])
        if add is None or not is_add(add) or add in self.residuals.values():
            return
        if schema.bind(op).residual is not None:
            return
        path = [*self.paths[op], *idle]
        why = self._obstacle(path, add)
        if why is None:
            self.residuals[op], self.paths[op] = add, [*path, add]
        else:
            self.left[op] = why

    def _obstacle(self, path: list[fx.Node], add: fx.Node) -> str | None:
        """Return why an addition cannot be part of the operator at the head of ``path``, or None."""
        last = path[-1]
        other = _other_operand(add, last)
        if not isinstance(other, fx.Node):
            return "adds no tensor"
        if other is last:
            return "added to itself"
        if argument(add, 2, "alpha", 1) != 1 or "out" in add.kwargs:
            return "a scaled addition, or one into a given tensor"
        if add.target in (operator.iadd, "add_") and other is _operands(add)[0]:
            return "the addition writes into its other operand"
        mine, its = fake_value(last), fake_value(other)
        if not isinstance(mine, Tensor) or not isinstance(its, Tensor):
            return "shapes are not known"
        if shape_of(last) != shape_of(other) or mine.dtype != its.dtype:
            both = [f"{tuple(shape_of(n) or ())} {t.dtype}" for n, t in ((last, mine), (other, its))]
            return f"adds unlike tensors: {both[0]} and {both[1]}"
        if other not in self.data:
            return "adds a tensor that does not depend on the input: it broadcasts at another batch size"
        return self._written(path[0], add, path)

    def _mlp(self, op: fx.Node) -> None:
        idle, user = follow(self.gm, self.paths[op][-1])
        if user is None or {op.target, user.target} != {ops.nm_gemm} or op in self.mlps.values():
            return
        last = [*self.paths[op], *idle][-1]
        second = NmGemmArgs.bind(user)
        alone = second.x is last and list(second).count(last) == 1
        plain = NmGemmArgs.bind(op).residual is None and op not in self.residuals
        if not alone or not plain or second.activation != "none" or user in self.activations or user in self.late:
            return
        why = self._written(op, self.paths[user][-1], [*self.paths[op], *idle, *self.paths[user]])
        if why is None:
            self.mlps[op] = user
        else:
            self.left.setdefault(op, why)

    def _written(self, op: fx.Node, place: fx.Node, own: Iterable[fx.Node]) -> str | None:
        """Return why an operator cannot read its input as late as ``place``, or None."""
        between = self.nodes[self.order[op] + 1 : self.order[place]]
        writers = [n.name for n in between if n not in own and writes(self.gm, n)]
        return f"{writers[0]} writes in place before {place.name}" if writers else None


@dataclass(frozen=True, eq=False)
class Fusion(Decision):
    """The nodes that native operators absorb, as pairs of node names, the operator first.

    Attributes:
        activations: activations of the product.
        residuals: additions.
        behind: activations of the sum.
        mlps: second operators of an MLP.
        left: operator -> why it absorbs nothing, or not everything that it could.
    """

    activations: list[tuple[str, str]]
    residuals: list[tuple[str, str]]
    behind: list[tuple[str, str]]
    mlps: list[tuple[str, str]]
    left: Mapping[str, str]


class Fuse(Pass):
    """Native operators absorb the activation, the residual addition and the second linear layer that follow them.

    Runs after Lower. For dropout and everything else that depends on the mode, the modules' flags decide.

    Example:
        >>> from mpcompile import Pipeline
        >>> from mpcompile.passes.lower import Lower
        >>> Pipeline([*Pipeline(), Lower(), Fuse()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, skip_dead_tokens, lower, fuse])
    """

    name = "fuse"
    decision_type = Fusion

    def plan(self, gm: IRModule, ctx: Context) -> Fusion:
        search = _Search(gm, ctx.lifted)
        search.walk()
        return Fusion(
            activations=_names(search.activations),
            residuals=_names(search.residuals),
            behind=_names(search.late),
            mlps=_names(search.mlps),
            left={node.name: why for node, why in search.left.items()},
        )

    def summary(self, decision: Fusion) -> str:
        activations = len(decision.activations) + len(decision.behind)
        residuals, mlps = len(decision.residuals), len(decision.mlps)
        if not activations + residuals + mlps:
            return "nothing to fuse"
        return f"{activations} activations, {residuals} residual additions, {mlps} mlps"

    def apply(self, gm: IRModule, decision: Fusion, ctx: Context) -> bool:
        nodes = {node.name: node for node in gm.graph.nodes}
        plans = {f"{PACKED}.{name}.values": plan for name, plan in ctx.plan.layers.items()}

        def note(op: fx.Node, key: str, value: Any) -> None:
            values = schema.bind(op).values
            plan = plans.get(str(values.target)) if isinstance(values, fx.Node) else None
            if plan is not None:
                plan.notes.setdefault("fuse", {})[key] = value

        for op, end in decision.activations:
            note(nodes[op], "activation", _activate(gm, nodes[op], nodes[end], ""))
        for op, add in decision.residuals:
            note(nodes[op], "residual", True)
            _add(gm, nodes[op], nodes[add])
        for op, end in decision.behind:
            note(nodes[op], "activation", _activate(gm, nodes[op], nodes[end], AFTER_RESIDUAL))
        for first, second in decision.mlps:
            note(nodes[first], "mlp", True)
            note(nodes[second], "mlp", True)
            _join(gm, nodes[first], nodes[second])
        return bool(decision.activations or decision.residuals or decision.behind or decision.mlps)


def _names(table: Mapping[fx.Node, fx.Node]) -> list[tuple[str, str]]:
    return [(op.name, end.name) for op, end in table.items()]


def _activate(gm: IRModule, op: fx.Node, end: fx.Node, prefix: str) -> str | None:
    """Make an activation the epilogue of an operator, and return the activation's name."""
    activation = activation_of(gm, end)
    _update(op, activation=f"{prefix}{activation}")
    _absorb(gm, op, end)
    return activation


def _add(gm: IRModule, op: fx.Node, add: fx.Node) -> None:
    """Make an addition the residual of an operator."""
    idle, _ = follow(gm, op)
    other = _other_operand(add, [op, *idle][-1])
    add.prepend(op)  # the residual may be computed later than the operator was
    _update(op, residual=other)
    _absorb(gm, op, add)


def _update(op: fx.Node, **changes: Any) -> None:
    """Change arguments of a native operator by name."""
    op.args, op.kwargs = tuple(dataclasses.replace(schema.bind(op), **changes)), {}


def _absorb(gm: IRModule, op: fx.Node, end: fx.Node) -> None:
    """Let ``op`` yield the value of ``end``; erase ``end`` and the nodes in between."""
    idle, _ = follow(gm, op)
    end.replace_all_uses_with(op)
    op.meta.update({key: end.meta[key] for key in ("val", "example_value") if key in end.meta})
    for node in [end, *reversed(idle)]:
        gm.graph.erase_node(node)


def _join(gm: IRModule, first: fx.Node, second: fx.Node) -> None:
    """Replace two ``nm_gemm`` by one ``nm_mlp``."""
    idle, _ = follow(gm, first)
    a, b = NmGemmArgs.bind(first), NmGemmArgs.bind(second)
    args = NmMlpArgs(
        x=a.x,
        values1=a.values,
        index1=a.index,
        bias1=a.bias,
        values2=b.values,
        index2=b.index,
        bias2=b.bias,
        residual=b.residual,
        hidden=a.out,
        out=b.out,
        n1=a.n,
        m1=a.m,
        n2=b.n,
        m2=b.m,
        layout1=a.layout,
        layout2=b.layout,
        activation=a.activation,
    )
    with gm.graph.inserting_before(second):
        new = gm.graph.call_function(ops.nm_mlp, tuple(args))
    new.meta = dict(second.meta)
    supersede(gm.graph, [first, *idle, second], new)
