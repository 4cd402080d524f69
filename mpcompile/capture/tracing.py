"""Symbolic tracing of a module as it runs when called: with its hooks, and with any forward set on the instance.

The tracer records a leaf module as one call, and enters all others. Forward hooks of an entered module are traced like
the code around them. A hook that returns nothing and writes to nothing has no effect on the result: its nodes are
removed from the graph. Hooks of a leaf stay on the leaf.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

from mpcompile.capture.attention import is_attention
from mpcompile.errors import MPCompileError, TraceError, summary
from mpcompile.ir.effects import AUGMENTED, UNDECIDED, known
from mpcompile.ir.isolation import called
from mpcompile.layers import ByMode, InputGuard, MaskedConv2d, MaskedLinear

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
_TAKEN = ("self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree")  # names in generated source
_REMOVE = "remove the hook first (handle.remove()), and register it on the result"


class _Proxy(Proxy):
    """Record ``h += 1`` as an in-place write. fx records ``h = h + 1``, which other names of ``h`` would not see."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            raise TypeError("an assignment to tensor.data cannot be recorded in a graph")
        super().__setattr__(name, value)


def _in_place(target: Callable[..., Any]) -> Callable[[Proxy, Any], Proxy]:
    def method(self: Proxy, other: Any) -> Proxy:
        result = self.tracer.create_proxy("call_function", target, (self, other), {})
        result.node.meta[UNDECIDED] = True
        return result

    return method


for _target in AUGMENTED:
    setattr(_Proxy, f"__{_target.__name__}__", _in_place(_target))


def replaced_forward(module: nn.Module) -> bool:
    """Return True if a patched forward runs: one set on the instance, or on a class of torch.nn."""
    if "forward" in vars(module):
        return True
    for cls in type(module).__mro__:
        if "forward" in vars(cls):
            home = str(getattr(vars(cls)["forward"], "__globals__", {}).get("__name__", cls.__module__))
            return cls.__module__.startswith("torch.") and not home.startswith("torch.")
    return False


