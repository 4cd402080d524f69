"""The ``mpcompile::`` operators of the IR.

They are registered as CompositeImplicitAutograd: on a graph they are one node each, with N and M written on it, so
that passes and engines find them; below autograd they are the plain torch code they stand for, so that gradients,
fake tensors, export and Inductor's fusion follow without a formula of our own. The operators of native kernels
(``nm_gemm``, ``nm_mlp``, ``nm_conv``) stay whole below autograd too: see :mod:`mpcompile.kernels.nm_linear.operators`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.library import Library

from mpcompile.errors import InputError
from mpcompile.kernels import autocast
from mpcompile.kernels.nm_linear import checks, reference
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.token_merge import fused
from mpcompile.kernels.token_merge import reference as merging

NAMESPACE = "mpcompile"
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


_CONV = "Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, int n, int m"
_DEFINITIONS = (
    ("masked_linear(Tensor x, Tensor weight, Tensor mask, Tensor? bias, int n, int m) -> Tensor", _masked_linear),
    (f"masked_conv2d(Tensor x, Tensor weight, Tensor mask, {_CONV}) -> Tensor", _masked_conv2d),
    (
        "nm_linear(Tensor x, Tensor values, Tensor words, Tensor? bias, int n, int m, int k) -> Tensor",
        reference.nm_linear,
    ),
    (f"nm_conv2d(Tensor x, Tensor values, Tensor words, {_CONV}, int[] shape) -> Tensor", reference.nm_conv2d),
    ("token_size(Tensor x, Tensor? mask=None) -> Tensor", merging.token_size),
    ("token_bias(Tensor size, Tensor logits, int start, int dim) -> Tensor", merging.token_bias),
    (
        "token_merge(Tensor x, Tensor keys, Tensor size, int r, int prefix) -> (Tensor, Tensor, Tensor)",
        fused.token_merge,
    ),
    ("token_mean(Tensor x, Tensor size, int start, int dim, bool keepdim) -> Tensor", merging.token_mean),
    (
        "token_follow(Tensor table, Tensor place, Tensor before, Tensor size, int start, int dim, int rank) -> Tensor",
        merging.token_follow,
    ),
    (
        "token_attention(Tensor query, Tensor key, Tensor value, Tensor size, int start, float dropout_p, "
        "float? scale, bool enable_gqa) -> Tensor",
        merging.token_attention,
    ),
)
for _schema, _implementation in _DEFINITIONS:
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_schema.split("(", 1)[0], _implementation, "CompositeImplicitAutograd")

native.define(_LIBRARY)
autocast.define(_LIBRARY)

masked_linear = torch.ops.mpcompile.masked_linear.default
masked_conv2d = torch.ops.mpcompile.masked_conv2d.default
nm_linear = torch.ops.mpcompile.nm_linear.default
nm_conv2d = torch.ops.mpcompile.nm_conv2d.default
nm_gemm = torch.ops.mpcompile.nm_gemm.default
nm_mlp = torch.ops.mpcompile.nm_mlp.default
nm_conv = torch.ops.mpcompile.nm_conv.default
token_size = torch.ops.mpcompile.token_size.default
token_bias = torch.ops.mpcompile.token_bias.default
token_merge = torch.ops.mpcompile.token_merge.default
token_mean = torch.ops.mpcompile.token_mean.default
token_follow = torch.ops.mpcompile.token_follow.default
token_attention = torch.ops.mpcompile.token_attention.default

MASKED = frozenset({masked_linear, masked_conv2d})
NATIVE = frozenset({nm_gemm, nm_mlp, nm_conv})
PACKED = frozenset({nm_linear, nm_conv2d}) | NATIVE
MERGING = frozenset({token_size, token_bias, token_merge, token_mean, token_follow, token_attention})


def packed_arguments(node: fx.Node) -> list[checks.PackedWeight]:
    """The packed weights that a node of a native operator takes; none of another.

    Raises:
        InputError: no input can fit the numbers on the node.
    """
    if node.target not in NATIVE:
        return []
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.keys() != set(names):
        raise InputError(f"{target} lacks arguments", expected=", ".join(names), found=", ".join(given))
    return checks.stored(target._schema.name.rpartition("::")[2], given)
