"""The signature of a graph: names of its inputs and outputs, and calls of it from any form of example inputs.

A graph of torch.export takes and returns trees (dicts, tuples, dataclasses), whose leaves are its placeholders and the
arguments of its output node. A traced graph takes one value per parameter of ``forward``, which may be a tree itself.
Names are the same for both: parameters, keys and fields joined by dots, and numbers for the items of sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpcompile.errors import InputError
from mpcompile.ir.nodes import fake_value, hint

_CONSTANTS = (bool, int, float, complex, str, type(None))


# --- Names ---


def input_names(gm: fx.GraphModule) -> list[str]:
    """Return the name of every input of a graph, in the order of its placeholders.

    A placeholder that holds a tree (a traced graph whose input is a dict) has one name per leaf, if it carries shapes.

    Example:
        >>> class Scaled(nn.Module):
        ...     def forward(self, batch, scale=2):
        ...         return {"logits": batch["image"] * scale, "parts": (batch["image"], batch["id"])}
        >>> batch = {"image": torch.randn(2, 3), "id": torch.arange(2)}
        >>> gm = torch.export.export(Scaled(), (batch,), {"scale": 3}).module()
        >>> input_names(gm)
        ['batch.image', 'batch.id', 'scale']
        >>> output_names(gm)
        ['logits', 'parts.0', 'parts.1']
    """
    spec = parameter_trees(gm)
    if spec is not None:
        return [name for key, child in spec.items() for name in _leaf_names(child, key)]
    names: list[str] = []
    for node in _placeholders(gm):
        key = str(node.target)
        value = fake_value(node)
        names += _leaf_names(pytree.tree_structure(value), key.lstrip("*") if not key.startswith("**") else "")
    return names


def output_names(gm: fx.GraphModule) -> list[str]:
    """Return the name of every output of a graph: its key or field, joined by dots; see :func:`input_names`.

    A graph that returns a single tensor has one output, called ``logits`` if it is a table of numbers (batch, classes),
    and ``output`` otherwise.
    """
    return list(outputs(gm))


def outputs(gm: fx.GraphModule) -> dict[str, Any]:
    """Return what a graph returns by the names of :func:`output_names`: the node that yields it, or a constant.

    If one node yields several outputs, such as a layer that returns a pair, then each of its names has that node.
    """
    spec, leaves = _output_leaves(gm)
    if spec.is_leaf():
        return {_single_name(leaves[0]): leaves[0]}
    return dict(zip(_leaf_names(spec, ""), leaves, strict=True))


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _info(gm: fx.GraphModule) -> Any:
    """Return the names and trees that torch.export records; None for a graph without them."""
    return getattr(gm.graph._codegen, "pytree_info", None)


def parameter_trees(gm: fx.GraphModule) -> dict[str, pytree.TreeSpec] | None:
    """Return the tree of each parameter of an exported graph by the parameter's name; None for other graphs."""
    info = _info(gm)
    if info is None or info.in_spec is None:
        return None
    names = [name for name in info.orig_args if name != "self"]
    children = info.in_spec.children()
    if _has_keywords(info.in_spec):
        children = [*children[0].children(), *children[1].children()]
    return dict(zip(names, children, strict=True))


def takes_trees(gm: fx.GraphModule) -> bool:
    """Return True if a graph is one of torch.export, whose placeholders are the leaves of its inputs."""
    return parameter_trees(gm) is not None


def _has_keywords(spec: pytree.TreeSpec) -> bool:
    """Return True if a tree of inputs is (positional inputs, inputs by keyword)."""
    return spec.type is tuple and [child.type for child in spec.children()] == [tuple, dict]


def _output_leaves(gm: fx.GraphModule) -> tuple[pytree.TreeSpec, list[Any]]:
    """Return the tree of a graph's outputs, and the node or constant of each leaf."""
    value = gm.graph.output_node().args[0]
    info = _info(gm)
    if info is not None and info.out_spec is not None:
        return info.out_spec, list(value) if isinstance(value, (tuple, list)) else [value]
    tree = fx.node.map_aggregate(value, _opened)
    leaves, spec = pytree.tree_flatten(plain(tree))
    return spec, [leaf.node if isinstance(leaf, _Part) else leaf for leaf in leaves]


