"""``nm_attention`` as torch sees it: CPU kernel, fake kernel, gradient, and its time against torch's own attention.

As the operators of N:M weights (:mod:`mpcompile.kernels.nm_linear.operators`), it has two names. C++ (``ops.cpp``)
implements ``nm_attention`` and passes plain calls to the kernel (``native/attention.h``); the Python of this file
implements ``nm_attention_general`` for all others, and both where the C++ cannot be built. Without a kernel, and for
other dtypes and devices, torch's attention runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from mpcompile.errors import InputError
from mpcompile.kernels import timing
from mpcompile.kernels.cpu import abi, build
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.schema import NmAttentionArgs

NAME, TORCH = "nm_attention", "torch"  # the two that are timed
MARGIN = 0.97  # the kernel must take less than this fraction of torch's time
_COPIES, _COPIES_BYTES = 8, 32 << 20  # at most this many copies of the inputs, and this many bytes, in turn
MOST_CHANNELS, MOST_KEYS = 2**14, 2**14  # the packed keys of a head take at most 1 GiB, whatever is expanded


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> None:
    """Check the shapes of heads, and that the bias can be broadcast to the scores.

    Raises:
        InputError: they do not match.
    """
    shapes = tuple(tuple(tensor.shape) for tensor in (query, key, value))
    if any(len(shape) != 4 for shape in shapes):
        raise InputError("attention takes tensors of heads", expected="(B, heads, tokens, channels)", found=shapes)
    (batch, heads, queries, dim), keys = shapes[0], shapes[1][2]
    if shapes[1] != (batch, heads, keys, dim) or shapes[2][:3] != (batch, heads, keys):
        raise InputError(
            "queries, keys and values do not match",
            expected=f"keys {(batch, heads, 'S', dim)} and values {(batch, heads, 'S', 'D')}",
            found=f"keys {shapes[1]}, values {shapes[2]}",
        )
    if len({tensor.dtype for tensor in (query, key, value)}) > 1 or not query.is_floating_point():
        found = ", ".join(str(tensor.dtype) for tensor in (query, key, value))
        raise InputError("queries, keys and values have one floating dtype", found=found)
    if bias is None:
        return
    scores = (batch, heads, queries, keys)
    fits = bias.dim() == 4 and all(size in (1, whole) for size, whole in zip(bias.shape, scores, strict=True))
    if not fits or bias.dtype is not query.dtype:
        found = f"{tuple(bias.shape)} in {bias.dtype}"
        raise InputError("the bias does not match the scores", expected=f"{scores} in {query.dtype}", found=found)


def _empty(query: Tensor, value: Tensor) -> Tensor:
    """Return an output, (B, heads, tokens, channels), that is contiguous as (B, tokens, heads, channels)."""
    (batch, heads, queries), channels = query.shape[:3], value.shape[-1]
    strides = (queries * heads * channels, channels, heads * channels, 1)
    return query.new_empty_strided((batch, heads, queries, channels), strides)


def _heads(tensor: Tensor) -> abi.Heads:
    return abi.Heads(tensor.data_ptr(), *tensor.stride()[:3])


def _runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if the kernel takes these tensors."""
    small = max(query.shape[-1], value.shape[-1]) <= MOST_CHANNELS and key.shape[2] <= MOST_KEYS
    return query.is_cpu and query.dtype is torch.float32 and small and native.kernels() is not None


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Return torch's attention, for gradients and for comparison."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    _check(query, key, value, bias)
    y = _empty(query, value)
    if not y.numel():
        return y
    if not key.numel() or not _runs(query, key, value):
        return y.copy_(plain(query, key, value, bias, scale))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    offset = abi.Heads()
    if bias is not None:
        bias = bias.expand(*bias.shape[:3], key.shape[2])
        bias = (bias if bias.stride(-1) == 1 else bias.contiguous()).expand(*query.shape[:3], key.shape[2])
        offset = _heads(bias)
    batch, heads, queries, dim = query.shape
    args = abi.Attention(
        query=_heads(query),
        key=_heads(key),
        value=_heads(value),
        bias=offset,
        y=y.data_ptr(),
        batch=batch,
        heads=heads,
        queries=queries,
        keys=key.shape[2],
        dim=dim,
        value_dim=value.shape[3],
        scale=dim**-0.5 if scale is None else scale,
        threads=torch.get_num_threads(),
    )
    if native.kernels().nm_attention(args):
        raise MemoryError("attention ran out of memory: use a smaller batch")
    return y


