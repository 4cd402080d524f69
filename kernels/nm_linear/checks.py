"""Checks of every number and tensor that a native kernel relies on, before any memory is allocated.

``nm_gemm``, ``nm_mlp`` and ``nm_conv`` run them first, on CPUs and GPUs. The fast path in ops.cpp makes the same checks
and sends every call that fails one here. The artifact loader makes the checks that need no input (:func:`stored`).
Python's integers are unbounded, so a number cannot overflow before it becomes a C ``int``.

A call does not inspect the contents of an index. They cannot lead a kernel out of bounds: a tile has as many rows as a
byte can name (layouts.h), and the table of a ``RING`` weight is read within its bounds (sweep.h).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.nm_format import MAX_M
from mpcompile.kernels.nm_linear import layouts, packed, panels, sparse24
from mpcompile.kernels.nm_linear.layouts import RING, ROWS
from mpcompile.kernels.schema import NativeArgs, NmConvArgs, NmGemmArgs, NmMlpArgs

COUNT = 2**31 - 1024  # most rows or columns of a weight: the kernels' counters are int, and run a few past the last
NUMBER = 2**31 - 1  # largest stride, padding, dilation or kernel size
BYTES = 2**47  # size of the largest tensor: the address space of a process
FREE = 2**28  # elements that padding, or a weight without columns, may need however small the input is
TIMES = 64  # beyond FREE, at most this many times the elements of the input
LAYOUTS = (*layouts.NAMES, *panels.NAMES, *sparse24.NAMES)


class PackedWeight(NamedTuple):
    """A packed weight among an operator's arguments.

    ``values`` and ``index`` are tensors, or graph nodes. In a graph the columns of a matrix are unknown: None.
    """

    values: Any
    index: Any
    shape: tuple[Any, ...]
    n: Any
    m: Any
    layout: Any

    @property
    def title(self) -> str:
        return f"packed weights do not fit a weight {tuple(self.shape)} {self.n}:{self.m}"


def weights(args: NativeArgs, columns: int | None = None) -> list[PackedWeight]:
    """Return the packed weights among an operator's arguments.

    Args:
        args: arguments of ``nm_gemm``, ``nm_mlp`` or ``nm_conv``.
        columns: number of features of the input.
    """
    if isinstance(args, NmMlpArgs):
        one = PackedWeight(args.values1, args.index1, (args.hidden, columns), args.n1, args.m1, args.layout1)
        two = PackedWeight(args.values2, args.index2, (args.out, args.hidden), args.n2, args.m2, args.layout2)
        return [one, two]
    shape = (args.out, columns) if isinstance(args, NmGemmArgs) else tuple(args.shape)
    return [PackedWeight(args.values, args.index, shape, args.n, args.m, args.layout)]


@functools.lru_cache(maxsize=4096)
def _can_be(shape: tuple[int, ...], n: int, m: int, layout: int) -> bool:
    good = len(shape) in (2, 4) and min(shape) >= 0 and min(shape[2:], default=1) >= 1
    good = good and 1 <= n <= m <= MAX_M and layout in LAYOUTS and shape[1] % m == 0
    good = good and (layout not in panels.NAMES or len(shape) == 2)
    return good and shape[0] <= COUNT and math.prod(shape[1:]) <= COUNT


def weight_numbers(shape: tuple[int, ...], n: int, m: int, layout: int) -> None:
    """Check that a packed weight can have this shape, pattern and layout.

    Raises:
        InputError: it cannot.
    """
    if not all(type(number) is int for number in (*shape, n, m, layout)) or not _can_be(shape, n, m, layout):
        raise InputError(
            "no packed weight has these numbers",
            expected=f"1 <= N <= M <= {MAX_M}, inputs in groups of M, a layout of {sorted(LAYOUTS)}, sizes <= {COUNT}",
            found=f"{_abbreviated(n)}:{_abbreviated(m)}, layout {_abbreviated(layout)}, a weight {_abbreviated(shape)}",
            hint="lower the module again with mpcompile.lower",
        )


def _abbreviated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def epilogue(activation: object, known: Sequence[str] = packed.EPILOGUES) -> None:
    """Check that an activation is one of those that the operator has.

    Raises:
        InputError: it is not.
    """
    if activation not in known:
        raise InputError("no such activation", expected=", ".join(known), found=_abbreviated(activation))


def held(x: Tensor, weight: PackedWeight) -> None:
    """Check that ``values`` and ``index`` hold a complete packed weight for inputs like ``x``.

    Raises:
        InputError: their dtype, device, size or memory order differs from that of packed tensors.
    """
    values, index, shape, n, m, layout = weight
    weight_numbers(shape, n, m, layout)
    strided = all(t.layout == torch.strided for t in (x, values, index))
    whole = strided and all(t.device == x.device and t.is_contiguous() for t in (values, index))
    mixed = values.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type)
    if not whole or mixed or index.dtype is not torch.uint8:
        raise InputError(
            weight.title,
            expected=f"values in {x.dtype} and an index in uint8, contiguous, on the {x.device.type.upper()}",
            found=", ".join(map(_described, (values, index) if strided else (x, values, index))),
        )
    if not layouts.fits(values.numel(), index.numel(), shape, n, m, layout):
        raise InputError(
            weight.title,
            expected=f"tensors from layouts.pack in layout {layouts.NAMES.get(layout, layout)}",
            found=f"{values.numel()} values, {index.numel()} index bytes",
        )
    if layout == ROWS and len(shape) == 2 and index.is_cpu and math.prod(shape):
        # Padding makes the sizes equal for a few features more or less, but the last row's places still differ.
        width, entries, kept = layouts.last_places(shape[1], n, m)
        end = index.reshape(-1)[-entries:].tolist()
        if end[kept - 1] < width - m or any(end[kept:]):
            raise InputError(
                weight.title, expected="an input with as many features as were packed", found=f"{shape[1]} features"
            )
    if layout == RING:
        end = layouts.table_bytes(shape, m)
        entries = int(index.reshape(-1)[end - 4 : end].clone().view(torch.int32))
        if not 0 <= entries <= values.numel() // 2:
            raise InputError("the table of packed weights is damaged", hint="pack or save them again")


def _described(tensor: Tensor) -> str:
    order = f"strides {tensor.stride()}" if tensor.layout == torch.strided else str(tensor.layout)
    return f"{tensor.dtype} on {tensor.device}, {order}"


def room(shape: Sequence[int], dtype: torch.dtype, most: int | None = None) -> None:
    """Check that an output, or a padded input, is small enough to allocate.

    Args:
        most: limit in elements, for shapes that are not bounded by those of existing tensors.

    Raises:
        InputError: it is too large.
    """
    limit = BYTES // dtype.itemsize if most is None else most
    if math.prod(shape) > limit:
        raise InputError(
            "the output, or the padded input, is too large",
            expected=f"at most {limit} elements",
            found=_abbreviated(tuple(shape)),
            hint="use smaller padding or a smaller batch",
        )


def beside(bias: Tensor | None, residual: Tensor | None, shape: Sequence[int], out: int, x: Tensor) -> None:
    """Check that a bias has ``out`` values, that a residual broadcasts to ``shape``, and that both are on x's device.

    Raises:
        InputError: one of them does not.
    """
    if bias is not None and bias.shape != (out,):
        raise InputError("the bias does not fit", expected=f"({out},)", found=tuple(bias.shape))
    if residual is not None and residual.shape != tuple(shape):
        pairs = zip(reversed(residual.shape), reversed(shape), strict=False)
        if residual.dim() > len(shape) or any(size not in (1, whole) for size, whole in pairs):
            raise InputError("the residual does not fit", expected=tuple(shape), found=tuple(residual.shape))
    for tensor in (bias, residual):
        if tensor is not None and tensor.device != x.device:
            raise InputError("a bias or residual is on another device", expected=x.device, found=tensor.device)


def gemm(x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None, activation: str) -> None:
    """Check the arguments of ``nm_gemm``.

    Raises:
        InputError: one is invalid.
    """
    epilogue(activation)
    tokens(x)
    held(x, weight)
    shape = (*x.shape[:-1], weight.shape[0])
    room(shape, x.dtype, None if weight.shape[1] else FREE)
    beside(bias, residual, shape, weight.shape[0], x)


def mlp(
    x: Tensor,
    weights: tuple[PackedWeight, PackedWeight],
    biases: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    activation: str,
) -> None:
    """Check the arguments of ``nm_mlp``.

    Raises:
        InputError: one is invalid.
    """
    epilogue(activation, packed.ACTIVATIONS)
    tokens(x)
    for weight, bias, added in zip(weights, biases, (None, residual), strict=True):
        held(x, weight)
        shape = (*x.shape[:-1], weight.shape[0])
        room(shape, x.dtype, None if weight.shape[1] else FREE)
        beside(bias, added, shape, weight.shape[0], x)


def tokens(x: Tensor) -> None:
    """Check that the input has an axis of features.

    Raises:
        InputError: it is a scalar.
    """
    if not x.dim():
        raise InputError("a matrix product cannot read this input", expected="(..., features)", found="a single number")


def geometry(shape: Any, stride: Any, padding: Any, dilation: Any) -> None:
    """Check that a convolution can have these numbers.

    Raises:
        InputError: it cannot.
    """
    axes = [*stride, *padding, *dilation, *shape]
    good = len(shape) == 4 and len(stride) == len(padding) == len(dilation) == 2
    if good and all(type(number) is int and 0 <= number <= NUMBER for number in axes):
        good = min(*stride, *dilation, *shape[2:]) >= 1
    else:
        good = False
    if not good:
        raise InputError(
            "no convolution has these numbers",
            expected=f"a shape (out, in, height, width), stride, dilation and padding (two each) up to {NUMBER}",
            found=", ".join(map(_abbreviated, (tuple(shape), stride, dilation, padding))),
            hint="lower the module again with mpcompile.lower",
        )


def conv(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    axes: tuple[Sequence[int], Sequence[int], Sequence[int]],
    activation: str,
) -> tuple[int, int, int, int]:
    """Check the arguments of ``nm_conv``. The input has the channels of one group, or those of several.

    Args:
        axes: stride, padding, dilation.

    Returns:
        The shape of the output.

    Raises:
        InputError: an argument is invalid.
    """
    shape, (stride, padding, dilation) = weight.shape, axes
    epilogue(activation)
    geometry(shape, stride, padding, dilation)
    groups = x.shape[1] // max(1, shape[1]) if x.dim() == 4 else 0
    fits = x.dim() == 4 and x.shape[1] == groups * shape[1] and (groups or not shape[1])
    if not fits or shape[0] % max(1, groups):
        raise InputError(f"a convolution {tuple(shape)} cannot read this input", found=tuple(x.shape))
    held(x, weight)
    padded = [size + 2 * p for size, p in zip(x.shape[2:], padding, strict=True)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, shape[2:], strict=True)]
    if any(r > size for r, size in zip(reach, padded, strict=True)):
        raise InputError(
            "the kernel is larger than the padded image", expected=f"at most {padded}", found=f"{reach}, with dilation"
        )
    high, wide = ((size - r) // s + 1 for size, r, s in zip(padded, reach, stride, strict=True))
    most = max(FREE, TIMES * x.numel())
    room((x.shape[0], max(1, x.shape[1]), *padded), x.dtype, most)
    room((x.shape[0], shape[0], high, wide), x.dtype, most * max(1, -(-shape[0] // x.shape[1])) if shape[1] else FREE)
    size = (x.shape[0], shape[0], high, wide)
    beside(bias, residual, size, shape[0], x)
    return size


def stored(args: NativeArgs) -> list[PackedWeight]:
    """Return the packed weights of a node after checking its numbers, as far as possible without an input.

    Args:
        args: the node's arguments.

    Raises:
        InputError: the operator would refuse any input.
    """
    epilogue(args.activation, packed.ACTIVATIONS if isinstance(args, NmMlpArgs) else packed.EPILOGUES)
    if isinstance(args, NmConvArgs):
        geometry(args.shape, args.stride, args.padding, args.dilation)
    packed_weights = weights(args)
    for weight in packed_weights:
        weight_numbers(tuple(0 if size is None else size for size in weight.shape), weight.n, weight.m, weight.layout)
    return packed_weights


def contents(weight: PackedWeight, values: Tensor, index: Tensor) -> None:
    """Check that a file's tensors hold the weight, and that the index stays inside the weight's blocks.

    Raises:
        InputError: the tensors do not hold the weight, or the index leaves its blocks.
    """
    shape = None if None in weight.shape else weight.shape
    layouts.check(values, index, weight.m, weight.layout, shape)
    rows = weight.shape[0] or 0
    if weight.layout == ROWS and rows and len(index) % rows == 0:
        layouts.check_places(index, weight.shape, weight.n, weight.m)
    if not values.is_contiguous() or not index.is_contiguous():
        raise InputError("packed weights have gaps in memory", expected="contiguous vectors", found=values.stride())
    if shape is not None:
        held(values, weight._replace(values=values, index=index))
