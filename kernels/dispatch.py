"""The list of engines, and the choice of the one that runs a masked layer.

``"auto"`` takes the fastest engine that supports the layer, as timed on this machine (timing.py). A sparse engine must
beat the best dense build, our own among them, by more than the noise (:data:`MARGIN`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mpcompile.errors import ConfigError
from mpcompile.kernels import ops, schema, timing
from mpcompile.kernels.cpu.engine import CpuDenseEngine, CpuEngine, multiplies_pairs
from mpcompile.kernels.engine import DENSE, Candidate, Choice, Engine, LayerSpec
from mpcompile.kernels.nm_format import MAX_M, Pattern, pack
from mpcompile.kernels.nm_linear.gpu.cusparselt import CuSparseLtEngine
from mpcompile.kernels.nm_linear.gpu.engine import MMA_SP, WGMMA_SP
from mpcompile.kernels.nm_linear.gpu.expand import ExpandEngine

__all__ = [
    "DENSE",
    "ENGINES",
    "GPU_ENGINES",
    "MARGIN",
    "Candidate",
    "Choice",
    "CpuDenseEngine",
    "Dense",
    "Engine",
    "LayerSpec",
    "Reference",
    "auto_menu",
    "auto_pattern",
    "choose",
    "choose_all",
    "choose_dense",
    "engine_named",
]


class Reference:
    """Kept values and bit masks, unpacked at every call for a dense operator. Saves memory; slower than dense."""

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
    """The masked weight and a dense operator: neither faster nor smaller than the unpruned layer."""

    name = "dense"

    def supports(self, spec: LayerSpec) -> str | None:
        return None

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        return {"weight": weight * mask}

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        if spec.geometry is None:
            return torch.nn.functional.linear, (x, packed["weight"], bias)
        return torch.nn.functional.conv2d, (x, packed["weight"], bias, *spec.geometry)


# In order of preference, which decides where nothing is timed.
GPU_ENGINES: tuple[Engine, ...] = (WGMMA_SP, MMA_SP, CuSparseLtEngine(), ExpandEngine())
ENGINES: tuple[Engine, ...] = (CpuEngine(), CpuDenseEngine(), *GPU_ENGINES, Reference(), Dense())
MARGIN = 0.97  # a sparse engine must take less than this fraction of the best dense time
# The engine's dense product may take this fraction of another's: activation and residual, timed with neither, cost the
# other a pass over memory each.
DENSE_MARGIN = 1.05


def auto_pattern(device: torch.device, dtype: torch.dtype) -> tuple[Pattern, ...]:
    """Return the patterns of density 1/2 that the device runs at full speed, widest first (wider groups keep more).

    GPUs and processors that multiply bf16 in pairs of columns run only 2:4 at full speed. In wider groups some values
    have no partner close enough (``REACH`` in layouts.py).
    """
    if device.type == "cuda" or (device.type == "cpu" and multiplies_pairs(dtype)):
        return (Pattern(2, 4),)
    return Pattern(8, 16), Pattern(4, 8), Pattern(2, 4)


def auto_menu(device: torch.device, dtype: torch.dtype) -> tuple[Pattern, ...]:
    """Return the patterns that the device runs well, from which each layer's is chosen; widest groups first."""
    if device.type == "cuda":
        return (Pattern(2, 4),)
    if device.type == "cpu" and multiplies_pairs(dtype):
        return Pattern(2, 4), Pattern(1, 4)
    wide = [Pattern(n * m // 8, m) for m in (16, 8) for n in (6, 5, 4, 3, 2)]
    return *wide, Pattern(3, 4), Pattern(2, 4), Pattern(1, 4)


def engine_named(name: str) -> Engine:
    """Return one of :data:`ENGINES` by its name.

    Raises:
        ConfigError: there is no engine of that name.
    """
    named = {candidate.name: candidate for candidate in ENGINES}
    if name not in named:
        raise ConfigError("no such engine", expected=", ".join(["auto", *named]), found=repr(name))
    return named[name]


def choose(spec: LayerSpec, engine: str = "auto", *, measured: bool = False, frozen: bool = True) -> Choice:
    """Choose the engine for a layer.

    Args:
        engine: ``"auto"`` takes the fastest. If nothing can be timed (input shape unknown, or
            ``MPCOMPILE_TIMING=off``), it takes the first in :data:`ENGINES` that supports the layer. A name takes that
            engine, or dense if it does not support the layer.
        measured: time the candidates even if an engine is named, including those that cannot be the fastest.
        frozen: True if weights do not change. Dense layers can then be prepacked, and sparse engines have to beat that.

    Raises:
        ConfigError: there is no engine of that name.

    Example:
        >>> spec = LayerSpec((8, 8), torch.float32, torch.device("cpu"), Pattern(2, 4))
        >>> choose(spec, "dense").why
        'asked for'
    """
    dense = engine_named(Dense.name)
    asked = None if engine == "auto" else engine_named(engine)
    reasons = {candidate.name: candidate.supports(spec) for candidate in ENGINES}
    eligible = [candidate for candidate in ENGINES if reasons[candidate.name] is None]
    sparse = [candidate for candidate in eligible if candidate.name not in DENSE]
    if not measured and len(sparse) > 1:
        # The reference unpacks its weights at every call: it is never the fastest.
        sparse = [candidate for candidate in sparse if candidate.name != Reference.name]
        eligible = [candidate for candidate in eligible if candidate.name != Reference.name]
    us: dict[str, float] = {}
    if measured or (engine == "auto" and sparse):
        us = timing.times(spec, eligible) or {}
    names = [*reasons, *(name for name in us if name not in reasons)]
    candidates = tuple(Candidate(name, us.get(name), reasons.get(name)) for name in names)
    torchs = [name for name in DENSE if name in us and (frozen or name == "dense")]
    bars = [*torchs, *(name for name in (CpuDenseEngine.name,) if name in us)]
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
    best = min((c for c in sparse if c.name != CpuDenseEngine.name), key=lambda c: us[c.name], default=None)
    ratio = 0.0 if best is None else us[bar] / us[best.name]
    if best is not None and us[best.name] < MARGIN * us[bar]:
        return Choice(best, f"{ratio:.2f}x as fast as {bar}", candidates, us[bar])
    taken = dense
    if CpuDenseEngine.name in us and us[CpuDenseEngine.name] < DENSE_MARGIN * min(us[name] for name in torchs):
        taken = engine_named(CpuDenseEngine.name)
    why = "no sparse engine supports it" if best is None else f"{best.name} is only {ratio:.2f}x as fast as {bar}"
    return Choice(taken, why, candidates, us[bar])


def choose_all(
    specs: Sequence[LayerSpec],
    engine: str = "auto",
    *,
    measured: bool = False,
    frozen: bool = True,
    progress: bool | None = None,
) -> list[Choice]:
    """Call :func:`choose` for many layers, with a progress bar if it takes more than two seconds.

    Args:
        progress: False shows no bar; None shows one on a terminal.
    """
    hidden = None if progress is None else not progress
    bar = tqdm(specs, desc="time engines", unit="layer", delay=2, leave=False, disable=hidden)
    return [choose(spec, engine, measured=measured, frozen=frozen) for spec in bar]


def choose_dense(spec: LayerSpec, engine: str = "auto") -> Choice:
    """Choose between the CPU engine's dense product and Inductor's for a linear layer without a mask.

    Args:
        engine: as in :func:`choose`. Other engines than ``"auto"``, ``"cpu"`` and ``"cpu_dense"`` leave dense layers
            alone.

    Example:
        >>> choose_dense(LayerSpec((8, 8), torch.float64, torch.device("cpu"), Pattern(1, 1), inputs=(4, 8))).why
        'cpu_dense: dtype float64 (fp32 has a kernel)'
    """
    ours, dense = CpuDenseEngine(), Dense()
    reason = ours.supports(spec) if engine in ("auto", CpuEngine.name, ours.name) else f"engine {engine} was asked for"
    if reason is not None:
        why = reason if reason.endswith("asked for") else f"{ours.name}: {reason}"
        return Choice(dense, why, (Candidate(ours.name, None, reason),))
    if engine == ours.name:
        return Choice(ours, "asked for")
    us = timing.times(spec, [ours, dense]) or {}
    candidates = tuple(Candidate(name, us.get(name)) for name in {ours.name: 0, dense.name: 0, **us})
    bar = min((name for name in DENSE if name in us), key=us.__getitem__, default=None)
    if bar is None or ours.name not in us:
        unknown = "its input shape is unknown" if spec.inputs is None else "timing is off"
        return Choice(dense, f"not timed: {unknown}", candidates)
    ratio = us[bar] / us[ours.name]
    if us[ours.name] < DENSE_MARGIN * us[bar]:
        return Choice(
            ours, f"{ratio:.2f}x as fast as {bar}, with activation and residual to spare", candidates, us[bar]
        )
    return Choice(dense, f"{ours.name} is only {ratio:.2f}x as fast as {bar}", candidates, us[bar])
