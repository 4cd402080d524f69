"""The native operators as torch sees them: CPU kernel, fake kernel, gradient.

Each is registered under two names. Graphs hold ``nm_gemm``, ``nm_mlp`` and ``nm_conv``. On CPUs, once the kernels are
built, C++ (``ops.cpp``) implements these: it passes plain calls straight to a kernel, and all others to
``nm_gemm_general``, ``nm_mlp_general`` and ``nm_conv_general``. The Python of this file implements the general names,
and both where the C++ cannot be built. Where there is no kernel (no compiler, or a layout made for another processor),
the plain torch of packed.py runs instead, slowly. Gradients are computed from the masked dense weight that the layout
holds, also by packed.py.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.library import Library

from mpcompile.kernels.cpu import abi, build
from mpcompile.kernels.nm_linear import checks, packed, panels, sparse24
from mpcompile.kernels.nm_linear.checks import PackedWeight
from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch
from mpcompile.kernels.nm_linear.layouts import ROWS
from mpcompile.kernels.schema import Args, NativeArgs, NmConvArgs, NmGemmArgs, NmMlpArgs

_NUMBER = {name: number for number, name in enumerate(packed.EPILOGUES)}
_IS_BF16 = {torch.float32: 0, torch.bfloat16: 1}
_FIRST_USE = threading.RLock()
GENERAL = "_general"  # suffix of the operators in Python that the ones in C++ fall back on
_TOKENS, _PLANES = 0, 1  # memory formats of activations, as in abi.h


@functools.cache
def kernels() -> Any:
    """The library of kernels, or None if there is none; from now on the operators in C++ call it."""
    with _FIRST_USE:
        lib = build.library() if build.unavailable() is None else None
        use(lib)
        return lib


def use(lib: build.Kernels | None) -> None:
    """Make the operators in C++ call these kernels; with None, they call the general operators."""
    if lib is None and not build.operators.cache_info().currsize:
        return  # the operators in C++ are not loaded and call no kernels
    operators = build.operators()
    if operators is not None:
        operators.use(lib)


def runs(x: Tensor, values: Tensor, *layouts: int) -> bool:
    """True if the kernels support these tensors on this processor."""
    lib = kernels()
    if lib is None or not x.is_cpu or x.dtype not in _IS_BF16 or values.dtype is not x.dtype:
        return False
    if any(layout in sparse24.NAMES for layout in layouts):
        return False
    if any(layout in panels.NAMES for layout in layouts):
        return x.dtype is torch.float32 and all(layout in (ROWS, panels.PANELS) for layout in layouts)
    return all(layout == ROWS for layout in layouts) or (lib.nm_pairs() == 1 and x.dtype is torch.bfloat16)


def _added(residual: Tensor | None, y: Tensor) -> Tensor | None:
    """The residual as the kernels read it: with the output's shape, dtype and memory format."""
    if residual is None:
        return None
    order = torch.channels_last if y.dim() == 4 and packed.runs_last(y) else torch.contiguous_format
    return residual.to(y.dtype).expand(y.shape).contiguous(memory_format=order)


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _weight(weight: PackedWeight, bias: Tensor | None) -> abi.Weight:
    """The weight of a matrix product or convolution, and its bias, as the kernels take them."""
    outputs, inputs = weight.shape[:2]
    values, index = weight.values.data_ptr(), weight.index.data_ptr()
    return abi.Weight(values, index, _at(bias), inputs, outputs, weight.n, weight.m, weight.layout)


def _checked(failed: int) -> None:
    if failed:
        raise MemoryError("an N:M kernel ran out of memory for its activations: use a smaller batch")


