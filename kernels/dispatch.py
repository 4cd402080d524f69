"""Engines: what can run a masked layer, and which one does.

Among the engines that support a layer, ``"auto"`` takes the fastest, as timed on this machine (see timing.py), and a
sparse one only if it beats the best dense build of the layer by more than the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from mpcompile.errors import ConfigError
from mpcompile.kernels import ops, schema, timing
from mpcompile.kernels.nm_format import MAX_M, Pattern, pack
from mpcompile.kernels.nm_linear.cpu.engine import CpuEngine, multiplies_pairs
from mpcompile.kernels.nm_linear.gpu.cusparselt import CuSparseLtEngine
from mpcompile.kernels.nm_linear.gpu.engine import MMA_SP, WGMMA_SP
from mpcompile.kernels.nm_linear.gpu.expand import ExpandEngine


@dataclass(frozen=True)
class LayerSpec:
    """One masked layer as an engine sees it.

    Attributes:
        shape: of the weight, (out, in) or (out, in / groups, kh, kw).
        geometry: (stride, padding, dilation, groups), or None for a linear layer.
        inputs: example shape of the input, (..., in) or (B, C, H, W); None where it isn't known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    pattern: Pattern
    geometry: tuple[list[int], list[int], list[int], int] | None = None
    inputs: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int | None:
        """Rows of the matrix product: tokens of the whole batch, or output pixels. None where the input is unknown."""
        if self.inputs is None:
            return None
        if self.geometry is None:
            return math.prod(self.inputs[:-1])
        axes = zip(self.inputs[2:], self.shape[2:], *self.geometry[:3], strict=True)
        return self.inputs[0] * math.prod((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes)


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
        values, words, (n, m) = packed["values"], packed["words"], spec.pattern
        if spec.geometry is None:
            return ops.nm_linear, tuple(schema.NmLinearArgs(x, values, words, bias, n, m, k=spec.shape[1]))
        shape, geometry = list(spec.shape), spec.geometry
        return ops.nm_conv2d, tuple(schema.NmConv2dArgs(x, values, words, bias, *geometry, n, m, shape))


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


# The preferred ones first, for want of timings.
GPU_ENGINES: tuple[Engine, ...] = (WGMMA_SP, MMA_SP, CuSparseLtEngine(), ExpandEngine())
ENGINES: tuple[Engine, ...] = (CpuEngine(), *GPU_ENGINES, Reference(), Dense())
MARGIN = 0.97  # a sparse engine has to take less than this share of the best dense time


def auto_pattern(device: torch.device, dtype: torch.dtype) -> tuple[Pattern, ...]:
    """Patterns of density 1/2 that the device's engines run at full speed, widest first (wider ones keep more).

    Where bf16 is multiplied in pairs of columns, that is 2:4 alone: in a wider group some values find no partner.
    """
    if device.type == "cuda" or (device.type == "cpu" and multiplies_pairs(dtype)):
        return (Pattern(2, 4),)
    return Pattern(8, 16), Pattern(4, 8), Pattern(2, 4)


def auto_menu(device: torch.device, dtype: torch.dtype) -> tuple[Pattern, ...]:
    """Patterns to choose from layer by layer, where the device's engines run them well; widest groups first."""
    if device.type == "cuda":
        return (Pattern(2, 4),)
    if device.type == "cpu" and multiplies_pairs(dtype):
        return Pattern(2, 4), Pattern(1, 4)
    wide = [Pattern(n * m // 8, m) for m in (16, 8) for n in (6, 5, 4, 3, 2)]
    return *wide, Pattern(3, 4), Pattern(2, 4), Pattern(1, 4)


@dataclass(frozen=True)
class Candidate:
    """What is known of one way to run a layer: microseconds a call, or why it can't run it. Both None: not timed."""

    name: str
    us: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Choice:
    """The engine for a layer, why, and what it was chosen from.

    Attributes:
        dense_us: microseconds of what a sparse engine has to beat; None where nothing was timed.
    """

    engine: Engine
    why: str
    candidates: tuple[Candidate, ...] = ()
    dense_us: float | None = None

    @property
    def us(self) -> float | None:
        """Microseconds of what was chosen, or None where nothing was timed."""
        if self.engine.name in timing.DENSE:
            return self.dense_us
        return next((c.us for c in self.candidates if c.name == self.engine.name), None)


def engine_named(name: str) -> Engine:
    """One of :data:`ENGINES`.

    Raises:
        ConfigError: no engine of that name.
    """
    named = {candidate.name: candidate for candidate in ENGINES}
    if name not in named:
        raise ConfigError("no such engine", expected=", ".join(["auto", *named]), found=repr(name))
    return named[name]


def choose(spec: LayerSpec, engine: str = "auto", *, measured: bool = False, frozen: bool = True) -> Choice:
    """The engine for a layer.

    Args:
        engine: ``"auto"`` takes the fastest; where it can't be timed (input shape unknown, or switched off by
            ``MPCOMPILE_TIMING=off``), the first in :data:`ENGINES` that supports the layer. A name takes that one, or
            dense when it doesn't support the layer.
        measured: time the candidates also when one is asked for, and those that can't be the fastest.
        frozen: weights don't change: dense layers are prepacked, and that is what the others have to beat.

    Raises:
        ConfigError: no engine of that name.

    Example:
        >>> spec = LayerSpec((8, 8), torch.float32, torch.device("cpu"), Pattern(2, 4))
        >>> choose(spec, "dense").why
        'asked for'
    """
    dense = engine_named(Dense.name)
    asked = None if engine == "auto" else engine_named(engine)
    reasons = {candidate.name: candidate.supports(spec) for candidate in ENGINES}
    eligible = [candidate for candidate in ENGINES if reasons[candidate.name] is None]
    sparse = [candidate for candidate in eligible if candidate.name not in timing.DENSE]
    if not measured and len(sparse) > 1:
        sparse = [candidate for candidate in sparse if candidate.name != Reference.name]  # it spreads weights: slower
        eligible = [candidate for candidate in eligible if candidate.name != Reference.name]
    us: dict[str, float] = {}
    if measured or (engine == "auto" and sparse):
        us = timing.times(spec, eligible) or {}
    names = [*reasons, *(name for name in us if name not in reasons)]
    candidates = tuple(Candidate(name, us.get(name), reasons.get(name)) for name in names)
    bars = [name for name in timing.DENSE if name in us and (frozen or name == "dense")]
    bar = min(bars, key=us.__getitem__, default=None)
    dense_us = None if bar is None else us[bar]
    if asked is not None:
        reason = reasons[engine]
        taken, why = (asked, "asked for") if reason is None else (dense, f"{engine}: {reason}")
        return Choice(taken, why, candidates, dense_us)
    if not sparse:
        return Choice(dense, "no other engine supports it", candidates, dense_us)
    if bar is None:
        unknown = "its input shape is unknown" if spec.inputs is None else "timing is off"
        return Choice(eligible[0], f"first that supports it: {unknown}", candidates)
    best = min(sparse, key=lambda candidate: us[candidate.name])
    ratio = us[bar] / us[best.name]
    if us[best.name] < MARGIN * us[bar]:
        return Choice(best, f"{ratio:.2f}x as fast as {bar}", candidates, us[bar])
    return Choice(dense, f"{best.name} is only {ratio:.2f}x as fast as {bar}", candidates, us[bar])


def choose_all(
    specs: Sequence[LayerSpec],
    engine: str = "auto",
    *,
    measured: bool = False,
    frozen: bool = True,
    progress: bool | None = None,
) -> list[Choice]:
    """:func:`choose` for many layers, with a progress bar where it takes long.

    Args:
        progress: False shows no bar; None shows one on a terminal.
    """
    hidden = None if progress is None else not progress
    bar = tqdm(specs, desc="time engines", unit="layer", delay=2, leave=False, disable=hidden)
    return [choose(spec, engine, measured=measured, frozen=frozen) for spec in bar]