def _reads_training(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


def _writes(node: fx.Node) -> bool:
    """Return True if a node changes an existing value."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    in_place = name.endswith("_") and not name.endswith("__")
    requested = "out" in node.kwargs or node.kwargs.get("inplace") is True
    return in_place or name == "setitem" or node.target in AUGMENTED or requested


def backward_hooks(module: nn.Module, path: str) -> TraceError:
    """Return the error for a module whose backward hooks a graph of operators would lose."""
    return TraceError(f"{type(module).__name__} has backward hooks", layer=path or None, hint=_REMOVE, final=True)


class Tracer(fx.Tracer):
    """A tracer whose leaves are torch.nn modules, masked layers, and modules that read ``self.training``.

    Two kinds of these are entered nevertheless: modules that read the flag but hold layers to mask (attention with its
    ``dropout_p``), for which the traces of both modes are compared instead, and modules with a patched forward.

    Args:
        given: number of positional inputs.
        keywords: names of the inputs that are passed by keyword.
        fixed: parameters of forward that stay at their defaults.
        written: buffers that forward writes into: each read of them becomes a node.

    Attributes:
        silent: paths of modules with hooks that return nothing.
        failed: path and class of the innermost module that raised.
    """

    def __init__(
        self, given: int = 0, keywords: Sequence[str] = (), fixed: Sequence[str] = (), written: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.given, self.keywords, self.fixed, self.written = given, keywords, set(fixed), set(written)
        self.silent: list[str] = []
        self.failed: tuple[str, str] | None = None
        self.idle: set[fx.Node] = set()  # nodes recorded by hooks that returned nothing

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace as fx does, but refuse a region under autocast, which leaves no node and would be lost.

        Raises:
            TraceError: forward enters autocast.
        """
        region = torch.autocast

        def enter(context: torch.autocast) -> torch.autocast:
            if context._enabled:
                raise TraceError(
                    f"forward enters autocast ({context.device}, {context.fast_dtype}), which a trace would lose",
                    hint="put autocast around the call, or pass torch.export.export(model, inputs).module()",
                )
            return before(context)

        before = region.__enter__
        region.__enter__ = enter  # type: ignore[method-assign]
        try:
            return super().trace(root, concrete_args)
        finally:
            region.__enter__ = before  # type: ignore[method-assign]

    def proxy(self, node: fx.Node) -> Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if replaced_forward(m):
            return False
        own = (MaskedLinear, MaskedConv2d, ByMode, InputGuard)
        if super().is_leaf_module(m, module_qualified_name) or isinstance(m, own):
            return True
        if is_attention(m):  # a subclass: its functional form replaces the call afterwards
            return True
        weighted = any(isinstance(child, (nn.Linear, nn.Conv2d)) for child in m.modules())
        return _reads_training(m) and not weighted

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Create inputs from the signature of the forward that runs, and a call of the root that runs its hooks."""
        for name in _TAKEN:
            self.graph._graph_namespace.create_name(name, None)
        positional: list[Any] = []
        named: dict[str, Any] = {}
        left_out = False
        kinds = inspect.Parameter
        parameters = list(inspect.signature(self.root.forward).parameters.values())
        known = {p.name for p in parameters}
        for place, parameter in enumerate(parameters):
            if parameter.kind is kinds.VAR_POSITIONAL:
                rest = max(0, self.given - place)
                positional += [self._input(f"{parameter.name}_{i}", parameter) for i in range(rest)]
            elif parameter.kind is kinds.VAR_KEYWORD:
                named |= {name: self._input(name, parameter) for name in self.keywords if name not in known}
            elif parameter.name in self.fixed:
                left_out = True
            elif left_out or parameter.kind is kinds.KEYWORD_ONLY:
                named[parameter.name] = self._input(parameter.name, parameter)
            else:
                positional.append(self._input(parameter.name, parameter))

        def call(root: nn.Module) -> Any:
            return root(*positional, **named)

        call.__annotations__ = {}  # fx would copy them into the generated source
        return call, [self.root]

    def _input(self, name: str, parameter: inspect.Parameter) -> Proxy:
        default = () if parameter.default is parameter.empty else (parameter.default,)
        annotation = None if parameter.annotation is parameter.empty else parameter.annotation
        return self.create_proxy("placeholder", name, default, {}, type_expr=annotation)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> Proxy:
        """Record a call. A function that ``torch.fx.wrap`` would keep whole is entered if it takes weights.

        It stays whole if it cannot be traced; :func:`mpcompile.ir.view.unsupported` then reports its weights.
        """
        if kind == "call_function" and not known(target) and self._takes_weights((args, kwargs)):
            before = set(self.graph.nodes)
            with contextlib.suppress(Exception):
                result = target(*args, **kwargs)
                if isinstance(result, Proxy):  # fx marks its node
                    return result
            for node in reversed([n for n in self.graph.nodes if n not in before]):
                self.graph.erase_node(node)
        return super().create_proxy(kind, target, args, kwargs, *rest, **options)

    def _takes_weights(self, values: Any) -> bool:
        names = {v.node.target for v in pytree.tree_leaves(values) if isinstance(v, Proxy) and v.node.op == "get_attr"}
        return any(name in names and weight.dim() >= 2 for name, weight in self.root.named_parameters())

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        if self.written and isinstance(attr_val, Tensor):
            for name, buffer in self.root.named_buffers():
                if buffer is attr_val and name in self.written:
                    if name not in parameter_proxy_cache:
                        parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = "" if m is self.root else self.path_of_module(m)
        leaf = m is not self.root and self.is_leaf_module(m, path)
        if not leaf and any(getattr(m, table) for table in _BACKWARD):
            raise backward_hooks(m, path)
        try:
            if leaf:  # its hooks stay on it, and run when the graph does
                return super().call_module(m, forward, args, kwargs)
            with self._hooks(m, path):
                return forward(*args, **kwargs) if m is self.root else super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or (path, type(m).__name__)
            raise

    @contextlib.contextmanager
    def _hooks(self, module: nn.Module, path: str) -> Iterator[None]:
        """Record the nodes of a module's hooks while it is traced."""
        before = {table: getattr(module, table) for table in _HOOKS}
        for table, hooks in before.items():
            if hooks:
                setattr(module, table, OrderedDict((key, self._watched(h, path)) for key, h in hooks.items()))
        try:
            yield
        finally:
            for table, hooks in before.items():
                setattr(module, table, hooks)

    def _watched(self, hook: Callable[..., Any], path: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = len(self.graph.nodes)
            try:
                result = hook(*args)
            except MPCompileError:
                raise
            except Exception as error:
                text = f"the forward hook {called(hook)} cannot be traced: {summary(error)}"
                raise TraceError(text, layer=path or type(self.root).__name__, hint=_REMOVE) from error
            if result is None:
                self.silent.append(path)
                self.idle |= set(list(self.graph.nodes)[start:])
            return result

        return run

    def prune(self) -> None:
        """Erase the nodes of hooks that return nothing, except those that are used or write to a tensor."""
        for node in reversed(list(self.graph.nodes)):
            if node in self.idle and not node.users and not _writes(node):
                self.graph.erase_node(node)