def _gemm(
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
    k = x.shape[-1] if x.dim() else 0
    weight = PackedWeight(values, index, (out, k), n, m, layout)
    checks.gemm(x, weight, bias, residual, activation)
    if not runs(x, values, layout) or not k:
        return packed.nm_gemm(x, values, index, bias, residual, out, n, m, layout, activation)
    y = x.new_empty((*x.shape[:-1], out))
    if y.numel():
        x, bias, residual = x.contiguous(), packed.row(bias, out, x.dtype), _added(residual, y)
        args = abi.Linear(
            x=x.data_ptr(),
            residual=_at(residual),
            y=y.data_ptr(),
            weight=_weight(weight, bias),
            tokens=y.numel() // out,
            pixels=1,
            bf16=_IS_BF16[x.dtype],
            format=_TOKENS,
            activation=_NUMBER[activation],
            threads=torch.get_num_threads(),
        )
        _checked(kernels().nm_linear(args))
    return y


def _mlp(
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
    k = x.shape[-1] if x.dim() else 0
    one = PackedWeight(values1, index1, (hidden, k), n1, m1, layout1)
    two = PackedWeight(values2, index2, (out, hidden), n2, m2, layout2)
    checks.mlp(x, (one, two), (bias1, bias2), residual, activation)
    apart = (layout1 == ROWS) != (layout2 == ROWS) or panels.PANELS in (layout1, layout2) or not k * hidden
    if apart or not runs(x, values1, layout1, layout2) or values2.dtype is not x.dtype:
        h = _gemm(x, values1, index1, bias1, None, hidden, n1, m1, layout1, activation)
        return _gemm(h, values2, index2, bias2, residual, out, n2, m2, layout2, "none")
    y = x.new_empty((*x.shape[:-1], out))
    if y.numel():
        x, bias1, bias2 = x.contiguous(), packed.row(bias1, hidden, x.dtype), packed.row(bias2, out, x.dtype)
        residual = _added(residual, y)
        args = abi.Mlp(
            x=x.data_ptr(),
            residual=_at(residual),
            y=y.data_ptr(),
            first=_weight(one, bias1),
            second=_weight(two, bias2),
            tokens=x.numel() // k,
            bf16=_IS_BF16[x.dtype],
            activation=packed.ACTIVATIONS.index(activation),
            threads=torch.get_num_threads(),
        )
        _checked(kernels().nm_mlp(args))
    return y


def _without_channels(
    x: Tensor, sizes: tuple[int, ...], bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """The output of a convolution with no input channels: its bias at every pixel, then residual and activation."""
    order = torch.channels_last if packed.runs_last(x) else torch.contiguous_format
    y = torch.zeros(sizes, dtype=x.dtype, device=x.device)
    y = y if bias is None else y + bias.to(x.dtype)[:, None, None]
    return packed.finish(y, residual, activation).contiguous(memory_format=order)


def pointwise(shape: Sequence[int]) -> bool:
    """True if a convolution is a matrix product over pixels, that is, has a 1x1 kernel."""
    return shape[2] == shape[3] == 1


def _sizes(x: Tensor, shape: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> list[Any]:
    """Sizes of the output, which may be symbolic."""
    edges = zip(x.shape[2:], shape[2:], stride, padding, dilation, strict=True)
    return [x.shape[0], shape[0], *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in edges)]


def _conv(
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
    axes = (stride, padding, dilation)
    weight = PackedWeight(values, index, tuple(shape), n, m, layout)
    sizes = checks.conv(x, weight, bias, residual, axes, activation)
    flat = pointwise(shape)
    if not shape[1]:
        return _without_channels(x, sizes, bias, residual, activation)
    groups = x.shape[1] // shape[1]
    without_kernel = groups > 1 if flat else x.dtype is not torch.float32
    if without_kernel or not runs(x, values, layout):
        y = packed.nm_conv(x, values, index, bias, residual, stride, padding, dilation, n, m, shape, layout, activation)
        return y.contiguous(memory_format=torch.channels_last if packed.runs_last(x) else torch.contiguous_format)
    last = packed.runs_last(x)
    order = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(sizes, dtype=x.dtype, memory_format=order)
    if not y.numel():
        return y
    if flat and any(padding):
        x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    if flat and stride != [1, 1]:
        x = x[:, :, :: stride[0], :: stride[1]]
    x, bias = x.contiguous(memory_format=order), packed.row(bias, shape[0], x.dtype)
    residual = _added(residual, y)
    shared = {
        "x": x.data_ptr(),
        "residual": _at(residual),
        "y": y.data_ptr(),
        "weight": _weight(weight, bias),
        "activation": _NUMBER[activation],
        "threads": torch.get_num_threads(),
    }
    if flat:
        pixels = y.shape[2] * y.shape[3]
        args = abi.Linear(
            tokens=y.shape[0] * pixels,
            pixels=pixels,
            bf16=_IS_BF16[x.dtype],
            format=_TOKENS if last else _PLANES,
            **shared,
        )
        _checked(kernels().nm_linear(args))
        return y
    # A stride larger than the padded image is clamped to its size: the same pixels are read, and fewer phases (conv.h)
    # are stored.
    steps = [min(s, size + 2 * p) for s, size, p in zip(stride, x.shape[2:], padding, strict=True)]
    convolution = abi.Conv(
        images=x.shape[0],
        height=x.shape[2],
        width=x.shape[3],
        kernel_h=shape[2],
        kernel_w=shape[3],
        stride_h=steps[0],
        stride_w=steps[1],
        pad_h=padding[0],
        pad_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        groups=groups,
        channels_last=int(last),
        **shared,
    )
    _checked(kernels().nm_conv(convolution))
    return y


def _fake_matmul(args: type[NmGemmArgs | NmMlpArgs]) -> Callable[..., Tensor]:
    out = args.position("out")

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rest[out - 1]))

    return fake


def _fake_conv(*args: Any) -> Tensor:
    a = NmConvArgs(*args)
    order = torch.channels_last if packed.runs_last(a.x) else torch.contiguous_format
    sizes = _sizes(a.x, a.shape, a.stride, a.padding, a.dilation)
    return torch.empty(sizes, dtype=a.x.dtype, device=a.x.device, memory_format=order)


def _gradient(formula: Callable[..., Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return backward and setup_context of an operator that ``formula`` computes in plain torch."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
        ctx.inputs = [None if isinstance(v, Tensor) else (v,) for v in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if v is None else v[0] for v in ctx.inputs]
        wanted = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and ctx.needs_input_grad[i]]
        with torch.enable_grad():
            for i in wanted:
                inputs[i] = inputs[i].detach().requires_grad_()
            gradients = torch.autograd.grad(formula(*inputs), [inputs[i] for i in wanted], grad)
        result: list[Any] = [None] * len(inputs)
        for i, value in zip(wanted, gradients, strict=True):
            result[i] = value
        return tuple(result)

    return backward, setup_context


_IMPLEMENTATIONS: dict[type[NativeArgs], tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    NmGemmArgs: (_gemm, _fake_matmul(NmGemmArgs), packed.nm_gemm),
    NmMlpArgs: (_mlp, _fake_matmul(NmMlpArgs), packed.nm_mlp),
    NmConvArgs: (_conv, _fake_conv, packed.nm_conv),
}


def register(
    library: Library,
    args: type[Args],
    kernel: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    formula: Callable[..., Tensor],
) -> None:
    """Define an operator under both of its names.

    Args:
        kernel: its implementation in Python.
        fake: the shape of its result.
        formula: the same in plain torch, for its gradient.
    """
    short = args.operator
    for name in (short, short + GENERAL):
        library.define(name + args.signature(), tags=(torch.Tag.needs_fixed_stride_order,))
        # Not registered for CPU itself: C++ takes that key when it is loaded.
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    # Both names get the autograd kernel of the short one: graphs then hold the short name, whichever was called, and
    # the forward pass of a training step runs in C++.
    first = getattr(getattr(torch.ops, library.ns), short).default
    above = make_autograd_impl(first, Info(*_gradient(formula)))
    for name in (short, short + GENERAL):
        library.impl(name, above, "Autograd", with_keyset=True)


def define(library: Library) -> None:
    """Define the operators in ``library``."""
    for args, (kernel, fake, formula) in _IMPLEMENTATIONS.items():
        register(library, args, kernel, fake, formula)
        for name in (args.operator, args.operator + GENERAL):
            library.impl(name, gpu_launch.IMPLEMENTATIONS[args.operator], "CUDA")
