"""Parts of modules, by their dotted names."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

FOLDED = "_folded"  # submodule that holds weights computed by a pass, under the names of their layers


def attribute(root: nn.Module, path: str) -> Any:
    """Return ``root.a.b.c`` for ``"a.b.c"``."""
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


_ATEN = torch.ops.aten
_CHUNKS = frozenset({torch.chunk, _ATEN.chunk.default, "chunk"})
_SPLITS = _CHUNKS | {torch.split, _ATEN.split.Tensor, _ATEN.split_with_sizes.default, "split"}


def rows_source(node: fx.Node) -> fx.Node | None:
    """Return the node that ``node`` takes rows of, as a slice or as one part of a split along axis 0, or None."""
    source: Any = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.kwargs:
        return None
    if node.target is operator.getitem and isinstance(node.args[1], slice):
        return source
    if node.target is _ATEN.slice.Tensor:
        return source if node.args[1:2] in ((), (0,)) else None
    along_rows = source.target in _SPLITS and not source.kwargs and source.args[2:] in ((), (0,))
    if node.target is operator.getitem and isinstance(node.args[1], int) and along_rows:
        whole: Any = source.args[0]
        return whole if len(source.args) > 1 else None
    return None


def rows_of(node: fx.Node, count: int) -> slice | None:
    """Return which rows ``node`` takes of a tensor with ``count`` rows (see :func:`rows_source`); None if unknown.

    Example:
        >>> graph = fx.Graph()
        >>> part = graph.call_function(operator.getitem, (graph.get_attr("weight"), slice(4)))
        >>> rows_of(part, 12)
        slice(0, 4, None)
    """
    source, index = node.args[0], node.args[1] if len(node.args) > 1 else None
    if node.target is _ATEN.slice.Tensor:
        start, stop, step = (*node.args[2:], None, None, None)[:3]
        index = slice(start, stop, step)
    if isinstance(index, slice):
        ends: tuple[Any, Any, Any] = (index.start, index.stop, index.step)
        plain = all(isinstance(end, (int, type(None))) for end in ends) and ends[2] in (None, 1)
        return slice(*index.indices(count)[:2]) if plain else None
    if not isinstance(index, int) or not isinstance(source, fx.Node):
        return None
    sizes: Any = source.args[1]
    if isinstance(sizes, int):
        size = max(1, -(-count // sizes) if source.target in _CHUNKS else sizes)
        sizes = [min(size, count - start) for start in range(0, count, size)]
    if not all(isinstance(size, int) for size in sizes) or not 0 <= index < len(sizes):
        return None
    start = sum(sizes[:index])
    return slice(start, start + sizes[index])


def whole_of(node: fx.Node) -> fx.Node | None:
    """Return the node that reads the parameter which ``node`` reads, or takes rows of, also rows of rows; else None."""
    source: fx.Node | None = node
    while source is not None and source.op not in ("get_attr", "placeholder"):
        source = rows_source(source)
    return source


def rows_within(node: fx.Node, count: int) -> slice | None:
    """Return which rows ``node`` takes of the whole parameter of ``count`` rows behind it; None if unknown."""
    if node.op in ("get_attr", "placeholder"):
        return slice(0, count)
    source = rows_source(node)
    outer = None if source is None else rows_within(source, count)
    inner = None if outer is None else rows_of(node, outer.stop - outer.start)
    return None if outer is None or inner is None else slice(outer.start + inner.start, outer.start + inner.stop)


def rows_name(name: str, rows: slice) -> str:
    """Return the name of rows of a parameter: that of the whole with ``_rows_START_STOP`` behind it."""
    return f"{name}_rows_{rows.start}_{rows.stop}"


def split_name(name: str) -> tuple[str, slice] | None:
    """Return the parameter and the rows that a name of :func:`rows_name` stands for, or None for any other name.

    Example:
        >>> split_name(rows_name("attn.qkv.weight", slice(0, 192)))
        ('attn.qkv.weight', slice(0, 192, None))
    """
    match = re.fullmatch(r"(.+)_rows_(\d+)_(\d+)", name)
    return None if match is None else (match.group(1), slice(int(match.group(2)), int(match.group(3))))


def common_path(paths: Iterable[str]) -> str:
    """Return the longest module path that all of the given paths begin with.

    Example:
        >>> common_path(["blocks.3.attn.qkv", "blocks.3.attn.proj"])
        'blocks.3.attn'
    """
    split = [path.split(".") for path in paths]
    same = []
    for atoms in zip(*split, strict=False):
        if len(set(atoms)) > 1:
            break
        same.append(atoms[0])
    return ".".join(same)


def within(path: str | None, parent: str | None) -> bool:
    """Return True if ``path`` is that of a module, or of a part of it."""
    return path is not None and parent is not None and f"{path}.".startswith(f"{parent}.")


def read_tensor(gm: nn.Module, node: Any) -> Tensor | None:
    """Return the parameter or buffer that a node reads, or the rows of it that it takes (which share its memory)."""
    whole = whole_of(node) if isinstance(node, fx.Node) else None
    value = attribute(gm, str(whole.target)) if whole is not None and whole.op == "get_attr" else None
    if not isinstance(value, Tensor) or whole is node:
        return value if isinstance(value, Tensor) else None
    rows = rows_within(node, len(value)) if value.dim() else None
    with torch.no_grad():
        return None if rows is None else value[rows]


def set_attribute(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule at ``path``, also under any other name that it is registered under."""
    parent, _, leaf = path.rpartition(".")
    before = root.get_submodule(parent)._modules.get(leaf)
    setattr(root.get_submodule(parent), leaf, module)
    for owner in list(root.modules()) if before is not None else ():
        for key in [key for key, child in owner._modules.items() if child is before]:
            owner._modules[key] = module


def carry(source: nn.Module, target: nn.Module) -> None:
    """Register on ``target`` the parameters and buffers of ``source`` that it lacks: their state dicts get equal names.

    These are parts that no node uses, and second names of shared parts. A buffer of ``target`` is
    persistent, that is, part of the state dict, only if ``source`` has it as a persistent one.
    """
    _carry(source, target, {id(module) for module in target.modules()})


def _carry(source: nn.Module, target: nn.Module, leaves: set[int]) -> None:
    for key, parameter in source._parameters.items():
        if parameter is not None and key not in target._parameters:
            target.register_parameter(key, parameter)
    transient = source._non_persistent_buffers_set
    for key, buffer in source._buffers.items():
        if buffer is not None and key not in target._buffers and key not in transient:
            target.register_buffer(key, buffer)
    target._non_persistent_buffers_set = {k for k in target._buffers if k not in source._buffers or k in transient}
    for key, child in source._modules.items():
        own = target._modules.get(key)
        if child is None or own is child:
            continue
        if own is None and id(child) in leaves:
            target.add_module(key, child)
            continue
        if own is None and next(itertools.chain(child.parameters(), child.buffers()), None) is None:
            continue
        if own is None:
            own = nn.Module()
            target.add_module(key, own)
        own.training = child.training
        _carry(child, own, leaves)


def keep(root: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Register tensors as buffers of the submodule at ``path``, which is created if missing, and return it."""
    holder = root
    for atom in path.split("."):
        if atom not in holder._modules:
            holder.add_module(atom, nn.Module())
        holder = holder.get_submodule(atom)
    for key, tensor in tensors.items():
        holder.register_buffer(key, tensor)
    return holder


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's weights; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))
