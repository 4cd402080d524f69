"""The CPU engine: native kernels for linear layers and convolutions, any N:M pattern, fp32 and bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpcompile.kernels import ops
from mpcompile.kernels.cpu import build
from mpcompile.kernels.engine import LayerSpec
from mpcompile.kernels.nm_linear import layouts, panels
from mpcompile.kernels.nm_linear import operators as native


def multiplies_pairs(dtype: torch.dtype) -> bool:
    """Return True if the kernels for ``dtype`` read pairs of columns: bf16, on processors with bf16 dot products."""
    return dtype is torch.bfloat16 and (lib := native.kernels()) is not None and bool(lib.nm_pairs())


def layout_of(spec: LayerSpec) -> int:
    """Return the layout that this processor runs fastest for a layer."""
    if not multiplies_pairs(spec.dtype):
        return layouts.ROWS
    return {"2:4": layouts.QUADS, "1:4": layouts.OCTS}.get(str(spec.pattern), layouts.RING)


class CpuEngine:
    """Packed values with byte indices, multiplied by C++ kernels that are compiled on this machine (build.py)."""

    name = "cpu"

    def supports(self, spec: LayerSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"device {spec.device.type}"
        if spec.dtype not in (torch.float32, torch.bfloat16):
            return f"dtype {str(spec.dtype).removeprefix('torch.')} (fp32 and bf16 have kernels)"
        if spec.geometry is not None:
            if spec.geometry[3] != 1 and native.pointwise(spec.shape):
                return "grouped 1x1 convolution"
            if spec.dtype is torch.bfloat16 and not native.pointwise(spec.shape):
                return "bf16 convolution other than 1x1"
        reason = build.unavailable()
        if reason is None:
            native.kernels()  # builds the operators before the first call
        return reason

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        values, index = layouts.pack(weight, mask, *spec.pattern, layout_of(spec))
        return {"values": values, "index": index}

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        shape, geometry, layout = spec.shape, spec.geometry, layout_of(spec)
        return ops.packed_call(x, packed, bias, shape=shape, geometry=geometry, pattern=spec.pattern, layout=layout)


class CpuDenseEngine:
    """Dense fp32 products, masked or not, with activation and residual in their epilogues (native/dense.h)."""

    name = "cpu_dense"

    def supports(self, spec: LayerSpec) -> str | None:
        if spec.device.type != "cpu":
            return f"device {spec.device.type}"
        if spec.dtype is not torch.float32:
            return f"dtype {str(spec.dtype).removeprefix('torch.')} (fp32 has a kernel)"
        if spec.geometry is not None:
            return "convolution"
        reason = build.unavailable()
        if reason is None:
            native.kernels()  # builds the operators before the first call
        return reason

    @staticmethod
    def packed(weight: Tensor) -> dict[str, Tensor]:
        """Return the tensors that replace a dense weight, by name."""
        values, index = panels.pack(weight)
        return {"values": values, "index": index}

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        return self.packed(weight * mask)

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        return ops.packed_call(
            x, packed, bias, shape=spec.shape, geometry=None, pattern=spec.pattern, layout=panels.PANELS
        )
