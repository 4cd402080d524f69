"""Parts of modules, by their dotted names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

FOLDED = "_folded"  # submodule that holds weights computed by a pass, under the names of their layers


def attribute(root: nn.Module, path: str) -> Any:
    """Return ``root.a.b.c`` for ``"a.b.c"``."""
    value: Any = root
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


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
