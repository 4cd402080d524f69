"""The IR's module: a torch-level fx.GraphModule that can be copied and pickled together with its plan and its mode.

When a GraphModule is pickled or copied, torch.fx traces it again, which loses its class, hooks and metadata. Here the
graph itself is copied.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import keyword
import pickle
import secrets
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, PythonCode

from mpcompile.errors import GraphError
from mpcompile.ir.isolation import tensors_of
from mpcompile.ir.parts import FOLDED, attribute, read_tensor, rows_within, whole_of
from mpcompile.kernels import ops, schema
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedConv2d, MaskedLinear

if TYPE_CHECKING:
    from mpcompile.plan import Plan

_PLAN, _LOCK = "mpcompile.plan", "mpcompile.training"
_DERIVED = ("_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec", "_tracer_cls", "shape_env")
_CLASSES: weakref.WeakValueDictionary[str, type[IRModule]] = weakref.WeakValueDictionary()
_PROCESS, _COUNTER = secrets.token_hex(8), itertools.count()
_LIVE: weakref.WeakSet[IRModule] = weakref.WeakSet()


class IRModule(fx.GraphModule):
    """A trainable GraphModule that carries its Plan: the result of :func:`mpcompile.transform`.

    Pickling drops only the shapes on the nodes. A module that is unpickled gets the class of the pickled one if that
    class still exists in this process.
    """

    _made_of: ClassVar[Any] = None  # everything that the generated code depends on
    _made_as: ClassVar[str] = ""  # identifies the class in this process

    def __new__(cls, *args: Any, **kwargs: Any) -> IRModule:
        self: IRModule = super().__new__(cls, *args, **kwargs)  # deep copies call only this
        _LIVE.add(self)
        return self

    @property
    def plan(self) -> Plan:
        """The decisions of every pass, per layer."""
        plan = self.meta.get(_PLAN)
        if plan is None:
            raise GraphError("this graph has no plan yet", hint="make it with mpcompile.transform")
        return plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.meta[_PLAN] = plan

    @property
    def locked_mode(self) -> bool | None:
        """The one training flag that the graph was captured with, or None if it follows ``train()`` and ``eval()``."""
        return self.meta.get(_LOCK)

    @locked_mode.setter
    def locked_mode(self, training: bool | None) -> None:
        self.meta[_LOCK] = training

    def train(self, mode: bool = True) -> IRModule:
        locked = self.meta.get(_LOCK) if "meta" in self.__dict__ else None
        if locked is not None and locked != mode:
            here, there = ("train", "eval") if locked else ("eval", "train")
            raise GraphError(
                "the traced module takes different paths in train() and eval()",
                expected=f"use in {here}() mode, the one that it was captured in",
                found=f"{there}()",
                hint=f"call .{there}() on the original before it is captured (by mpcompile.transform or torch.export), "
                "or set locked_mode = None if the model computes the same in both modes",
            )
        super().train(mode)
        return self

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the buffers without the masks, which AveragedModel would average as if they were numbers."""
        masks = {id(mask) for _, mask, _ in masked(self)} if recurse else set()
        return (buffer for buffer in super().buffers(recurse) if id(buffer) not in masks)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load a state dict. That of the dense model has no masks, and leaves the masks of functional weights as is."""
        for node in self.graph.nodes:
            masked_args = schema.try_bind(node) if node.target in ops.MASKED else None
            source = None if masked_args is None else masked_args.mask
            mask = whole_of(source) if isinstance(source, fx.Node) else None
            if mask is not None and mask.op == "get_attr":
                path = str(mask.target)
                state_dict.setdefault(prefix + path, attribute(self, path))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def recompile(self) -> PythonCode:
        """Compile the graph into a new class, so that no existing class ever changes."""
        fresh: Any = types.new_class("GraphModuleImpl", (IRModule,))
        fresh.__name__, fresh.__module__ = type(self).__name__, fx.GraphModule.__module__
        self.__class__ = fresh
        with _any_names([str(n.target) for n in self._graph.nodes if n.op in ("call_module", "get_attr")]):
            code = super().recompile()
        named = frozenset((n, v if isinstance(v, str) else id(v)) for n, v in code.globals.items())
        fresh._made_of = (fresh.__name__, self._code, named)
        fresh._made_as = f"{_PROCESS}-{next(_COUNTER)}"
        _CLASSES[fresh._made_as] = fresh
        return code

    def __reduce__(self) -> tuple[Any, ...]:
        from mpcompile.artifact.structures import picklable

        codegen = None if type(self._graph._codegen) is CodeGen else picklable(self._graph._codegen)
        records = [_NodeRecord.of(node) for node in self._graph.nodes]
        return _unpickled, (type(self).__name__, type(self)._made_as, self._kept(), records, codegen)

    def __deepcopy__(self, memo: dict[int, Any]) -> IRModule:
        # Old-style reparametrisation stores the computed weight, which deepcopy refuses; each call recomputes it.
        memo |= {id(t): t.detach().clone() for t in tensors_of(self) if not t.is_leaf and id(t) not in memo}
        twin = memo[id(self)] = IRModule(nn.Module(), fx.Graph(), class_name=type(self).__name__)
        twin.__dict__.update(copy.deepcopy(self._kept(), memo))
        twin.graph = copy.deepcopy(self._graph, memo)
        return twin

    def __copy__(self) -> IRModule:
        twin = IRModule(nn.Module(), fx.Graph(), class_name=type(self).__name__)
        twin.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in self._kept().items()})
        twin.graph = copy.deepcopy(self._graph)
        return twin

    def _kept(self) -> dict[str, Any]:
        """Return the attributes that are not derived from the graph."""
        return {key: value for key, value in self.__dict__.items() if key not in _DERIVED}


@dataclass
class Lifted:
    """Parameters that are inputs of a dynamo graph, and their dotted names, by placeholder name; else empty."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