class _Part:
    """A leaf of the value of a node that yields several."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node


def _opened(value: Any) -> Any:
    """Return a node that makes a namedtuple or dataclass as a dict of its fields, one that yields several as a tree."""
    if not isinstance(value, fx.Node):
        return value
    if isinstance(value.target, type):
        fields = getattr(value.target, "_fields", ())
        if is_dataclass(value.target):
            fields = [field.name for field in dataclass_fields(value.target)]
        given = {**dict(zip(fields, value.args, strict=False)), **value.kwargs}
        if fields and len(given) == len(value.args) + len(value.kwargs):
            return fx.node.map_aggregate({k: v for k, v in given.items() if v is not None}, _opened)
    fake = fake_value(value)
    return value if pytree.tree_structure(fake).is_leaf() else pytree.tree_map(lambda _: _Part(value), fake)


def _single_name(leaf: Any) -> str:
    fake = fake_value(leaf) if isinstance(leaf, fx.Node) else None
    return "logits" if isinstance(fake, Tensor) and fake.dim() == 2 and fake.is_floating_point() else "output"


def _leaf_names(spec: pytree.TreeSpec, prefix: str) -> Iterator[str]:
    """Yield the names of a tree's leaves, in order."""
    if spec.is_leaf():
        yield prefix
        return
    for key, child in zip(_keys(spec), spec.children(), strict=True):
        yield from _leaf_names(child, f"{prefix}.{key}" if prefix else key)


def _keys(spec: pytree.TreeSpec) -> list[str]:
    """Return the keys, fields or numbers of a tree's branches."""
    context = spec.context
    fields = getattr(context, "_fields", None)  # a namedtuple's class
    if fields is None and issubclass(spec.type, defaultdict):
        fields = context[1]
    if fields is None and isinstance(context, (list, tuple)):
        # Keys of a dict or a ModelOutput, or fields of a dataclass followed by those that are None.
        fields = context[0] if context and isinstance(context[0], (list, tuple)) else context
    if fields is None or len(fields) != spec.num_children:
        fields = range(spec.num_children)
    return [str(field) for field in fields]


# --- Calls ---


def plain(tree: Any) -> Any:
    """Return a tree with torch.fx's own dicts and lists replaced by plain ones."""
    if type(tree) in (fx.immutable_collections.immutable_dict, dict):
        return {key: plain(value) for key, value in tree.items()}
    if type(tree) in (fx.immutable_collections.immutable_list, list):
        return [plain(value) for value in tree]
    return tuple(map(plain, tree)) if type(tree) is tuple else tree


def flatten_inputs(gm: fx.GraphModule, example_inputs: Any) -> list[Any]:
    """Return example inputs as one value per placeholder of a graph.

    Args:
        gm: a graph of any kind.
        example_inputs: a tensor, a tuple of positional inputs (or a list of one value per placeholder), or a mapping of
            keyword inputs; entries that the graph does not take, such as labels, are left out. A mapping may also be
            the one input itself. Numbers, flags and None that are left out keep the values of the capture.

    Raises:
        InputError: an input is missing, or its structure is not that of the capture.

    Example:
        >>> class Sum(nn.Module):
        ...     def forward(self, batch):
        ...         return batch["a"] + batch["b"]
        >>> batch = {"a": torch.ones(2), "b": torch.ones(2)}
        >>> gm = torch.export.export(Sum(), (batch,)).module()
        >>> flatten_inputs(gm, ({"b": torch.zeros(2), "a": torch.ones(2), "labels": torch.ones(2)},))
        [tensor([1., 1.]), tensor([0., 0.])]
    """
    nodes = _placeholders(gm)
    spec = parameter_trees(gm)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, (tuple, list)):
        leaves = all(pytree.tree_structure(value).is_leaf() for value in example_inputs)
        if spec is not None and len(example_inputs) == len(nodes) and (leaves or len(spec) != len(nodes)):
            return list(example_inputs)
    elif not isinstance(example_inputs, Mapping):
        raise InputError(
            "example_inputs has the wrong type",
            expected="a tensor, a tuple of inputs, or a dict of keyword inputs",
            found=type(example_inputs).__name__,
        )
    if spec is None:
        given = _by_parameter(_trees_of_placeholders(nodes), example_inputs)
        return [
            _like(node, given[str(node.target)]) if str(node.target) in given else _default(gm, node) for node in nodes
        ]
    given = _by_parameter(spec, example_inputs)
    values: list[Any] = []
    for name, child in spec.items():
        own = nodes[len(values) : len(values) + child.num_leaves]
        values += _leaves(child, given[name], name) if name in given else [_default(gm, node) for node in own]
    return values


def _by_parameter(trees: Mapping[str, pytree.TreeSpec], example_inputs: Any) -> dict[str, Any]:
    """Return the given inputs by the name of their parameter."""
    names = list(trees)
    if isinstance(example_inputs, Mapping):
        if len(names) == 1 and not trees[names[0]].is_leaf() and names[0] not in example_inputs:
            return {names[0]: example_inputs}  # the one input itself
        given = {name: example_inputs[name] for name in names if name in example_inputs}
        rest = [name for name in names if name.startswith("**")]
        return given | {rest[0]: {k: v for k, v in example_inputs.items() if k not in given}} if rest else given
    if len(example_inputs) > len(names):
        raise InputError(
            "there are more example inputs than the graph has", expected=", ".join(names), found=len(example_inputs)
        )
    return dict(zip(names, example_inputs, strict=False))


