"""The GPU engines for 2:4: two kernels on sparse tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpcompile.kernels import ops
from mpcompile.kernels.engine import LayerSpec
from mpcompile.kernels.nm_linear import sparse24
from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch
from mpcompile.kernels.nm_linear.gpu.tiles import CONV_CHANNELS

DTYPES = (torch.float16, torch.bfloat16)


def unsupported(spec: LayerSpec, layout: int | None = None) -> str | None:
    """Return why no 2:4 kernel on a GPU runs a layer, or None if one does.

    Args:
        layout: one of ``sparse24.NAMES``; None for the kernels of cuSPARSELt.
    """
    if spec.device.type != "cuda":
        return f"device {spec.device.type}"
    if spec.dtype not in DTYPES:
        return f"dtype {str(spec.dtype).removeprefix('torch.')} (fp16 and bf16 have kernels)"
    if spec.pattern != (2, 4):
        return f"pattern {spec.pattern} (sparse tensor cores run 2:4)"
    if spec.shape[0] < 16:
        return "fewer than 16 outputs"
    if spec.shape[1] % 16:
        return f"{spec.shape[1]} inputs are not a multiple of 16"
    if spec.geometry is not None:
        if spec.geometry[3] != 1:
            return "grouped convolution"
        if tuple(spec.shape[2:]) != (1, 1):
            if layout != sparse24.MMA_SP:
                return "convolution other than 1x1"
            if not gpu_launch.direct(spec.shape, layout):
                return f"{spec.shape[1]} input channels of a convolution are not a multiple of {CONV_CHANNELS}"
    return None


class TensorCoreEngine:
    """2:4 products on sparse tensor cores, with bias, activation and residual in the epilogue (launch.py)."""

    def __init__(self, layout: int) -> None:
        self.layout, self.name = layout, gpu_launch.KERNELS[layout]

    def supports(self, spec: LayerSpec) -> str | None:
        why = unsupported(spec, self.layout) or gpu_launch.missing(spec.device.index, self.layout)
        if why is None and spec.shape[0] % 16 and gpu_launch.from_cubins():
            return f"{spec.shape[0]} outputs are not a multiple of 16, as cubins need them"
        return why

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        values, index = sparse24.pack(weight, mask, self.layout)
        return {"values": values, "index": index}

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        shape, geometry, layout = spec.shape, spec.geometry, self.layout
        return ops.packed_call(x, packed, bias, shape=shape, geometry=geometry, pattern=spec.pattern, layout=layout)


MMA_SP, WGMMA_SP = TensorCoreEngine(sparse24.MMA_SP), TensorCoreEngine(sparse24.WGMMA_SP)
