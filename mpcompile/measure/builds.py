"""Builds that an audit compares with: compiled with freezing, in bf16, and in other runtimes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.backend import FREEZING, NATIVE_CALLS
from mpcompile.data.calls import call_form
from mpcompile.kernels.machine import has_bf16
from mpcompile.measure.environment import first_tensor
from mpcompile.runtimes.base import Build
from mpcompile.runtimes.catalogue import in_fp32


class Frozen:
    """The dense model compiled with Inductor's freezing and, on CPUs, called from C++: as our frozen graphs are.

    Args:
        model: the dense model.
        options: further options of ``torch.compile``.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any] | None = None) -> None:
        self._orig_mod = model  # the name that torch.compile uses
        native = all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))
        self.options = {**FREEZING, **(options or {})}
        self.run = torch.compile(model, options=self.options | NATIVE_CALLS if native else self.options)
        self.shapes: set[tuple[Any, ...]] = set()  # compiled so far

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = tuple(v.shape for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))
        if key in self.shapes:
            return self.run(*args, **kwargs)
        with torch._inductor.config.patch(freezing=True):  # dynamo reads the global setting when it compiles
            try:
                result = self.run(*args, **kwargs)
            except Exception:  # an operator that Inductor cannot call from C++; or a wrong input, which raises again
                self.run = torch.compile(self._orig_mod, options=self.options)
                result = self.run(*args, **kwargs)
        self.shapes.add(key)
        return result


class InBf16:
    """A bf16 build of the dense model that accepts the inputs of the fp32 one."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).bfloat16().eval()
        self._orig_mod = self.module  # the name that torch.compile uses; MACs and bytes are counted from it
        self.run = torch.compile(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*map(self.cast, args), **self.cast(kwargs))

    def cast(self, value: Any) -> Any:
        """Cast a tensor, or the tensors in a mapping or sequence, to bf16; integers stay as they are."""
        if isinstance(value, Mapping):
            return {key: self.cast(part) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            return [self.cast(part) for part in value]
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


class InRuntime:
    """A model in another runtime, with the inputs of the model itself."""

    def __init__(self, model: nn.Module, build: Build) -> None:
        self._orig_mod = model  # the name that torch.compile uses; MACs are counted from it
        self.build = build

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.build(*in_fp32(args), **in_fp32(kwargs))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as the runtime stores them."""
        if self.build.weight_bytes is not None:
            return self.build.weight_bytes
        return sum(p.numel() for p in self._orig_mod.parameters()) * (2 if self.build.precision == "bf16" else 4)


def bf16_build(model: nn.Module, batch: Any, choice: bool | Callable[..., Any] | None, rounds: int) -> Any:
    """Return the build for the bf16 row, or None for no such row; see ``dense_bf16`` of :func:`mpcompile.audit`."""
    if choice is None:
        tensor = first_tensor(batch)
        choice = rounds > 0 and tensor.device.type == "cpu" and tensor.dtype is torch.float32 and has_bf16()
    return InBf16(model) if choice is True else choice or None


def module_of(build: Any) -> Any:
    """Return the module that a compiled build runs, or the build itself."""
    return getattr(build, "_orig_mod", build)


def run(build: Callable[..., Any], batch: Any) -> Any:
    """Return the output of a build for one batch, in the form that a loader yields it.

    Raises:
        InputError: an input is missing.
    """
    args, kwargs = call_form(module_of(build), batch)
    return build(*args, **kwargs)
