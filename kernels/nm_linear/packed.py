"""The native operators in plain torch: the reference that kernels are tested against, and the source of gradients.

``nm_gemm``, ``nm_mlp`` and ``nm_conv`` take a weight in a layout of :mod:`mpcompile.kernels.nm_linear.layouts`. The
kernels apply bias, activation and residual in an epilogue. Here the weight is unpacked, and dense operators follow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.nm_linear.layouts import unpack

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
AFTER_RESIDUAL = "add_"  # prefix of an activation that follows the residual addition, as in a ResNet
EPILOGUES = (*ACTIVATIONS, *(AFTER_RESIDUAL + name for name in ACTIVATIONS))


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply one of :data:`ACTIVATIONS` by name."""
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.silu(x) if activation == "silu" else x


def finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """Return activation(y) + residual, or activation(y + residual) for an epilogue that begins with ``add_``."""
    late = activation.startswith(AFTER_RESIDUAL)
    y = y if late else activate(y, activation)
    y = y if residual is None else y + residual
    return activate(y, activation.removeprefix(AFTER_RESIDUAL)) if late else y


def row(vector: Tensor | None, out: int, dtype: torch.dtype) -> Tensor | None:
    """Return a bias, or another vector of ``out`` values, as the kernels read it.

    Raises:
        InputError: it has another shape.
    """
    if vector is None:
        return None
    if vector.shape != (out,):
        raise InputError("the bias does not fit", expected=f"({out},)", found=tuple(vector.shape))
    return vector.to(dtype).contiguous()


def runs_last(x: Tensor) -> bool:
    """Return True if a batch of images is channels last. A batch that fits both memory formats counts as contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def nm_gemm(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: int,
    n: int,
    m: int,
    layout: int,
    activation: str,
) -> Tensor:
    """x (..., in) -> activation(x W' + bias) + residual, (..., out); see :func:`finish`."""
    weight = unpack(values, index, (out, x.shape[-1]), n, m, layout)
    return finish(F.linear(x, weight, bias), residual, activation)


def nm_mlp(
    x: Tensor,
    values1: Tensor,
    index1: Tensor,
    bias1: Tensor | None,
    values2: Tensor,
    index2: Tensor,
    bias2: Tensor | None,
    residual: Tensor | None,
    hidden: int,
    out: int,
    n1: int,
    m1: int,
    n2: int,
    m2: int,
    layout1: int,
    layout2: int,
    activation: str,
) -> Tensor:
    """x (..., in) -> activation(x W1' + bias1) W2' + bias2 + residual, (..., out)."""
    h = nm_gemm(x, values1, index1, bias1, None, hidden, n1, m1, layout1, activation)
    return nm_gemm(h, values2, index2, bias2, residual, out, n2, m2, layout2, "none")


def nm_conv(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    n: int,
    m: int,
    shape: list[int],
    layout: int,
    activation: str,
) -> Tensor:
    """x (B, C, H, W) convolved with a weight of ``shape`` (out, C / groups, kh, kw), and :func:`finish`."""
    weight = unpack(values, index, shape, n, m, layout)
    groups = x.shape[1] // max(1, shape[1])
    return finish(F.conv2d(x, weight, bias, stride, padding, dilation, max(1, groups)), residual, activation)
