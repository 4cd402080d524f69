"""Trees of inputs and outputs in a file, and the classes that a graph calls to make them: JSON, checked when read.

A leaf is 0, a list a list; the rest is tagged: ``tuple``, ``dict``, ``ordered`` (OrderedDict), ``namedtuple``,
``returned`` (a class of torch.return_types) and ``record`` (a dataclass or an output of transformers). records.py says
which classes a name in a file may stand for.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from mpcompile.artifact.opset import Refusal, identifier, keyword_name, shown
from mpcompile.artifact.records import Outputs, fields_of, origin_of, record_class, tuple_class

_MAX_DEPTH, _MAX_FIELDS, _MAX_NAME = 32, 1000, 1024
_LEAF = pytree.tree_structure(0)


# --- Trees ---


def encode_spec(spec: pytree.TreeSpec, depth: int = 0) -> Any:
    """Return the structure of inputs or outputs as JSON.

    Raises:
        Refusal: it holds a type that a file cannot hold, or more than 32 levels.

    Example:
        >>> encode_spec(pytree.tree_structure({"logits": 1, "states": (2, [3])}))
        {'dict': {'logits': 0, 'states': {'tuple': [0, [0]]}}}
    """
    _check_depth(depth)
    if spec.is_leaf():
        return 0
    kind, context = spec.type, spec.context
    parts = [encode_spec(child, depth + 1) for child in spec.children()]
    if kind is list:
        return parts
    if kind is tuple:
        return {"tuple": parts}
    if kind in (dict, OrderedDict) and all(type(key) is str for key in context):
        return {"dict" if kind is dict else "ordered": dict(zip(context, parts, strict=True))}
    if kind is namedtuple:
        return {"namedtuple": _named(context, context._fields, parts)}
    if kind.__module__ == "torch.return_types":
        return {"returned": {"name": kind.__name__, "items": parts}}
    keys = _keys(kind, context)
    if keys is None:
        raise Refusal("inputs or outputs are of a type that a file cannot hold", found=shown(kind))
    return {"record": {**_named(kind, keys, parts), "all": list(fields_of(kind))}}


def _keys(kind: Any, context: Any) -> list[str] | None:
    """Return the fields of a record that are not None, from its context in a tree; None for other types."""
    if not dataclasses.is_dataclass(kind) and not issubclass(kind, Outputs):
        return None
    if not issubclass(kind, dict) and isinstance(context, list) and len(context) == 2:
        context = context[0]  # pytree.register_dataclass; the rest are the fields that are None
    plain = isinstance(context, list) and all(type(key) is str for key in context)
    return context if plain else None


def _named(cls: type[Any], keys: Sequence[str], parts: Sequence[Any]) -> dict[str, Any]:
    return {"class": origin_of(cls), "fields": dict(zip(keys, parts, strict=True))}


def decode_spec(value: Any, depth: int = 0) -> pytree.TreeSpec:
    """Return the structure that :func:`encode_spec` wrote.

    Raises:
        Refusal: malformed content, or more than 32 levels.
    """
    _check_depth(depth)
    if value == 0 and type(value) is int:
        return _LEAF
    if isinstance(value, list):
        return pytree.TreeSpec(list, None, [decode_spec(part, depth + 1) for part in value])
    tag, content = _tagged(value)
    if tag == "tuple" and isinstance(content, list):
        return pytree.TreeSpec(tuple, None, [decode_spec(part, depth + 1) for part in content])
    if not isinstance(content, dict):
        raise _malformed(value)
    if tag in ("dict", "ordered"):
        kind: Any = dict if tag == "dict" else OrderedDict
        return pytree.TreeSpec(kind, list(content), [decode_spec(part, depth + 1) for part in content.values()])
    if tag == "returned" and content.keys() == {"name", "items"} and isinstance(content["items"], list):
        kind = vars(torch.return_types).get(str(content["name"]))
        if kind not in torch.return_types.all_return_types or len(content["items"]) != kind.n_fields:
            raise _malformed(value)
        return pytree.TreeSpec(kind, None, [decode_spec(part, depth + 1) for part in content["items"]])
    fields = content.get("fields")
    if not isinstance(fields, dict):
        raise _malformed(value)
    children = [decode_spec(part, depth + 1) for part in fields.values()]
    cls = class_of({tag: {**content, "fields": list(fields)}})
    if tag == "namedtuple":
        return pytree.TreeSpec(namedtuple, cls, children)
    keys = list(fields)
    absent = [name for name in fields_of(cls) if name not in fields]
    return pytree.TreeSpec(cls, keys if issubclass(cls, dict) else [keys, absent], children)


# --- Classes ---


def encode_class(cls: type[Any]) -> dict[str, Any] | None:
    """Return a class that a graph calls to make an output as JSON; None for other classes.

    Example:
        >>> encode_class(tuple_class("models.Result", ["logits"]))
        {'namedtuple': {'class': 'models.Result', 'fields': ['logits']}}
    """
    if issubclass(cls, tuple) and pytree.is_namedtuple_class(cls):
        return {"namedtuple": {"class": origin_of(cls), "fields": list(fields_of(cls))}}
    if dataclasses.is_dataclass(cls) or issubclass(cls, Outputs):
        fields = list(fields_of(cls))
        return {"record": {"class": origin_of(cls), "fields": fields, "all": fields}}
    return None


def class_of(value: Any) -> type[Any]:
    """Return the class that :func:`encode_class` described, or one like it; see records.py.

    Raises:
        Refusal: names that are not identifiers, or malformed content.
    """
    tag, content = _tagged(value)
    if tag not in ("namedtuple", "record") or not isinstance(content, dict):
        raise _malformed(value)
    origin, fields = content.get("class"), content.get("fields")
    if not isinstance(origin, str) or not isinstance(fields, list) or len(origin) > _MAX_NAME:
        raise _malformed(value)
    for atom in origin.split("."):
        keyword_name(atom)
    _check_fields(fields)
    if tag == "namedtuple":
        if content.keys() != {"class", "fields"} or any(name.startswith("_") for name in fields):
            raise _malformed(value)
        return tuple_class(origin, fields)
    everything = content.get("all")
    if content.keys() != {"class", "fields", "all"} or not isinstance(everything, list):
        raise _malformed(value)
    _check_fields(everything)
    if not set(fields) <= set(everything):
        raise _malformed(value)
    return record_class(origin, everything)


def _check_fields(fields: list[Any]) -> None:
    """Refuse names of fields that are not distinct identifiers."""
    if len(fields) > _MAX_FIELDS or len({keyword_name(name) for name in fields}) != len(fields):
        raise Refusal("fields of an output are not distinct", found=shown(fields))


def check_call(cls: type[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of a class of :func:`class_of` with other arguments than its fields."""
    fields = fields_of(cls)
    given = [*fields[: len(args)], *kwargs]
    complete = len(given) == len(fields) or not issubclass(cls, tuple)
    if len(args) > len(fields) or len(set(given)) != len(given) or not set(given) <= set(fields) or not complete:
        raise Refusal(f"{cls.__name__} is made of other fields", expected=", ".join(fields), found=shown(given))