@dataclass
class Imported:
    """An owned graph, the example inputs that give its shapes (one per placeholder), and its lifted parameters.

    Attributes:
        notes: remarks for the plan.
        captured: how the graph was made, such as ``"torch.export, strict, batch free"``.
    """

    gm: IRModule
    inputs: list[Any]
    lifted: Lifted
    notes: list[str]
    captured: str = ""


# Names that the root of a transformed module uses, besides those of any nn.Module.
RESERVED = frozenset(
    {"meta", "shape_env", "packed", FOLDED, "_owned", "_graph", "_code", "_in_spec", "_out_spec", "_lineno_map"}
    | {"_prologue_start", "_tracer_cls", "_tracer_extras", "_wrapped_call"}
    | {"_replace_hooks", "_create_node_hooks", "_erase_node_hooks", "_deepcopy_hooks"}
    | (set(dir(IRModule)) - set(dir(nn.Module)))
)


@contextlib.contextmanager
def _any_names(targets: list[str]) -> Iterator[None]:
    """Let fx generate source for names that are not identifiers: keywords, and text with quotes."""
    names = {atom for target in targets for atom in target.split(".")}
    if all(name.isidentifier() and name.isascii() and not keyword.iskeyword(name) for name in names):
        yield
        return
    before = torch.fx.graph._format_target

    def spelt(base: str, target: str) -> str:
        for name in target.split("."):
            plain = name.isidentifier() and name.isascii() and not keyword.iskeyword(name)
            base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
        return base

    torch.fx.graph._format_target = spelt
    try:
        yield
    finally:
        torch.fx.graph._format_target = before


@dataclass(frozen=True)
class _Reference:
    """A node in pickled arguments, or a function that artifacts may hold as a pickled target."""

    name: str


