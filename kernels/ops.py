"""The ``mpcompile::`` operators of the IR.

They are registered as CompositeImplicitAutograd. In a graph each is one node, which passes and engines look for; N and
M are among the arguments of those with N:M weights. Below autograd each is plain torch code, which provides gradients,
fake tensors, export and Inductor's fusion. Each operator of a native kernel (``nm_gemm``, ``nm_mlp``, ``nm_conv``,
``nm_attention``) remains a single operator below autograd too: see :mod:`mpcompile.kernels.nm_linear.operators` and
:mod:`mpcompile.kernels.cpu.attention`. Arguments: :mod:`mpcompile.kernels.schema`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.library import Library

from mpcompile.errors import InputError
from mpcompile.kernels import autocast, schema
from mpcompile.kernels.cpu import attention as cpu_attention
from mpcompile.kernels.nm_linear import checks, reference
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.token_merge import attention, fused, pairs
from mpcompile.kernels.token_merge import reference as merging

NAMESPACE = "mpcompile"
Geometry = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups of a convolution
_LIBRARY = Library(NAMESPACE, "DEF")


def _masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return torch.nn.functional.linear(x, weight * mask, bias)


def _masked_conv2d(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    n: int,
    m: int,
) -> Tensor:
    return torch.nn.functional.conv2d(x, weight * mask, bias, stride, padding, dilation, groups)


_IMPLEMENTATIONS: dict[type[schema.Args], Callable[..., Any]] = {
    schema.MaskedLinearArgs: _masked_linear,
    schema.MaskedConv2dArgs: _masked_conv2d,
    schema.NmLinearArgs: reference.nm_linear,
    schema.NmConv2dArgs: reference.nm_conv2d,
    schema.TokenSizeArgs: merging.token_size,
    schema.TokenBiasArgs: attention.token_bias,
    schema.TokenMergeArgs: fused.token_merge,
    schema.TokenSaliencyArgs: attention.token_saliency,
    schema.TokenMeanArgs: merging.token_mean,
    schema.TokenFollowArgs: merging.token_follow,
    schema.TokenPairsArgs: pairs.token_pairs,
    schema.TokenSpreadArgs: merging.token_spread,
    schema.TokenAttentionArgs: attention.token_attention,
}
for _args, _implementation in _IMPLEMENTATIONS.items():
    _LIBRARY.define(_args.operator + _args.signature())
    _LIBRARY.impl(_args.operator, _implementation, "CompositeImplicitAutograd")

native.define(_LIBRARY)
cpu_attention.define(_LIBRARY)
autocast.define(_LIBRARY)

masked_linear = torch.ops.mpcompile.masked_linear.default
masked_conv2d = torch.ops.mpcompile.masked_conv2d.default
nm_linear = torch.ops.mpcompile.nm_linear.default
nm_conv2d = torch.ops.mpcompile.nm_conv2d.default
nm_gemm = torch.ops.mpcompile.nm_gemm.default
nm_mlp = torch.ops.mpcompile.nm_mlp.default
nm_conv = torch.ops.mpcompile.nm_conv.default
nm_attention = torch.ops.mpcompile.nm_attention.default
token_size = torch.ops.mpcompile.token_size.default
token_bias = torch.ops.mpcompile.token_bias.default
token_merge = torch.ops.mpcompile.token_merge.default
token_saliency = torch.ops.mpcompile.token_saliency.default
token_mean = torch.ops.mpcompile.token_mean.default
token_follow = torch.ops.mpcompile.token_follow.default
token_pairs = torch.ops.mpcompile.token_pairs.default
token_spread = torch.ops.mpcompile.token_spread.default
token_attention = torch.ops.mpcompile.token_attention.default

MASKED = frozenset({masked_linear, masked_conv2d})
NATIVE = frozenset({nm_gemm, nm_mlp, nm_conv})
PACKED = frozenset({nm_linear, nm_conv2d}) | NATIVE
MATCHING = frozenset({token_merge, token_saliency, token_follow, token_pairs})  # their MACs are the cost of matching
MERGING = MATCHING | {token_size, token_bias, token_mean, token_spread, token_attention}


def packed_call(
    x: Any,
    packed: Mapping[str, Any],
    bias: Any,
    *,
    shape: Sequence[int],
    geometry: Geometry | None,
    pattern: Sequence[int],
    layout: int,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the native operator for a layer and its arguments, which have no residual and no activation.

    Args:
        packed: the packed weight's ``values`` and ``index``.
        shape: shape of the dense weight.
        geometry: geometry of a convolution; None for a linear layer. A grouped one has
            more than one tap.
        pattern: (n, m).
        layout: layout of the packed weight.
    """
    n, m = pattern
    common: dict[str, Any] = {
        "x": x,
        "values": packed["values"],
        "index": packed["index"],
        "bias": bias,
        "n": n,
        "m": m,
    }
    common |= {"residual": None, "layout": layout, "activation": "none"}
    if geometry is None:
        return nm_gemm, tuple(schema.NmGemmArgs(out=shape[0], **common))
    stride, padding, dilation = (list(axes) for axes in geometry[:3])
    args = schema.NmConvArgs(stride=stride, padding=padding, dilation=dilation, shape=list(shape), **common)
    return nm_conv, tuple(args)


def packed_arguments(node: fx.Node) -> list[checks.PackedWeight]:
    """Return the packed weights that a node reads; empty if the node calls no native operator.

    Raises:
        InputError: the node lacks arguments, or has numbers for which no input is valid.
    """
    if node.target not in NATIVE:
        return []
    expected = schema.OPERATORS[schema.operator_name(node.target)]
    try:
        args: Any = expected.bind(node)
    except TypeError as error:
        present = [*expected.names()[: len(node.args)], *node.kwargs]
        names = ", ".join(expected.names())
        raise InputError(f"{node.target} lacks arguments", expected=names, found=", ".join(present)) from error
    return checks.stored(args)