def _fake(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    return _empty(query, value)


def define(library: Library) -> None:
    """Define the operator in ``library``."""
    native.register(library, NmAttentionArgs, _attention, _fake, plain)


@dataclass(frozen=True)
class AttentionSpec:
    """One attention as the choice of its kernel sees it.

    Attributes:
        query, value: shapes (B, heads, tokens, channels) of the queries and of the values.
        bias: shape of what is added to the scores; None for nothing.
    """

    query: tuple[int, ...]
    value: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bias: tuple[int, ...] | None = None

    def rounded(self) -> AttentionSpec:
        """Return the attention that is timed in place of this one: batch and tokens are rounded up."""

        def up(batch: int, heads: int, tokens: int, channels: int) -> tuple[int, ...]:
            return timing.bucket(batch), heads, timing.bucket(tokens), channels

        query, value, bias = up(*self.query), up(*self.value), self.bias
        if bias is not None:
            full = (*query[:3], value[2])
            bias = tuple(1 if size == 1 else whole for size, whole in zip(bias, full, strict=True))
        return AttentionSpec(query, value, self.dtype, self.device, bias)


@dataclass(frozen=True)
class AttentionChoice:
    """Whether the kernel runs an attention, and why.

    Attributes:
        native: True for ``nm_attention``, False for torch's attention.
        us, torch_us: microseconds of the two; None if they were not timed.
    """

    native: bool
    why: str
    us: float | None = None
    torch_us: float | None = None


def supports(spec: AttentionSpec) -> str | None:
    """Return why the kernel cannot run an attention, or None if it can."""
    if spec.device.type != "cpu":
        return f"device {spec.device.type}"
    if spec.dtype is not torch.float32:
        return f"dtype {str(spec.dtype).removeprefix('torch.')}"
    if max(spec.query[-1], spec.value[-1]) > MOST_CHANNELS or spec.value[2] > MOST_KEYS:
        return f"more than {MOST_KEYS} keys or {MOST_CHANNELS} channels"
    if not all((*spec.query, *spec.value)):
        return "an empty tensor"
    return build.unavailable()


def choose(spec: AttentionSpec, *, timed: bool = True) -> AttentionChoice:
    """Choose between the kernel and torch's attention: the kernel must be faster by more than the noise.

    Args:
        timed: False takes the kernel wherever it runs.

    Example:
        >>> heads = (1, 3, 197, 64)
        >>> choose(AttentionSpec(heads, heads, torch.float64, torch.device("cpu"))).why
        'dtype float64'
    """
    reason = supports(spec)
    if reason is not None:
        return AttentionChoice(False, reason)
    native.kernels()  # the operators in C++ are built before the first call
    if not timed:
        return AttentionChoice(True, "asked for")
    rounded = spec.rounded()
    shapes = " ".join(
        "x".join(map(str, shape)) for shape in (rounded.query, rounded.value, rounded.bias) if shape is not None
    )
    us = timing.compare(f"attention, {shapes}, float32", lambda: _calls(rounded))
    if us is None:
        return AttentionChoice(False, "nothing was timed")
    ratio = us[TORCH] / us[NAME]
    faster = us[NAME] < MARGIN * us[TORCH]
    return AttentionChoice(faster, f"{'' if faster else 'only '}{ratio:.2f}x as fast", us[NAME], us[TORCH])


def _calls(spec: AttentionSpec) -> dict[str, Sequence[Callable[[], Any]]]:
    """Return the calls to time, on tensors that are (B, tokens, heads, channels) in memory, as projections are."""
    generator = torch.Generator().manual_seed(0)

    def heads(shape: Sequence[int]) -> Tensor:
        batch, number, tokens, channels = shape
        return torch.randn(batch, tokens, number, channels, generator=generator).transpose(1, 2)

    query, value = heads(spec.query), heads(spec.value)
    key = heads((*spec.value[:3], spec.query[-1]))
    bias = None if spec.bias is None else torch.randn(spec.bias, generator=generator)
    copies = max(1, min(_COPIES, _COPIES_BYTES // (query.nbytes + key.nbytes + value.nbytes)))
    inputs = [(query.clone(), key.clone(), value.clone()) for _ in range(copies)]  # clones keep the strides
    ours = torch.ops.mpcompile.nm_attention.default
    return {
        NAME: [functools.partial(ours, *tensors, bias) for tensors in inputs],
        TORCH: [functools.partial(plain, *tensors, bias) for tensors in inputs],
    }