# --- The signature ---


def encode_signature(codegen: CodeGen) -> Any:
    """Return None for a plain signature; for that of an exported program, names and trees of inputs and outputs.

    Raises:
        Refusal: a signature of another kind, or inputs or outputs of a type that a file cannot hold.
    """
    if type(codegen) is _PyTreeCodeGen and codegen._body_transformer is None:
        names, *specs = codegen.pytree_info
        into, out = (None if spec is None else encode_spec(spec) for spec in specs)
        return {"names": list(names), "in": into, "out": out}
    if type(codegen) is not CodeGen or codegen._body_transformer is not None:
        raise Refusal("the graph has its own code generator", found=type(codegen).__name__)
    return None


def decode_signature(value: Any) -> _PyTreeCodeGen | None:
    """Return what :func:`encode_signature` described; None for a plain signature.

    The names, and the keys of inputs by keyword, end up in generated source.

    Raises:
        Refusal: names that cannot be arguments, or malformed trees.
    """
    if value is None:
        return None
    spec = decode_spec(value["in"])
    names = [identifier(name) for name in value["names"]]
    if len(set(names)) != len(names):
        raise Refusal("two inputs have the same name", found=shown(names))
    if spec.type is tuple and spec.num_children == 2 and spec.child(1).type is dict:
        for key in spec.child(1).context:
            keyword_name(key)
    out = None if value["out"] is None else decode_spec(value["out"])
    return _PyTreeCodeGen(_PyTreeInfo(names, spec, out))


# --- Pickle, which refers to classes by name: it cannot find one that is local to a function ---


def picklable_class(cls: type[Any]) -> type[Any]:
    """Return a class that makes an output, or one like it if pickle could not find it."""
    code = encode_class(cls) if "<locals>" in cls.__qualname__ else None
    return cls if code is None else class_of(code)


def picklable(codegen: CodeGen) -> CodeGen:
    """Return a code generator with the classes of its trees replaced as :func:`picklable_class` does."""
    if type(codegen) is not _PyTreeCodeGen:
        return codegen
    names, into, out = codegen.pytree_info
    out = None if out is None else _picklable_spec(out)
    return _PyTreeCodeGen(_PyTreeInfo(names, _picklable_spec(into), out))


def _picklable_spec(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    if spec.is_leaf():
        return spec
    children = [_picklable_spec(child) for child in spec.children()]
    if spec.type is namedtuple:
        return pytree.TreeSpec(namedtuple, picklable_class(spec.context), children)
    kind = picklable_class(spec.type)
    context = spec.context if kind is spec.type else _keys(spec.type, spec.context)
    return pytree.TreeSpec(kind, context, children)


def _tagged(value: Any) -> tuple[Any, Any]:
    if not isinstance(value, dict) or len(value) != 1:
        raise _malformed(value)
    ((tag, content),) = value.items()
    return tag, content


def _malformed(value: Any) -> Refusal:
    return Refusal("the structure of inputs or outputs is malformed", expected="a known tag", found=shown(value))


def _check_depth(depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise Refusal("a value is nested too deeply", expected=f"at most {_MAX_DEPTH} levels")
