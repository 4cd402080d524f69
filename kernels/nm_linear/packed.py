"""The operators on CPU layouts, in plain torch: what the native kernels are checked against, and their gradient.

``nm_gemm``, ``nm_mlp`` and ``nm_conv`` take a weight in a layout of :mod:`mpcompile.kernels.nm_linear.layouts`, and do
bias, activation and residual in the same pass. Here the weight is spread out and dense operators follow.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mpcompile.kernels.nm_linear.layouts import unpack

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activate(x: Tensor, activation: str) -> Tensor:
    """One of :data:`ACTIVATIONS`, by name."""
    if activation == "relu":
        return F.relu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return F.silu(x) if activation == "silu" else x


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
    """x (..., in) -> activation(x W' + bias) + residual, (..., out)."""
    weight = unpack(values, index, (out, x.shape[-1]), n, m, layout)
    y = activate(F.linear(x, weight, bias), activation)
    return y if residual is None else y + residual


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
    """x (B, C, H, W) convolved with a weight of ``shape`` (out, C, kh, kw); then activation, then + residual."""
    weight = unpack(values, index, shape, n, m, layout)
    y = activate(F.conv2d(x, weight, bias, stride, padding, dilation), activation)
    return y if residual is None else y + residual
