"""Launches of the sparse tensor-core kernels: ``nm_gemm``, ``nm_mlp`` and ``nm_conv`` on CUDA.

No call waits for the GPU or copies data to it. With aligned, contiguous inputs a call allocates only its result. All
calls can be captured in a CUDA graph. With ``MPCOMPILE_DEBUG=1`` every call checks its packed weights first, and waits
for that.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.nm_linear import checks, packed, sparse24
from mpcompile.kernels.nm_linear.checks import PackedWeight
from mpcompile.kernels.nm_linear.gpu import cubin as gpu_cubin
from mpcompile.kernels.nm_linear.gpu import model as gpu_model
from mpcompile.kernels.nm_linear.gpu.tiles import CONV_CHANNELS, MODULES, Tile, family
from mpcompile.kernels.nm_linear.gpu.triton_support import old_triton
from mpcompile.kernels.nm_linear.sparse24 import MMA_SP, WGMMA_SP

KERNELS = {MMA_SP: "gluon_mma_sp", WGMMA_SP: "gluon_wgmma_sp"}
_DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
_LIMIT = 2**31  # rows, columns, strides: the kernels count them in int32, and addresses in int64
_TALL_GRID = 2**31 - 1


@functools.lru_cache(maxsize=64)
def missing(index: int | None, layout: int = MMA_SP) -> str | None:
    """Return why the GPU of this index cannot run the kernels of a layout, or None if it can."""
    if torch.version.hip is not None:
        return "an AMD GPU"
    capability = torch.cuda.get_device_capability(index)
    arch = family(capability)
    name = "compute capability {}.{}".format(*capability)
    if arch is None:
        return f"{name}: sparse tensor cores begin with 8.0"
    if layout == WGMMA_SP and arch != 90:
        return f"{name}: wgmma needs 9.0"
    cubins = gpu_cubin.given()
    if cubins is None or not from_cubins():
        return old_triton()
    if arch // 10 != capability[0]:
        return f"{name}: a cubin runs only on the GPU generation that it was compiled for"
    kernels = [KERNELS[layout]] if layout == WGMMA_SP else [KERNELS[layout], "gluon_mma_conv"]
    return next((lack for kernel in kernels if (lack := cubins.lacks(kernel, arch)) is not None), None)


def from_cubins() -> bool:
    """Return True if the kernels come from cubins: a folder is set, and the installed Triton cannot compile them."""
    return old_triton() is not None and gpu_cubin.given() is not None


@functools.lru_cache(maxsize=64)
def _device(index: int) -> tuple[int, int]:
    """Return architecture and number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    arch = family((properties.major, properties.minor))
    assert arch is not None  # missing() has checked it
    return arch, properties.multi_processor_count


@functools.lru_cache(maxsize=8)
def _kernel(name: str, device: torch.device) -> Any:
    """Return the kernel's module or, if Triton cannot compile it, an object like it that launches cubins."""
    cubins = gpu_cubin.given()
    if cubins is not None and from_cubins():
        arch, _ = _device(torch.cuda.current_device() if device.index is None else device.index)
        return gpu_cubin.Kernel(name, arch, cubins)
    return importlib.import_module(MODULES[name])


def _box(kernel: Any, matrix: Tensor, shape: list[int]) -> Any:
    """Describe a matrix that the kernel reads in boxes with the 128-byte swizzle."""
    if isinstance(kernel, gpu_cubin.Kernel):
        return gpu_cubin.Box(matrix, shape)
    language = importlib.import_module("triton.experimental.gluon.language")
    descriptor = importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor
    return descriptor.from_tensor(matrix, shape, language.NVMMASharedLayout(128, 16, 2))


