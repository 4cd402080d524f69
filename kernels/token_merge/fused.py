"""The operator on the Triton kernels of token merging, for inference on CUDA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpcompile.kernels.token_merge import reference

_MAX_RANKED = 16384  # most tokens of set A that one program can rank
_MAX_CHANNELS = 8192  # most channels of one token that a program can hold


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def _power(count: int) -> int:
    """Return the next power of two, at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def launch(
    x: Tensor,
    keys: Tensor,
    size: Tensor,
    r: int,
    prefix: int,
    wrap: Callable[[Any], Any],
    saliency: Tensor | None = None,
    saliency_weight: float = 0.0,
    size_weight: float = 0.0,
    keep_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``reference.token_merge`` with the kernels; ``wrap`` makes them visible to Inductor."""
    from mpcompile.kernels.token_merge import merge_kernels

    batch, tokens, channels = x.shape
    r = tokens - reference.merged_count(tokens, r, prefix)
    if r <= 0 or batch == 0:
        return reference.token_merge(x, keys, size, 0, prefix)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    na, nb = (tokens - even + 1) // 2, (tokens - odd + 1) // 2
    x = x if x.stride(2) == 1 else x.contiguous()
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    heads, depth = keys.shape[1], keys.shape[3]
    unit = x.new_empty(batch, tokens, depth, dtype=torch.float32)
    best = x.new_empty(batch, na, dtype=torch.float32)
    target, place = (x.new_empty(batch, na, dtype=torch.int32) for _ in range(2))
    y, new_size = x.new_empty(batch, tokens - r, channels), size.new_empty(batch, tokens - r, 1)
    wide = _power(depth)
    rows = min(32, 8192 // wide)
    wrap(merge_kernels.metric)[(-(-tokens // rows), batch)](
        keys, unit, tokens, heads, *keys.stride()[:3], D=depth, BD=wide, BN=rows
    )
    of_a, of_b = reference.penalties(size, even, odd, saliency, saliency_weight, size_weight)
    wrap(merge_kernels.match)[(-(-na // 32), batch)](
        unit, best if of_a is None else of_a.contiguous(), best if of_b is None else of_b.contiguous(), best, target,
        tokens, na, nb, even, odd, TIE=reference.TIE, LESS_A=of_a is not None, LESS_B=of_b is not None,
        D=depth, BD=min(wide, 256), BA=32, BB=32,
    )  # fmt: skip
    wrap(merge_kernels.rank)[(batch,)](best, target, place, na, r, TIE=reference.TIE, BA=_power(na))
    block = _power(channels) if keep_norm else min(1024, _power(channels))
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) if keep_norm else best
    wrap(merge_kernels.merge)[(tokens, batch, -(-channels // block))](
        x, size.contiguous(), norms, target, place, y, new_size, tokens, channels, na, r, prefix, even, odd,
        x.stride(0), x.stride(1), KEEP=keep_norm, BC=block,
    )  # fmt: skip
    moved = torch.where(target < 0, place, na - r + target).long()
    return y, new_size, reference.places(moved, na - r, prefix, tokens)


@torch.library.triton_op("mpcompile::token_merge_fused", mutates_args={})
def token_merge_fused(
    x: Tensor,
    keys: Tensor,
    size: Tensor,
    r: int,
    prefix: int,
    saliency: Tensor | None = None,
    saliency_weight: float = 0.0,
    size_weight: float = 0.0,
    keep_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = (saliency, saliency_weight, size_weight, keep_norm)
    if x.device.type == "cpu":
        return reference.token_merge(x, keys, size, r, prefix, 0, *pairs)
    return launch(x, keys, size, r, prefix, torch.library.wrap_triton, *pairs)


def runs(x: Tensor, keys: Tensor, size: Tensor) -> bool:
    """Return True if the kernels support a merge: CUDA, fp32, fp16 or bf16, no gradient, and no symbolic sizes."""
    if x.device.type != "cuda" or keys.device != x.device or not _has_triton() or torch.version.hip is not None:
        return False
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if x.dtype not in floats or keys.dtype not in floats or size.dtype not in floats:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or keys.requires_grad or size.requires_grad):
        return False
    known = all(isinstance(count, int) for count in (*x.shape[1:], *keys.shape[1:]))
    return known and x.shape[1] <= 2 * _MAX_RANKED and max(x.shape[2], keys.shape[3]) <= _MAX_CHANNELS


def token_merge(
    x: Tensor,
    keys: Tensor,
    size: Tensor,
    r: int,
    prefix: int,
    suffix: int = 0,
    saliency: Tensor | None = None,
    saliency_weight: float = 0.0,
    size_weight: float = 0.0,
    keep_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``r`` tokens of x by the kernels if they support it, else in plain torch; see ``reference.token_merge``."""
    pairs = (saliency_weight, size_weight, keep_norm)
    if suffix:
        return reference.with_suffix(token_merge, x, keys, size, r, prefix, suffix, saliency, *pairs)
    if runs(x, keys, size):
        fused = torch.ops.mpcompile.token_merge_fused.default
        merged: tuple[Tensor, Tensor, Tensor] = fused(x, keys, size, r, prefix, saliency, *pairs)
        return merged
    return reference.token_merge(x, keys, size, r, prefix, 0, saliency, *pairs)