def _trees_of_placeholders(nodes: Sequence[fx.Node]) -> dict[str, pytree.TreeSpec]:
    return {str(node.target): pytree.tree_structure(fake_value(node)) for node in nodes}


def _like(node: fx.Node, value: Any) -> Any:
    """Return the value of a placeholder as plain dicts, lists and tuples, without keys that the capture lacks."""
    fake = fake_value(node)
    spec = pytree.tree_structure(fake)
    if isinstance(fake, (Mapping, tuple, list)) and not spec.is_leaf():
        return plain(pytree.tree_unflatten(_leaves(spec, value, str(node.target)), spec))
    return value


def _default(gm: fx.GraphModule, node: fx.Node) -> Any:
    """Return the value that an input keeps if it is not given: its default, or the constant of the capture."""
    if node.args:
        return node.args[0]
    value = hint(fake_value(node))
    if ("val" in node.meta or "example_value" in node.meta) and isinstance(value, _CONSTANTS):
        return value
    raise InputError(f"the input {str(node.target)!r} is missing", expected=", ".join(input_names(gm)))


def _leaves(spec: pytree.TreeSpec, value: Any, name: str) -> list[Any]:
    """Return the leaves of an input in the order of its tree, without keys that the tree lacks.

    Raises:
        InputError: the input is of another structure.
    """
    if spec.is_leaf():
        return [value]
    keys = _keys(spec)
    if isinstance(value, Mapping) and all(key in value for key in keys):
        parts = [value[key] for key in keys]
    elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == len(keys):
        parts = list(value)
    else:
        found = pytree.tree_structure(value)
        if found == spec:
            return pytree.tree_leaves(value)
        raise InputError(
            f"the input {name!r} has another structure than at capture",
            expected=f"{spec.type.__name__.removeprefix('immutable_')} of {', '.join(keys)}",
            found=f"{type(value).__name__} of {', '.join(map(str, value))}"[:200]
            if isinstance(value, Mapping)
            else type(value).__name__,
        )
    pairs = zip(keys, spec.children(), parts, strict=True)
    return [leaf for key, child, part in pairs for leaf in _leaves(child, part, f"{name}.{key}")]


def call_of(
    gm: fx.GraphModule, values: Sequence[Any], *, keywords: bool | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` with which to call a graph on one value per placeholder.

    Args:
        gm: a graph of any kind.
        values: from :func:`flatten_inputs`.
        keywords: pass inputs by keyword (True) or by position (False). None: as the graph was captured, which is by
            position for a traced graph.

    Example:
        >>> gm = torch.export.export(nn.Linear(3, 2), (), {"input": torch.randn(4, 3)}).module()
        >>> args, kwargs = call_of(gm, [torch.zeros(4, 3)])
        >>> args, list(kwargs)
        ((), ['input'])
        >>> gm(*args, **kwargs).shape
        torch.Size([4, 2])
    """
    info = _info(gm)
    if info is not None and info.in_spec is not None:
        args, kwargs = _trees(info.in_spec, list(values))
        names = [name for name in info.orig_args if name != "self"][: len(args)]
    else:
        args, kwargs, names = [], {}, []
        for node, value in zip(_placeholders(gm), values, strict=True):
            target = str(node.target)
            if target.startswith("**"):
                kwargs |= value
            elif target.startswith("*"):
                args += value
            else:
                args.append(value)
                names.append(target)
    if keywords is True and len(names) == len(args):  # items of *args have no names
        return (), {**dict(zip(names, args, strict=True)), **kwargs}
    if keywords is False:
        return (*args, *kwargs.values()), {}
    return tuple(args), kwargs


def call_graph(gm: fx.GraphModule, values: Sequence[Any]) -> Any:
    """Return the outputs of a graph for one value per placeholder."""
    args, kwargs = call_of(gm, values)
    return gm(*args, **kwargs)


def call_like(gm: fx.GraphModule, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` of a call in the form of the example inputs: a mapping gives keywords, others none.

    Args:
        gm: a graph of any kind.
        example_inputs: as for :func:`flatten_inputs`, which says what is raised.
    """
    trees = parameter_trees(gm) or _trees_of_placeholders(_placeholders(gm))
    named = isinstance(example_inputs, Mapping) and not trees.keys().isdisjoint(example_inputs)
    return call_of(gm, flatten_inputs(gm, example_inputs), keywords=named)


def _trees(spec: pytree.TreeSpec, values: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    whole = pytree.tree_unflatten(values, spec)
    return (list(whole[0]), dict(whole[1])) if _has_keywords(spec) else (list(whole), {})
