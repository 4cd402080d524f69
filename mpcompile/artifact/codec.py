"""Conversion of a graph to JSON and back.

fx turns node names, targets and arguments into Python source and executes it. Everything that reaches that source is
checked here: names are plain identifiers, paths lead to layers and tensors of the tree, operators and methods are
listed in :mod:`mpcompile.artifact.opset`, and values are rebuilt from tagged JSON, never evaluated.

JSON values stand for themselves. Other values are written as ``{"tag": content}``. The tags are ``node``, ``tuple``,
``size``, ``slice``, ``dict``, ``ellipsis``, ``float`` (inf and nan), ``dtype``, ``device``, ``memory_format`` and
``layout``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from mpcompile._moved import renamed
from mpcompile.artifact.guards import METHODS
from mpcompile.artifact.opset import (
    ATTRIBUTES,
    LISTED,
    Refusal,
    call_of,
    function_name,
    function_of,
    identifier,
    is_method,
    keyword_name,
    module_path,
    shown,
)
from mpcompile.artifact.structures import check_call, class_of, encode_class
from mpcompile.ir.nodes import dynamo_name

__getattr__ = renamed(
    __name__,
    {
        "is_guard": "capture.input_guards.is_torch_guard",
        "encode_signature": "artifact.structures.encode_signature",
        "decode_signature": "artifact.structures.decode_signature",
    },
)
_MAX_DEPTH = 32  # levels of nested values; the Python parser has a limit, too
_KINDS: dict[str, Any] = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}
_CONSTANTS = {tag: {k: v for k, v in vars(torch).items() if isinstance(v, kind)} for tag, kind in _KINDS.items()}
_DEVICE = re.compile(r"[a-z]+(:[0-9]+)?")


# --- Values ---


def encode(value: Any, depth: int = 0) -> Any:
    """Return an argument of a node or layer as JSON.

    Args:
        value: the argument.
        depth: how deeply it is nested in others.

    Raises:
        Refusal: a value of a type that has no JSON form, or more than 32 levels of nesting.

    Example:
        >>> encode((1, [2.0, slice(None, 3)], torch.float16))
        {'tuple': [1, [2.0, {'slice': [None, 3, None]}], {'dtype': 'float16'}]}
    """
    if depth > _MAX_DEPTH:
        raise Refusal("a value is nested too deeply", expected=f"at most {_MAX_DEPTH} levels")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is ...:
        return {"ellipsis": None}
    if type(value) is slice:
        return {"slice": [encode(v, depth + 1) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, list) or type(value) in (tuple, torch.Size):
        items = [encode(v, depth + 1) for v in value]
        return items if isinstance(value, list) else {"size" if type(value) is torch.Size else "tuple": items}
    if isinstance(value, dict) and all(type(k) is str for k in value):
        return {"dict": {k: encode(v, depth + 1) for k, v in value.items()}}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for tag, kind in _KINDS.items():
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    raise Refusal(
        f"a value of type {type(value).__name__} cannot be stored",
        expected="numbers, text, None, slices, dtypes, devices, and tuples, lists and dicts of them",
        found=shown(value),
    )


def decode(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """Return the value that :func:`encode` wrote; ``nodes`` holds the nodes that it may refer to, by name.

    Raises:
        Refusal: an unknown tag or malformed content, a node that does not exist, or more than 32 levels of nesting.
    """
    if depth > _MAX_DEPTH:
        raise Refusal("a value is nested too deeply", expected=f"at most {_MAX_DEPTH} levels")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [decode(v, nodes, depth + 1) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise Refusal("a value is malformed", expected="a number, text, list or one tag", found=shown(value))
    ((tag, content),) = value.items()
    if tag == "node" and isinstance(content, str) and content in nodes:
        return nodes[content]
    if tag in ("tuple", "size", "slice") and isinstance(content, list):
        items = [decode(v, nodes, depth + 1) for v in content]
        if tag != "slice" or len(items) == 3:
            return tuple(items) if tag == "tuple" else torch.Size(items) if tag == "size" else slice(*items)
    if tag == "dict" and isinstance(content, dict):
        return {k: decode(v, nodes, depth + 1) for k, v in content.items()}
    if tag == "ellipsis" and content is None:
        return ...
    if tag == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if tag == "device" and isinstance(content, str) and _DEVICE.fullmatch(content):
        return torch.device(content)
    if tag in _CONSTANTS and isinstance(content, str) and content in _CONSTANTS[tag]:
        return _CONSTANTS[tag][content]
    raise Refusal("a value is malformed", expected="a known tag, and nodes defined earlier", found=shown(value))


# --- Nodes ---


def _encode_node(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        target = encode_class(target) if isinstance(target, type) else function_name(target)
        if target is None:
            raise Refusal(f"it calls {node._pretty_print_target(node.target)}", expected=LISTED)
    if node.op == "placeholder" and dynamo_name(node):
        raise Refusal(
            "it is a weight that the graph takes as an input, as dynamo captures it: a file would not contain it",
            hint="call mpcompile.transform on the module itself, and save that",
        )
    args, kwargs = [encode(a) for a in node.args], {k: encode(v) for k, v in node.kwargs.items()}
    return {"op": node.op, "name": node.name, "target": target, "args": args, "kwargs": kwargs}


def encode_nodes(nodes: Sequence[fx.Node]) -> list[dict[str, Any]]:
    """Return nodes as JSON, in order.

    Raises:
        Refusal: a node that a file cannot hold; it is named.
    """
    entries = []
    for node in nodes:
        try:
            entries.append(_encode_node(node))
        except Refusal as error:
            raise error.at(f"node {shown(node.name)}") from error
    return entries


def _lookup(root: nn.Module, path: str) -> Any:
    """Return the layer or tensor at a path, looked up only in the tables of the tree; None if there is none."""
    *owners, leaf = path.split(".")
    module: nn.Module | None = root
    for atom in owners:
        module = None if module is None else module._modules.get(atom)
    tables: Any = () if module is None else (module._modules, module._parameters, module._buffers)
    return next((table[leaf] for table in tables if leaf in table), None)


def _target(root: nn.Module, op: object, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the target with which a node is created.

    Raises:
        Refusal: the operator, method, attribute or path is not allowed.
    """
    on_node, allowed = bool(args) and isinstance(args[0], fx.Node), False
    if op == "placeholder" and isinstance(target, str):
        stars = len(target) - len(target.lstrip("*"))
        identifier(target[stars:])
        allowed = stars <= 2 and len(args) <= 1 and not kwargs and not on_node
    elif op == "output":
        allowed = target == "output" and len(args) == 1 and not kwargs
    elif op == "call_module":
        layer = _lookup(root, module_path(target))
        allowed = isinstance(layer, nn.Module) and type(layer) is not nn.Module
    elif op == "get_attr":
        allowed = isinstance(_lookup(root, module_path(target)), torch.Tensor)
    elif op == "call_method":
        allowed = is_method(target, kwargs) and on_node
        if allowed and target in METHODS:
            return METHODS[target]
    elif op == "call_function" and isinstance(target, dict):
        cls = class_of(target)
        check_call(cls, args, kwargs)
        return cls
    elif op == "call_function" and (function := function_of(target)) is not None:
        if function is not getattr:
            return call_of(function, args, kwargs)
        if on_node and len(args) == 2 and args[1] in ATTRIBUTES and not kwargs:
            return function
        raise Refusal(
            f"getattr with {shown(args[1:])} is not allowed", expected=f"one of {', '.join(sorted(ATTRIBUTES))}"
        )
    if allowed:
        return target
    raise Refusal(f"{shown(op)} of {shown(target)} is not allowed", expected=LISTED)


def decode_nodes(root: nn.Module, entries: list[dict[str, Any]]) -> fx.Graph:
    """Return the graph that :func:`encode_nodes` described; ``root`` holds the layers and tensors that the nodes use.

    Raises:
        Refusal: a node that names something that is not allowed or does not exist; the node is named.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for place, entry in enumerate(entries):
        try:
            name = identifier(entry["name"])
            args = tuple(decode(a, nodes) for a in entry["args"])
            kwargs = {keyword_name(k): decode(v, nodes) for k, v in entry["kwargs"].items()}
            target = _target(root, entry["op"], entry["target"], args, kwargs)
            op = "call_function" if callable(target) else entry["op"]
            node = graph.create_node(op, target, args, kwargs, name=name)
        except Refusal as error:
            raise error.at(f"node {shown(entry['name'])}") from error
        if node.name != name or (entry["op"] == "output") != (place == len(entries) - 1):
            raise Refusal(
                f"node {shown(name)} has the name of another or of a builtin, or the output is not the last node"
            )
        nodes[name] = node
    inputs = [n.target for n in nodes.values() if n.op == "placeholder"]
    if not entries or len(set(inputs)) != len(inputs):
        raise Refusal("the graph has no output, or two inputs of the same name")
    return graph
