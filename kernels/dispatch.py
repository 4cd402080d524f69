"""Engines: what can run a masked layer, and which one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mpcompile.errors import ConfigError
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import MAX_M, Pattern, pack


@dataclass(frozen=True)
class LayerSpec:
    """One masked layer as an engine sees it. ``geometry`` is (stride, padding, dilation, groups) or None (linear)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pattern: Pattern
    geometry: tuple[list[int], list[int], list[int], int] | None = None


class Engine(Protocol):
    """What lowering needs of an engine.

    ``pack`` turns a weight and its mask into the tensors that the engine keeps; ``call`` gives the operator and its
    arguments for an input, those tensors and a bias. Both take graph nodes as well as tensors where it matters.
    """

    name: str

    def supports(self, spec: LayerSpec) -> str | None:
        """Why the engine can't run the layer, or None."""

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """The tensors that the engine keeps."""

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        """Operator and arguments."""


class Reference:
    """Packed values + bitmask, spread out at every call, then a dense op. Saves memory; slower than dense."""

    name = "reference"

    def supports(self, spec: LayerSpec) -> str | None:
        if not spec.dtype.is_floating_point:
            return f"dtype {spec.dtype}"
        return None if spec.pattern.m <= MAX_M else f"M > {MAX_M}"

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        values, words = pack(weight, mask, *spec.pattern)
        return {"values": values, "words": words}

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        head = (x, packed["values"], packed["words"], bias)
        if spec.geometry is None:
            return ops.nm_linear, (*head, *spec.pattern, spec.shape[1])
        return ops.nm_conv2d, (*head, *spec.geometry, *spec.pattern, list(spec.shape))


class Dense:
    """The masked weight as it is, and a dense op: no faster and no smaller than the unpruned layer."""

    name = "dense"

    def supports(self, spec: LayerSpec) -> str | None:
        return None

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        return {"weight": weight * mask}

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        if spec.geometry is None:
            return torch.nn.functional.linear, (x, packed["weight"], bias)
        return torch.nn.functional.conv2d, (x, packed["weight"], bias, *spec.geometry)


ENGINES: tuple[Engine, ...] = (Reference(), Dense())


def choose(spec: LayerSpec, engine: str = "auto") -> tuple[Engine, str]:
    """The engine for a layer, and why.

    Args:
        engine: ``"auto"`` takes the first in :data:`ENGINES` that supports the layer; a name takes that one, or dense
            when it doesn't support the layer.

    Raises:
        ConfigError: no engine of that name.
    """
    if engine == "auto":
        for candidate in ENGINES:
            if candidate.supports(spec) is None:
                return candidate, "first that supports it"
    named = {candidate.name: candidate for candidate in ENGINES}
    if engine not in named:
        raise ConfigError("no such engine", expected=", ".join(["auto", *named]), found=repr(engine))
    reason = named[engine].supports(spec)
    return (named[engine], "asked for") if reason is None else (named["dense"], f"{engine}: {reason}")
