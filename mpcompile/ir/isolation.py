"""Protect a user's objects while their code runs on proxies of a trace or on fake tensors.

A forward or a hook may write anywhere: into attributes of modules, lists, dicts in its closure, globals, class
attributes. :func:`untouched` restores all of these. Functions that were set on an instance (a patched forward, a hook)
may hold parts of the original model: :func:`rebind` gives its copy functions that hold the copied parts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_MOST = 100_000  # limit on visited objects: an attribute may lead to a whole training program
_LIBRARIES = frozenset({*sys.stdlib_module_names, "torch", "numpy", "mpcompile"} - {"__main__"})
_PLAIN = (str, bytes, int, float, complex, bool, type(None), Tensor, ModuleType, torch.dtype, torch.device)
_NO_CELL = object()


def _of_library(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).partition(".")[0] in _LIBRARIES


def _names(code: CodeType) -> set[str]:
    """Return the names of globals and attributes that a function, or one inside it, mentions."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


class _Snapshot:
    """The contents of every container that is reachable from some objects, and functions that restore them."""

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # holds the objects, so that no id is reused

    def take(self, *roots: Any) -> None:
        stack = list(roots)
        while stack and len(self._seen) < _MOST:
            value = stack.pop()
            if isinstance(value, _PLAIN) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            stack.extend(self._parts(value))

    def _parts(self, value: Any) -> list[Any]:
        """Return the objects that an object refers to, and record its contents."""
        if isinstance(value, dict):
            return self._dict(value)
        if isinstance(value, (list, set, deque)):
            return self._collection(value)
        if isinstance(value, (tuple, frozenset)):
            return list(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return [value.__self__, value.__func__]
        if isinstance(value, functools.partial):
            return [value.func, value.args, value.keywords]
        if isinstance(value, type):
            return [] if _of_library(value) else self._class(value)
        if isinstance(value, nn.Module) or not _of_library(type(value)):
            attributes = getattr(value, "__dict__", None)
            return [type(value)] if not isinstance(attributes, dict) else [type(value), attributes]
        return []

    def _dict(self, value: dict[Any, Any]) -> list[Any]:
        before = dict(dict.items(value))  # a subclass may make a new object at every read

        def restore() -> None:
            now = dict(dict.items(value))
            if len(now) != len(before) or any(now.get(k, before) is not v for k, v in before.items()):
                value.clear()
                value.update(before)

        self.undo.append(restore)
        return list(before.values())

    def _collection(self, value: Any) -> list[Any]:
        before = list(value)

        def restore() -> None:
            if len(value) != len(before) or any(a is not b for a, b in zip(value, before, strict=True)):
                value.clear()
                value.update(before) if isinstance(value, set) else value.extend(before)

        self.undo.append(restore)
        return before

    def _function(self, function: FunctionType) -> list[Any]:
        parts: list[Any] = [function.__defaults__, function.__kwdefaults__, function.__dict__]
        for cell in function.__closure__ or ():
            parts.append(self._cell(cell))
        if _of_library(function):
            return parts
        for name in _names(function.__code__):
            if name in function.__globals__:
                parts.append(self._global(function.__globals__, name))
        return parts

    def _cell(self, cell: CellType) -> Any:
        try:
            before = cell.cell_contents
        except ValueError:  # still empty
            return None

        def restore() -> None:
            cell.cell_contents = before

        self.undo.append(restore)
        return before

    def _global(self, table: dict[str, Any], name: str) -> Any:
        before = table[name]

        def restore() -> None:
            table[name] = before

        if not isinstance(before, (FunctionType, type, ModuleType)):
            self.undo.append(restore)
        return before

    def _class(self, cls: type) -> list[Any]:
        before = dict(vars(cls))

        def restore() -> None:
            now: MappingProxyType[str, Any] = vars(cls)
            for name in [name for name in now if name not in before]:
                delattr(cls, name)
            for name, value in before.items():
                if now.get(name, before) is not value:
                    setattr(cls, name, value)

        self.undo.append(restore)
        values = [v.fget if isinstance(v, property) else getattr(v, "__func__", v) for v in before.values()]
        return [*values, *cls.__bases__]


@contextlib.contextmanager
def untouched(*roots: Any) -> Iterator[None]:
    """Restore the containers, modules, closures, globals and classes reachable from ``roots`` at the end.

    Tensors are not copied: values written into one stay.

    Example:
        >>> seen = []
        >>> with untouched(seen):
        ...     seen.append(1)
        >>> seen
        []
    """
    snapshot = _Snapshot()
    snapshot.take(*roots)
    try:
        yield
    finally:
        for restore in reversed(snapshot.undo):
            with contextlib.suppress(AttributeError, TypeError, RuntimeError):  # it has become read-only
                restore()


def rebind(value: Any, memo: Mapping[int, Any]) -> Any:
    """Return ``value`` with parts of the original model replaced by those of its copy, or ``value`` if it holds none.

    Args:
        value: any attribute of an instance: a function, a method, a partial, or anything in their closures.
        memo: the memo of the :func:`copy.deepcopy` that made the copy: id of an original -> its copy.
    """
    return _Rebinding(memo).of(value)


class _Rebinding:
    def __init__(self, memo: Mapping[int, Any]) -> None:
        self.memo = memo
        self.done: dict[int, Any] = {}
        self.held: list[Any] = []  # keeps temporary objects, such as methods, alive: no id may be reused

    def of(self, value: Any) -> Any:
        if isinstance(value, (nn.Module, Tensor)):
            return self.memo.get(id(value), value)
        if id(value) in self.done:
            return self.done[id(value)]
        self.held.append(value)
        self.done[id(value)] = value  # for functions that refer to themselves
        self.done[id(value)] = result = self._of(value)
        return result

    def _of(self, value: Any) -> Any:
        if isinstance(value, MethodType):
            owner, function = self.of(value.__self__), self.of(value.__func__)
            return value if owner is value.__self__ and function is value.__func__ else MethodType(function, owner)
        if isinstance(value, functools.partial):
            parts = [self.of(value.func), self.of(value.args), self.of(value.keywords)]
            if all(a is b for a, b in zip(parts, (value.func, value.args, value.keywords), strict=True)):
                return value
            twin = functools.partial(parts[0], *parts[1], **parts[2])
            twin.__dict__.update(value.__dict__)
            return twin
        if isinstance(value, FunctionType):
            return self._function(value)
        if type(value) in (list, tuple, set):
            items = [self.of(item) for item in value]
            return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
        if type(value) is dict:
            table = {key: self.of(item) for key, item in value.items()}
            return value if all(table[key] is value[key] for key in value) else table
        held = getattr(value, "__dict__", None)
        if not isinstance(held, dict) or isinstance(value, type) or _of_library(type(value)):
            return value
        return copy.deepcopy(value, dict(self.memo)) if any(id(v) in self.memo for v in held.values()) else value

    def _function(self, function: FunctionType) -> Any:
        if "_torchdynamo_orig_callable" in function.__dict__:  # a compiled function computes the same as the plain one
            return self.of(function.__dict__["_torchdynamo_orig_callable"])
        closure = function.__closure__ or ()
        cells = [cell.cell_contents if _filled(cell) else _NO_CELL for cell in closure]
        parts = [self.of(item) for item in (*cells, function.__defaults__, function.__kwdefaults__)]
        changed = any(a is not b for a, b in zip(parts, (*cells, *_defaults(function)), strict=True))
        table = {}
        if not _of_library(function):
            named = {n: function.__globals__[n] for n in _names(function.__code__) if n in function.__globals__}
            table = {n: twin for n, v in named.items() if (twin := self.of(v)) is not v}
        if not changed and not table:
            return function
        *held, defaults, keyword_defaults = parts
        new_cells = tuple(c if h is _NO_CELL else CellType(h) for c, h in zip(closure, held, strict=True))
        names = {**function.__globals__, **table} if table else function.__globals__
        twin = FunctionType(function.__code__, names, function.__name__, defaults, new_cells or None)
        twin.__kwdefaults__ = keyword_defaults
        twin.__dict__.update(function.__dict__)
        return twin


def _filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not _NO_CELL
    except ValueError:
        return False


def _defaults(function: FunctionType) -> tuple[Any, Any]:
    return function.__defaults__, function.__kwdefaults__


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor of a model: parameters, buffers, attributes, and the contents of lists and dicts in these."""
    for module in model.modules():
        stack: list[Any] = [vars(module)]
        while stack:
            value = stack.pop()
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)) and len(value) < _MOST:
                stack.extend(value)
            elif isinstance(value, dict) and len(value) < _MOST:
                stack.extend(v for v in value.values() if isinstance(v, (Tensor, list, tuple, dict)))


_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def called(hook: Any) -> str:
    """Return the name of a hook, for a message."""
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def of_torch(hook: Any) -> bool:
    """Return True if a hook is torch's own, such as those of its counters and profilers."""
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def global_hooks() -> list[str]:
    """Return the names of hooks on every module of the process, except torch's own."""
    hooks = [hook for table in _GLOBAL_HOOKS for hook in getattr(torch_module, table).values()]
    return [called(hook) for hook in hooks if not of_torch(hook)]


@contextlib.contextmanager
def without_global_hooks() -> Iterator[None]:
    """Disable the hooks on every module of the process, and restore them at the end."""
    before = {table: getattr(torch_module, table) for table in _GLOBAL_HOOKS}
    for table in before:
        setattr(torch_module, table, OrderedDict())
    try:
        yield
    finally:
        for table, hooks in before.items():
            setattr(torch_module, table, hooks)


@contextlib.contextmanager
def generators_kept() -> Iterator[list[bool]]:
    """Restore random generators at the end; the yielded list then says whether torch's generator was used."""
    drew: list[bool] = []
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        before = torch.get_rng_state()
        try:
            yield drew
        finally:
            drew.append(not torch.equal(before, torch.get_rng_state()))
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])
