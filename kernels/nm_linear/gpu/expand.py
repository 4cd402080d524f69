"""The engine for any N:M on CUDA, and its operator: a Triton kernel that unpacks weights in registers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.engine import LayerSpec
from mpcompile.kernels.nm_format import MAX_M, groups_per_word, pack, word_count
from mpcompile.kernels.nm_linear import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def no_triton() -> str | None:
    """Return why the kernel cannot be compiled, or None if it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"no Triton ({error})"
    return None


def tile(m: int, n: int) -> tuple[int, int, int]:
    """Return tokens, features and columns of a program; small products get small ones, so that there are enough.

    Example:
        >>> tile(1, 768), tile(300, 4096)
        ((16, 16, 128), (64, 64, 64))
    """
    tokens = 16 if m <= 16 else 32 if m <= 32 else 64
    features = 16 if -(-n // 32) * -(-m // tokens) < 128 else 32 if -(-n // 64) * -(-m // tokens) < 256 else 64
    return tokens, features, 128 if tokens == 16 else 64


def launch(
    x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, n: int, m: int, wrap: Callable[[Any], Any]
) -> Tensor:
    """Multiply x (..., K) by a packed weight and add a bias with the kernel; ``wrap`` makes it visible to Inductor."""
    from mpcompile.kernels.nm_linear.gpu.expand_kernel import expand

    k, out = x.shape[-1], values.shape[0]
    if values.shape != (out, k // m * n) or words.shape != (out, word_count(k, m)) or k % m:
        found = f"values {tuple(values.shape)}, words {tuple(words.shape)}"
        raise InputError(
            f"packed weights do not fit {k} inputs {n}:{m}", expected="tensors from nm_format.pack", found=found
        )
    y = x.new_empty((*x.shape[:-1], out))
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if y.numel():
        bm, bn, bk = tile(len(rows), out)
        grid = (-(-len(rows) // bm) * -(-out // bn),)
        wrap(expand)[grid](
            rows, values, words, bias, y, len(rows), out, k, values.shape[1], words.shape[1], rows.stride(0),
            NV=n, MG=m, SPAN=groups_per_word(m) * m, BM=bm, BN=bn, BK=bk, num_warps=4,
        )  # fmt: skip
    return y


@torch.library.triton_op("mpcompile::nm_expand", mutates_args={})
def nm_expand(x: Tensor, values: Tensor, words: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    if x.device.type == "cpu":  # a module lowered for a GPU, traced or run without one
        return reference.nm_linear(x, values, words, bias, n, m, x.shape[-1])
    return launch(x, values, words, bias, n, m, torch.library.wrap_triton)


class ExpandEngine:
    """Any N:M on CUDA: weights are unpacked in registers and multiplied densely."""

    name = "triton_expand"

    def supports(self, spec: LayerSpec) -> str | None:
        if spec.device.type != "cuda":
            return f"device {spec.device.type}"
        if spec.dtype not in DTYPES:
            return f"dtype {str(spec.dtype).removeprefix('torch.')} (fp32, fp16 and bf16 have kernels)"
        if spec.geometry is not None:
            return "a convolution"
        return f"M > {MAX_M}" if spec.pattern.m > MAX_M else no_triton()

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        values, words = pack(weight, mask, *spec.pattern)
        return {"values": values, "words": words}

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        target = torch.ops.mpcompile.nm_expand.default
        return target, (x, packed["values"], packed["words"], bias, *spec.pattern)
