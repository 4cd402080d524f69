"""Conversion of the tree of layers to tables and back: class, arguments, training flag and tensors of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.artifact.codec import decode, encode
from mpcompile.artifact.leaves import build_layer, layer_arguments, layer_name
from mpcompile.artifact.opset import LISTED, Refusal, module_path, shown
from mpcompile.ir.module import IRModule

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SETTINGS = (bool, int, float, str, tuple, list, torch.dtype, type(None))  # types of attributes that are compared


# --- To tables ---


class Tree:
    """The tables of one IR.

    Attributes:
        modules: path -> class, arguments, training flag, and the names of its tensors; ``{"same": path}`` for a layer
            that occurs a second time; None for an empty place.
        kinds: tensor name -> parameter, frozen parameter or buffer, and its memory order if that is unusual.
        tensors: tensor name -> tensor, each once, under the first of its names.

    Args:
        gm: the IR.

    Raises:
        Refusal: a layer or tensor that a file cannot hold; it is named.
    """

    def __init__(self, gm: IRModule) -> None:
        self.modules: dict[str, Any] = {}
        self.kinds: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._visit(gm, "", gm)

    def _visit(self, module: nn.Module | None, path: str, gm: IRModule) -> None:
        if module is None:
            self.modules[path] = None
            return
        if id(module) in self._paths:
            self.modules[path] = {"same": self._paths[id(module)]}
            return
        self._paths[id(module)] = path
        group = module is gm or type(module) is nn.Module
        name = "" if group else _checked_name(module, path)
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
            raise Refusal(
                f"{f'layer {path}' if path else 'the module'} has hooks or a patched forward, which would be lost",
                hint="remove them (handle.remove()) and put them back after loading",
            )
        self.modules[path] = {
            "class": name,
            "args": {} if group else {k: encode(v) for k, v in layer_arguments(module, name).items()},
            "training": module.training,
            "parameters": {k: self._add(path, k, t) for k, t in module._parameters.items()},
            "buffers": {k: self._add(path, k, t) for k, t in module._buffers.items()},
            "transient": sorted(k for k in module._non_persistent_buffers_set if k in module._buffers),
        }
        for key, child in module._modules.items():
            self._visit(child, _join(path, key), gm)

    def _add(self, path: str, key: str, tensor: Tensor | None) -> str | None:
        """Record a tensor, unless it is recorded for another layer that shares it; return its name."""
        if tensor is None:
            return None
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        name = self._names[id(tensor)] = module_path(_join(path, key))
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise Refusal(
                f"tensor {name} cannot be stored",
                expected="an ordinary dense tensor with data",
                found=f"{type(tensor).__name__}, {tensor.layout}, device {tensor.device}",
            )
        self.tensors[name] = tensor
        kind: dict[str, Any] = {"kind": "buffer"}
        if isinstance(tensor, nn.Parameter):
            kind = {"kind": "parameter" if tensor.requires_grad else "frozen"}
        contiguous = torch.empty(tensor.shape, device="meta").stride()
        if tensor.stride() != contiguous and _is_dense(tensor.shape, tensor.stride()):  # e.g. channels_last
            kind["strides"] = tensor.stride()
        self.kinds[name] = kind
        return name


def _checked_name(module: nn.Module, path: str) -> str:
    """Return the name of a layer's class, if it is listed."""
    name = layer_name(module)
    if name is None:
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        raise Refusal(
            f"layer {path} is a {cls}, which a file cannot hold",
            expected=LISTED,
            hint="build it from torch.nn layers, or save gm.state_dict() and transform again",
        )
    return name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return True if the values are adjacent in memory, in some order of the axes."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


# --- From tables ---