@dataclass(frozen=True)
class _NodeRecord:
    """A node in a form that can be pickled: functions that artifacts may hold by their names there, others as is."""

    op: str
    name: str
    target: Any
    args: Any
    kwargs: Any
    type: Any

    @classmethod
    def of(cls, node: fx.Node) -> _NodeRecord:
        from mpcompile.artifact.opset import function_name
        from mpcompile.artifact.structures import picklable_class

        target: Any = node.target
        if isinstance(target, type):
            target = picklable_class(target)
        elif node.op == "call_function":
            if isinstance(target, torch._ops.OpOverload):
                target = (target.namespace, *target._schema.name.split("::")[1:], target._overloadname)
            else:
                target = _Reference(name) if (name := function_name(target)) else target
        refer: Any = lambda n: _Reference(n.name)  # noqa: E731
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), refer)
        kind = node.type
        try:
            pickle.dumps(kind)
        except Exception:  # an annotation with a class that is local to a function
            kind = None
        return cls(node.op, node.name, target, args, kwargs, kind)

    def create(self, graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        from mpcompile.artifact.opset import function_of

        target = self.target
        if isinstance(target, tuple):
            target = functools.reduce(getattr, target, torch.ops)
        elif isinstance(target, _Reference):
            target = function_of(target.name)
        args, kwargs = fx.node.map_aggregate(
            (self.args, self.kwargs), lambda v: nodes[v.name] if isinstance(v, _Reference) else v
        )
        nodes[self.name] = graph.create_node(self.op, target, args, kwargs, self.name, self.type)


def _unpickled(name: str, token: str, state: dict[str, Any], records: list[_NodeRecord], codegen: Any) -> IRModule:
    """Inverse of :meth:`IRModule.__reduce__`."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for record in records:
        record.create(graph, nodes)
    if codegen is not None:
        graph.set_codegen(codegen)
    gm = IRModule(nn.Module(), fx.Graph(), class_name=name)
    gm.__dict__.update(state)
    gm.graph = graph
    known = _CLASSES.get(token)
    if known is not None and known._made_of == type(gm)._made_of:
        gm.__class__ = known
    return gm


def _whole_pair(gm: fx.GraphModule, weight: Any, mask: Any) -> tuple[Any, Any]:
    """Return the nodes that read a weight and its mask as wholes if both operands are the same rows of them."""
    wholes = [whole_of(node) if isinstance(node, fx.Node) else None for node in (weight, mask)]
    tensors = [read_tensor(gm, whole) for whole in wholes]
    if any(tensor is None for tensor in tensors) or len({len(tensor) for tensor in tensors if tensor is not None}) > 1:
        return weight, mask
    rows = [
        rows_within(node, len(tensor))
        for node, tensor in zip((weight, mask), tensors, strict=True)
        if tensor is not None
    ]
    return (wholes[0], wholes[1]) if rows[0] is not None and rows[0] == rows[1] else (weight, mask)


def owned_by_transformed(tensors: Iterable[Tensor]) -> bool:
    """Return True if any of these parameters belongs to a module with a plan.

    A graph that dynamo captures from such a module carries no plan; without masks or merges, nothing else shows it.
    """
    wanted = {id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)}
    return any(id(p) in wanted for gm in list(_LIVE) if _PLAN in gm.__dict__.get("meta", ()) for p in gm.parameters())


def masked(gm: IRModule) -> Iterator[tuple[Tensor, Tensor, Pattern]]:
    """Yield (weight, mask, pattern) of every masked layer and every call of a masked operator.

    Calls on the same rows of a weight and of its mask yield both as a whole. Where rows have a mask of their own, the
    weight is these rows, which share the memory of the parameter.
    """
    for module in gm.modules():
        if isinstance(module, (MaskedLinear, MaskedConv2d)):
            yield module.weight, module.mask, module.pattern
    for node in gm.graph.nodes:
        args = schema.try_bind(node) if node.target in ops.MASKED else None
        if args is not None:
            weight, mask = (read_tensor(gm, source) for source in _whole_pair(gm, args.weight, args.mask))
            if weight is not None and mask is not None:
                yield weight, mask, Pattern(args.n, args.m)