def aligned(x: Tensor) -> Tensor:
    """Return x (rows, columns) as the kernels read it: rows are contiguous and start at multiples of 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def check(x: Tensor, values: Tensor, index: Tensor, shape: tuple[int, ...]) -> None:
    """Check everything that could lead a kernel out of bounds, or to an undefined result.

    Raises:
        InputError: the dtype or device is not the weight's, the packed tensors belong to a different weight, the number
            of features is not a multiple of 16, or there are too many rows.
    """
    if x.dtype not in _DTYPES or values.dtype != x.dtype:
        raise InputError(
            "a 2:4 product mixes dtypes", expected="fp16 or bf16 throughout", found=f"{x.dtype}, {values.dtype}"
        )
    if values.device != x.device or index.device != x.device:
        raise InputError(
            "packed weights are on another device", expected=x.device, found=f"{values.device}, {index.device}"
        )
    if not sparse24.fits(values.numel(), index.numel(), shape) or index.dtype is not torch.uint8:
        found = f"{values.numel()} values, {index.numel()} index bytes"
        title = f"packed weights do not fit a weight {shape}"
        raise InputError(title, expected="tensors from sparse24.pack", found=found)
    if shape[1] % 16:
        raise InputError("a 2:4 product cannot read this input", expected="a multiple of 16 features", found=shape[1])
    rows = x.numel() // max(1, shape[1])
    if rows >= _LIMIT or max(shape) >= _LIMIT:
        raise InputError(
            "the product is too large", expected=f"fewer than {_LIMIT} rows", found=rows, hint="split the batch"
        )
    if sparse24.debugging():
        sparse24.check(values, index)


def _fits_tile(tile: Tile, rows: int) -> None:
    if rows % tile.n:
        raise InputError("a tile reaches beyond the packed weight", expected=f"a multiple of {tile.n} rows", found=rows)


def launch(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    layout: int,
    activation: str,
    tile: Tile,
) -> None:
    """Compute y = activation(x W' + bias) * scale + residual; tensors are on the GPU, in the form that kernels read.

    Args:
        x: (M, K), from :func:`aligned`.
        y: (M, N), contiguous.
        residual: (M, N), like y.
        bias, scale: (N,).
    """
    (m, k), n = x.shape, y.shape[1]
    rows, columns = sparse24.padded((n, k))
    _fits_tile(tile, rows)
    grid = (-(-n // tile.n) * -(-m // tile.m),)
    if grid[0] > _TALL_GRID:
        raise InputError(
            "the product is too large", expected=f"at most {_TALL_GRID} tiles", found=grid[0], hint="split the batch"
        )
    words, res_stride = index.view(torch.int32), 0 if residual is None else residual.stride(0)
    options = {"num_warps": tile.warps, "enable_fp_fusion": True}
    common = {"STAGES": tile.stages, "ACT": activation, "DT": _DTYPES[x.dtype], **options}
    source = _kernel(KERNELS[layout], x.device)
    kernel = source.gemm[grid]
    steps = columns // tile.k
    with torch.cuda.device(x.device):
        if layout == MMA_SP:
            kernel(
                values.view(torch.int32), words, x.view(torch.int32), bias, scale, residual, y,
                m, n, k, steps, x.stride(0), n, res_stride,
                BN=tile.n, BM=tile.m, BK=tile.k, WN=tile.warps_n, WM=tile.warps_m, **common,
            )  # fmt: skip
            return
        weights = _box(source, values.view(rows, columns // 2), [tile.n, 64])
        tokens = _box(source, x, [tile.m, 64])
        kernel(
            weights, tokens, words, bias, scale, residual, y, m, n, steps, n, res_stride,
            GROUPS=tile.warps // 4, **common,
        )  # fmt: skip


def tile_of(kernel: str, m: int, n: int, k: int, device: torch.device) -> Tile:
    """Return the tile for a product on a GPU."""
    arch, processors = _device(torch.cuda.current_device() if device.index is None else device.index)
    tile = gpu_model.choose_tile(kernel, m, n, k, arch, processors)
    assert tile is not None  # the tables hold a tile of 128 features or fewer for each kernel and architecture
    return tile


def product(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: int,
    layout: int,
    activation: str,
    *,
    scale: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Return activation(x W' + bias) * scale + residual, (..., out), for x (..., K) and W packed in ``layout``.

    Raises:
        InputError: see :func:`check`.
    """
    k = x.shape[-1]
    check(x, values, index, (out, k))
    y = x.new_empty((*x.shape[:-1], out))
    if y.numel():
        flat = aligned(x.reshape(-1, k))
        if residual is not None:
            residual = residual.to(y.dtype).expand(y.shape).contiguous().view(-1, out)
        bias, scale = packed.row(bias, out, x.dtype), packed.row(scale, out, x.dtype)
        tile = tile or tile_of(KERNELS[layout], len(flat), out, k, x.device)
        launch(flat, values, index, bias, scale, residual, y.view(-1, out), layout, activation, tile)
    return y


def _runs(x: Tensor, layout: int) -> bool:
    return layout in KERNELS and x.dtype in _DTYPES and missing(x.device.index, layout) is None


def _gemm(x: Tensor, values: Tensor, index: Tensor, bias: Any, residual: Any, *rest: Any) -> Tensor:
    out, n, m, layout, activation = rest
    checks.weight_numbers((out, x.shape[-1] if x.dim() else 0), n, m, layout)
    if not _runs(x, layout):
        checks.gemm(x, PackedWeight(values, index, (out, x.shape[-1]), n, m, layout), bias, residual, activation)
        return packed.nm_gemm(x, values, index, bias, residual, *rest)
    return product(x, values, index, bias, residual, out, layout, activation)


def _mlp(x: Tensor, *rest: Any) -> Tensor:
    values1, index1, bias1, values2, index2, bias2, residual, hidden, out, n1, m1, n2, m2 = rest[:13]
    layout1, layout2, activation = rest[13:]
    h = _gemm(x, values1, index1, bias1, None, hidden, n1, m1, layout1, activation)
    return _gemm(h, values2, index2, bias2, residual, out, n2, m2, layout2, "none")


def direct(shape: Sequence[int], layout: int) -> bool:
    """Return True if a GPU kernel can run a convolution of this shape other than 1x1."""
    return layout == MMA_SP and shape[1] % CONV_CHANNELS == 0


def convolution(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    axes: Sequence[Sequence[int]],
    shape: Sequence[int],
    activation: str,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Return activation(conv(x) + bias) + residual, channels last, for x (B, C, H, W), by implicit GEMM.

    Args:
        axes: stride, padding, dilation.
        shape: (out, C, kh, kw), C a multiple of :data:`CONV_CHANNELS`.

    Raises:
        InputError: see :func:`check`.
    """
    out, channels, kh, kw = shape
    stride, padding, dilation = axes
    pixels = x.permute(0, 2, 3, 1).contiguous()
    check(pixels, values, index, tuple(shape))
    height, width = (
        (x.shape[i + 2] + 2 * padding[i] - dilation[i] * (shape[i + 2] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    y = x.new_empty((x.shape[0], height, width, out))
    m = y.numel() // max(1, out)
    if m == 0 or min(height, width) < 1:
        return y.permute(0, 3, 1, 2)
    if x.shape[2] * x.shape[3] >= _LIMIT // max(1, channels):
        raise InputError("an image is too large", expected=f"fewer than {_LIMIT} elements each", found=tuple(x.shape))
    if residual is not None:
        residual = residual.to(y.dtype).permute(0, 2, 3, 1).expand(y.shape).contiguous()
    pixels = pixels if pixels.data_ptr() % 16 == 0 else pixels.clone()
    if tile is None:
        tile = tile_of("gluon_mma_conv", m, out, channels * kh * kw, x.device)
    _fits_tile(tile, sparse24.padded(shape)[0])
    kernel = _kernel("gluon_mma_conv", x.device).gemm[(-(-out // tile.n) * -(-m // tile.m),)]
    with torch.cuda.device(x.device):
        kernel(
            values.view(torch.int32), index.view(torch.int32), pixels.view(torch.int32),
            packed.row(bias, out, x.dtype), None, residual, y, m, out, channels, sparse24.padded(shape)[1] // tile.k,
            out, 0 if residual is None else out,
            x.shape[2], x.shape[3], height, width, kw, kh * kw, *stride, *padding, *dilation,
            BN=tile.n, BM=tile.m, BK=tile.k, WN=tile.warps_n, WM=tile.warps_m, STAGES=tile.stages, ACT=activation,
            DT=_DTYPES[x.dtype], num_warps=tile.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return y.permute(0, 3, 1, 2)


def _conv(x: Tensor, values: Tensor, index: Tensor, bias: Any, residual: Any, *rest: Any) -> Tensor:
    """Run a 1x1 convolution as a product over channels-last pixels, any other by implicit GEMM."""
    stride, padding, dilation, n, m, shape, layout, activation = rest
    weight = PackedWeight(values, index, tuple(shape), n, m, layout)
    checks.conv(x, weight, bias, residual, (stride, padding, dilation), activation)
    order = torch.channels_last if packed.runs_last(x) else torch.contiguous_format
    pointwise = list(shape[2:]) == [1, 1]
    grouped = x.shape[1] != shape[1]
    if grouped or not _runs(x, layout) or not (pointwise or direct(shape, layout)):
        y = packed.nm_conv(x, values, index, bias, residual, *rest)
        return y.contiguous(memory_format=order)
    if not pointwise:
        axes = (stride, padding, dilation)
        y = convolution(x, values, index, bias, residual, axes, shape, activation)
        return y.contiguous(memory_format=order)
    if any(padding):
        x = torch.nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    if list(stride) != [1, 1]:
        x = x[:, :, :: stride[0], :: stride[1]]
    pixels = x.permute(0, 2, 3, 1)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    y = product(pixels, values, index, bias, residual, shape[0], layout, activation)
    return y.permute(0, 3, 1, 2).contiguous(memory_format=order)


def _late(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a kernel that lacks activations after the residual addition: run them as a separate pass."""

    def run(*args: Any) -> Tensor:
        *others, activation = args
        if not activation.startswith(packed.AFTER_RESIDUAL):
            return kernel(*args)
        return packed.finish(kernel(*others, "none"), None, activation)

    return run


IMPLEMENTATIONS = {"nm_gemm": _late(_gemm), "nm_mlp": _mlp, "nm_conv": _late(_conv)}