def restore_tensors(kinds: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make parameters and buffers from plain contiguous tensors.

    Raises:
        Refusal: a tensor without a kind, an unknown kind, or strides that the tensor cannot have.
    """
    if kinds.keys() != tensors.keys():
        raise Refusal("the tensors do not match the tree", found=shown(sorted(kinds.keys() ^ tensors.keys())))
    restored = {}
    for name, kind in kinds.items():
        tensor = tensors[name]
        if "strides" in kind:
            if not _is_dense(tensor.shape, kind["strides"]):
                raise Refusal(f"tensor {name} cannot have such strides", found=shown(kind["strides"]))
            arranged = torch.empty_strided(tensor.shape, kind["strides"], dtype=tensor.dtype, device=tensor.device)
            tensor = arranged.copy_(tensor)
        if kind["kind"] in ("parameter", "frozen"):
            tensor = nn.Parameter(tensor, requires_grad=kind["kind"] == "parameter")
        elif kind["kind"] != "buffer":
            raise Refusal(f"tensor {name} is of an unknown kind", found=shown(kind))
        restored[name] = tensor
    return restored


def restore_modules(gm: IRModule, modules: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Fill the empty ``gm`` with the tree.

    Raises:
        Refusal: a class, argument or tensor that is not allowed or does not fit.
        KeyError: a name that is already an attribute of nn.Module or IRModule. Malformed tables raise other errors.
    """
    built: dict[str, nn.Module | None] = {}
    missing: set[str] = set()  # children made by constructors that the table has not listed so far
    used: set[str] = set()
    for path, entry in modules.items():
        module = gm if path == "" else _restore(path, entry, built, tensors)
        if path != "":
            _attach(module, path, built, missing)
        built[path] = module
        if module is None or "same" in entry:
            continue
        if path != "" and entry["class"] != "":
            missing |= {f"{path}.{name}" for name in module._modules}
        used |= _fill(module, path, entry, tensors)
    if missing or used != tensors.keys():
        raise Refusal("the tree has gaps", found=shown(sorted(missing | (used ^ tensors.keys()))))


def _restore(path: str, entry: Any, built: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """Return the module of one table entry."""
    if entry is None:
        return None
    if "same" in entry:
        if f"{path}.".startswith(f"{entry['same']}.") or entry["same"] == "":
            raise Refusal(f"layer {path} contains itself")
        return built[entry["same"]]
    if entry["class"] == "":
        return nn.Module()
    own = {k: None if n is None else tensors[n] for k, n in {**entry["parameters"], **entry["buffers"]}.items()}
    try:
        return build_layer(entry["class"], {k: decode(v, {}) for k, v in entry["args"].items()}, own)
    except Refusal as error:
        raise error.at(f"layer {path}") from error


def _attach(module: nn.Module | None, path: str, built: Mapping[str, nn.Module | None], missing: set[str]) -> None:
    """Put a module at its path. A layer accepts only the children that its constructor made."""
    owner, _, key = module_path(path).rpartition(".")
    parent = built.get(owner)
    if path in missing and parent is not None:
        missing.remove(path)
        parent._modules[key] = module
    elif parent is not None and (owner == "" or type(parent) is nn.Module):
        parent.add_module(key, module)  # refuses names that the class uses for something else
    else:
        raise Refusal(f"layer {path} has no place in the tree")


def _fill(module: nn.Module, path: str, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> set[str]:
    """Set the tensors and the training flag of a module, and return the names of the tensors."""
    parameters = {k: None if n is None else tensors[n] for k, n in entry["parameters"].items()}
    buffers = {k: None if n is None else tensors[n] for k, n in entry["buffers"].items()}
    if path == "" or entry["class"] == "":
        for key, parameter in parameters.items():
            module.register_parameter(module_path(key), parameter)  # type: ignore[arg-type]
        for key, buffer in buffers.items():
            module.register_buffer(module_path(key), buffer, persistent=key not in entry["transient"])
    else:
        _fill_layer(module, path, parameters, buffers)
        module._non_persistent_buffers_set = set(entry["transient"])
    if type(entry["training"]) is not bool:
        raise Refusal(f"layer {path} has no training flag", found=shown(entry["training"]))
    module.training = entry["training"]
    return {n for n in (*entry["parameters"].values(), *entry["buffers"].values()) if n is not None}


def _fill_layer(
    layer: nn.Module, path: str, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor | None]
) -> None:
    """Set the tensors of a layer. They must have the names and shapes of those that its constructor made."""
    expected, found = (
        {k: None if t is None else tuple(t.shape) for k, t in {**p, **b}.items()}
        for p, b in ((layer._parameters, layer._buffers), (parameters, buffers))
    )
    if expected != found or layer._buffers.keys() != buffers.keys():
        raise Refusal(f"layer {path}: the tensors do not fit its class", expected=expected, found=found)
    dtypes = {t.dtype for t in parameters.values() if t is not None}
    if len(dtypes) > 1:  # some layers check only the dtype of the first
        raise Refusal(f"layer {path} has parameters of several dtypes", found=", ".join(sorted(map(str, dtypes))))
    layer._buffers.update(buffers)
    for key, parameter in parameters.items():
        setattr(layer, key, parameter)  # not _parameters: recurrent layers also keep a list of weights


# --- What would be lost ---


def compare(gm: IRModule, twin: IRModule) -> None:
    """Check that ``twin``, as it would be loaded, has every setting of the layers of ``gm``.

    A setting that is not among a layer's constructor arguments would silently return to its default.

    Raises:
        Refusal: names the layer and the setting.
    """
    for path, module in gm.named_modules():
        if module is gm or type(module) is nn.Module:
            continue
        for key, value in vars(twin.get_submodule(path)).items():
            if key.startswith("_") or not isinstance(value, _SETTINGS):
                continue
            setting = getattr(module, key, None)
            if type(setting) is not type(value) or setting != value:
                raise Refusal(
                    f"layer {path} ({type(module).__name__}) has {key} = {shown(setting)}, which would be lost",
                    expected=f"{shown(value)}, as its constructor sets it",
                    hint="construct the layer with that setting",
                )
