"""The engine protocol: a layer as an engine sees it, what an engine provides, and a choice among engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mpcompile.kernels.nm_format import Pattern

PREPACKED = "dense prepacked"
DENSE = ("dense", PREPACKED)  # names of the dense builds that a sparse engine has to beat


@dataclass(frozen=True)
class LayerSpec:
    """One masked layer as an engine sees it.

    Attributes:
        shape: shape of the weight, (out, in) or (out, in / groups, kh, kw).
        geometry: (stride, padding, dilation, groups), or None for a linear layer.
        inputs: example shape of the input, (..., in) or (B, C, H, W); None if unknown.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pattern: Pattern
    geometry: tuple[list[int], list[int], list[int], int] | None = None
    inputs: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int | None:
        """Rows of the matrix product: tokens or output pixels of the batch. None if the input shape is unknown."""
        if self.inputs is None:
            return None
        if self.geometry is None:
            return math.prod(self.inputs[:-1])
        axes = zip(self.inputs[2:], self.shape[2:], *self.geometry[:3], strict=True)
        return self.inputs[0] * math.prod((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)


class Engine(Protocol):
    """One way to run masked layers. See :mod:`mpcompile.kernels.dispatch` for the engines and the choice among them.

    Example:
        >>> from mpcompile.kernels.dispatch import engine_named
        >>> spec = LayerSpec((8, 8), torch.int8, torch.device("cpu"), Pattern(2, 4))
        >>> engine_named("reference").supports(spec)
        'dtype torch.int8'
    """

    name: str

    def supports(self, spec: LayerSpec) -> str | None:
        """Return why the engine cannot run the layer, or None if it can."""

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        """Return the tensors that replace the weight, by name."""

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        """Return the operator to call and its arguments.

        Args:
            spec: the layer.
            x: the input, a tensor or the graph node that yields it. The same holds for ``packed`` and ``bias``.
            packed: the tensors that :meth:`pack` returned, by name.
            bias: the bias, or None.
        """


@dataclass(frozen=True)
class Candidate:
    """An engine that a layer could use, with its time or the reason why it cannot run the layer.

    Attributes:
        us: microseconds per call; None if not timed.
        reason: why the engine cannot run the layer; None if it can.
    """

    name: str
    us: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """The engine for a layer, the reason, and the candidates it was chosen from.

    Attributes:
        dense_us: microseconds of the fastest dense build, which a sparse engine has to beat; None if nothing was timed.
    """

    engine: Engine
    why: str
    candidates: tuple[Candidate, ...] = ()
    dense_us: float | None = None

    @property
    def us(self) -> float | None:
        """Microseconds of the chosen engine; None if nothing was timed."""
        if self.engine.name in DENSE:
            return self.dense_us
        return next((c.us for c in self.candidates if c.name == self.engine.name), None)
