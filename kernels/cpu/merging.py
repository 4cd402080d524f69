"""``nm_token_merge`` as torch sees it: token merging as one call of a CPU kernel, for frozen inference graphs.

Its arguments and results are those of ``token_merge``. As the operators of N:M weights, it has two names: C++
(``native/operators/tokens.h``) implements ``nm_token_merge`` and passes plain calls to the kernel
(``native/merge.h``); the Python of this file implements ``nm_token_merge_general`` for all others, and both where the
C++ cannot be built. Without a kernel, for other dtypes and devices, and where gradients are needed, the plain torch of
the reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from mpcompile.errors import InputError
from mpcompile.kernels.cpu import abi
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.schema import NmTokenMergeArgs
from mpcompile.kernels.token_merge import reference

MOST = 2**14  # tokens, and channels of a key: the kernel copies the keys of an image, whatever is expanded


def _check(a: NmTokenMergeArgs) -> None:
    """Check the shapes of a merge.

    Raises:
        InputError: they do not match.
    """
    shapes = [tuple(t.shape) for t in (a.x, a.keys, a.size, *([] if a.saliency is None else [a.saliency]))]
    if [len(shape) for shape in shapes] != [3, 4, 3, 2][: len(shapes)]:
        raise InputError("a merge takes tokens, keys and sizes", expected="3, 4 and 3 axes", found=shapes)
    batch, tokens = shapes[0][:2]
    expected = [(batch, tokens), (batch, tokens), (batch, tokens, 1), (batch, tokens)][: len(shapes)]
    if [shapes[0][:2], (shapes[1][0], shapes[1][2]), *shapes[2:]] != expected:
        raise InputError("tokens, keys, sizes and saliency do not match", expected=f"{expected}", found=f"{shapes}")
    if min(a.prefix, a.suffix) < 0 or a.prefix + a.suffix > tokens:
        found = f"prefix {a.prefix}, suffix {a.suffix}"
        raise InputError("prefix and suffix do not fit", expected=f"at most {tokens} tokens", found=found)


def _merged(a: NmTokenMergeArgs) -> Any:
    """Return how many tokens go."""
    inner = a.x.shape[1] - a.suffix
    return inner - reference.merged_count(inner, a.r, a.prefix)


def _empty(a: NmTokenMergeArgs, r: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = a.x.shape
    y = a.x.new_empty((batch, tokens - r, channels))
    return y, a.size.new_empty((batch, tokens - r, 1)), a.x.new_empty((batch, tokens), dtype=torch.int64)


def _runs(a: NmTokenMergeArgs) -> bool:
    """Return True if the kernel takes these tensors."""
    tensors = [t for t in (a.x, a.keys, a.size, a.saliency) if t is not None]
    plain = all(t.is_cpu and t.dtype is torch.float32 and t.numel() for t in tensors)
    return plain and max(a.x.shape[1], a.keys.shape[3]) <= MOST and native.kernels() is not None


def _token_merge(
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
    pairs = (saliency_weight, size_weight, keep_norm)
    a = NmTokenMergeArgs(x, keys, size, r, prefix, suffix, saliency, *pairs)
    _check(a)
    r = _merged(a)
    if r <= 0 or not _runs(a):
        merged = reference.token_merge(*a)
        return merged[0].contiguous(), merged[1].contiguous(), merged[2].contiguous()
    x, keys = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, keys))
    y, sizes, places = _empty(a, r)
    known = saliency
    call = abi.Merge(
        x=x.data_ptr(),
        keys=keys.data_ptr(),
        size=size.data_ptr(),
        saliency=None if known is None else known.data_ptr(),
        y=y.data_ptr(),
        new_size=sizes.data_ptr(),
        places=places.data_ptr(),
        x_image=x.stride(0),
        x_token=x.stride(1),
        keys_image=keys.stride(0),
        keys_head=keys.stride(1),
        keys_token=keys.stride(2),
        size_image=size.stride(0),
        size_token=size.stride(1),
        saliency_image=0 if known is None else known.stride(0),
        saliency_token=0 if known is None else known.stride(1),
        batch=x.shape[0],
        tokens=x.shape[1],
        channels=x.shape[2],
        heads=keys.shape[1],
        depth=keys.shape[3],
        r=r,
        prefix=prefix,
        suffix=suffix,
        saliency_weight=saliency_weight,
        size_weight=size_weight,
        keep_norm=int(keep_norm),
        threads=torch.get_num_threads(),
    )
    if native.kernels().nm_token_merge(call):
        raise MemoryError("merging ran out of memory: use a smaller batch")
    return y, sizes, places


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = NmTokenMergeArgs(*args)
    return _empty(a, max(0, _merged(a)))


def _above(keys: Any, *args: Any) -> Any:
    """The autograd kernel: where a gradient is needed, the reference runs, which torch can differentiate."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return reference.token_merge(*args)
    below = keys & torch._C._after_autograd_keyset
    return torch.ops.mpcompile.nm_token_merge.default.redispatch(below, *args)


def define(library: Library) -> None:
    """Define the operator in ``library``."""
    for name in (NmTokenMergeArgs.operator, NmTokenMergeArgs.operator + native.GENERAL):
        library.define(name + NmTokenMergeArgs.signature(), tags=(torch.Tag.needs_fixed_stride_order,))
        # Not registered for CPU itself: C++ takes that key when it is loaded.
        library.impl(name, _token_merge, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{library.ns}::{name}", _fake, lib=library)
        library.impl(name, _above, "Autograd", with_keyset=True)
