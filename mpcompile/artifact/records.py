"""Classes of structured outputs: found where they are at hand, else replaced by one of the same fields.

A file names the classes of the namedtuples and dataclasses that a graph takes and returns. Names in a file are not to
be trusted: a class is used only if it is a plain namedtuple of the same fields that this process holds already, if it
is a dataclass that was registered for trees (pytree), or if it is an output class of transformers, which is imported.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import logging
import re
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from mpcompile.io.messages import warn_once

log = logging.getLogger(__name__)

# Modules of transformers that define its outputs. No other module is imported because a file names it.
_TRANSFORMERS = re.compile(r"transformers\.(modeling_outputs|models\.[a-z0-9_]+\.modeling_[a-z0-9_]+)")
_MADE = re.compile(r"(tuple|outputs)\(([A-Za-z0-9_/]+):((?: [A-Za-z0-9_]+)*)\)")


class Outputs(dict[str, Any]):
    """A mapping that stands for a dataclass which is not at hand, such as an output of transformers.

    It is read as the original: by key, by attribute, by number and as a tuple. Fields that are None are not among its
    keys; as attributes they are None. Its classes come from :func:`outputs_class`.

    Example:
        >>> out = outputs_class("transformers.modeling_outputs.Result", ("logits", "states"))(logits=3)
        >>> out["logits"], out.logits, out[0], out.to_tuple(), out.states
        (3, 3, 3, (3,), None)
    """

    _origin: str = ""
    _all: tuple[str, ...] = ()

    def __init__(self, *values: Any, **named: Any) -> None:
        given = {**dict(zip(self._all, values, strict=False)), **named}
        super().__init__({name: value for name, value in given.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in type(self)._all:
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the values that are not None, in the order of the fields."""
        return tuple(self.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.items())})"


def outputs_class(origin: str, fields: Iterable[str]) -> type[Outputs]:
    """Return the class of mappings that stand for the class ``origin`` with these fields; it is registered for trees.

    Args:
        origin: module and name of the original class, joined by a dot.
        fields: all fields of the original, in order.
    """
    return _outputs_class(origin, tuple(fields))


@functools.cache
def _outputs_class(origin: str, fields: tuple[str, ...]) -> type[Any]:
    title = _title("outputs", origin, fields)
    members = {"_origin": origin, "_all": fields, "__module__": __name__, "__qualname__": title}
    cls: Any = type(origin.rpartition(".")[2], (Outputs,), members)
    pytree.register_pytree_node(
        cls,
        lambda value: (list(value.values()), list(value)),
        lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
        serialized_type_name=f"{__name__}.{title}",
        flatten_with_keys_fn=lambda value: ([(pytree.MappingKey(k), v) for k, v in value.items()], list(value)),
    )
    fx_pytree.register_pytree_flatten_spec(cls, lambda value, spec: [value[key] for key in spec.context])
    return cls


def tuple_class(origin: str, fields: Iterable[str]) -> type[Any]:
    """Return the namedtuple class ``origin`` if this process holds it with these fields, else a new one like it.

    Example:
        >>> tuple_class("nowhere.Pair", ("logits", "features"))(1, 2)
        Pair(logits=1, features=2)
    """
    fields = tuple(fields)
    return _namedtuple_at_hand(origin, fields) or _made_tuple(origin, fields)


@functools.cache
def _made_tuple(origin: str, fields: tuple[str, ...]) -> type[Any]:
    make: Any = collections.namedtuple
    cls = make(origin.rpartition(".")[2], fields, module=__name__)
    cls._origin, cls.__qualname__ = origin, _title("tuple", origin, fields)
    return cls


def _title(kind: str, origin: str, fields: Iterable[str]) -> str:
    """Return the name under which pickle finds a class that this module makes."""
    return f"{kind}({origin.replace('.', '/')}:{''.join(f' {name}' for name in fields)})"


def _namedtuple_at_hand(origin: str, fields: tuple[str, ...]) -> type[Any] | None:
    """Return a namedtuple class of a module that is imported; it must not run code of its own when it is made."""
    atoms = origin.split(".")
    for count in range(len(atoms) - 1, 0, -1):
        module = sys.modules.get(".".join(atoms[:count]))
        if not isinstance(module, ModuleType):
            continue
        value: Any = module
        for atom in atoms[count:]:
            value = vars(value).get(atom) if isinstance(value, (ModuleType, type)) else None
        if not isinstance(value, type) or getattr(value, "_fields", None) != fields:
            return None
        plain = [base for base in value.__mro__ if base.__bases__ == (tuple,)]
        inherited = not any("__init__" in vars(base) for base in value.__mro__[:-2])  # the last two: tuple and object
        return value if plain and inherited and value.__new__ is plain[0].__new__ else None
    return None


def record_class(origin: str, fields: Iterable[str]) -> type[Any]:
    """Return the dataclass ``origin`` if it is at hand with at least these fields, else its :func:`outputs_class`.

    It is at hand if it is registered for trees, which the classes of transformers are when they are imported. One of
    those is imported, where transformers is installed. Anything else is told once.
    """
    fields = tuple(fields)
    found = _registered(origin) or _of_transformers(origin)
    if found is not None and {field.name for field in dataclasses.fields(found)} >= set(fields):
        return found
    why = "transformers is not installed, or has no such class"
    if not origin.startswith("transformers."):
        why = "import its module, and register it with torch.export.register_dataclass"
    warn_once(log, f"{origin} is not at hand ({why}): a mapping with the same keys and attributes takes its place")
    return outputs_class(origin, fields)


def _registered(origin: str) -> type[Any] | None:
    for cls in pytree.SUPPORTED_NODES:
        if dataclasses.is_dataclass(cls) and f"{cls.__module__}.{cls.__qualname__}" == origin:
            return cls
    return None


def _of_transformers(origin: str) -> type[Any] | None:
    """Return an output class of transformers; None if it is not installed or has none of that name."""
    home, _, name = origin.rpartition(".")
    if not _TRANSFORMERS.fullmatch(home):
        return None
    try:
        base = importlib.import_module("transformers.utils").ModelOutput
        cls = vars(importlib.import_module(home)).get(name)
    except Exception as error:  # whatever an installation that is missing or broken raises
        log.debug("%s cannot be imported: %s", home, error)
        return None
    return cls if isinstance(cls, type) and issubclass(cls, base) and dataclasses.is_dataclass(cls) else None


def origin_of(cls: type[Any]) -> str:
    """Return module and name of a class, as a file names it: those of the original for a class of this module."""
    if cls.__module__ == __name__:
        return str(vars(cls)["_origin"])
    return f"{cls.__module__}.{cls.__qualname__.rpartition('<locals>.')[2]}"


def fields_of(cls: type[Any]) -> tuple[str, ...]:
    """Return the fields of a namedtuple, a dataclass, or a class of :func:`outputs_class`."""
    if issubclass(cls, Outputs):
        return cls._all
    return tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else cls._fields


def __getattr__(name: str) -> Any:
    """Return a class that this module makes, by the name under which pickle looks it up."""
    match = _MADE.fullmatch(name)
    if match is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind, origin, fields = match[1], match[2].replace("/", "."), match[3].split()
    return _made_tuple(origin, tuple(fields)) if kind == "tuple" else outputs_class(origin, fields)
