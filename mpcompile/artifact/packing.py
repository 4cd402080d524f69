"""Masked weights as a file holds them: the kept values, and the mask as deflated bits.

A masked weight and its mask take 150 % of the dense fp16 weight as they are; as N values a group and one bit a weight
they take n/m + 1/16, and the bits of a legal mask, of which a group has few, deflate by up to a third. Removed values
have to be zero for that; they come back as +0.0. Layout of values and bits: :mod:`mpcompile.kernels.nm_format`.
"""

from __future__ import annotations

import logging
import math
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mpcompile.artifact.opset import Refusal, shown
from mpcompile.errors import InputError
from mpcompile.graph import IRModule, attribute
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import (
    MAX_M,
    Pattern,
    from_rows,
    group_axis,
    groups_per_word,
    pack,
    word_count,
    word_dtype,
)
from mpcompile.layers import MaskedConv2d, MaskedLinear

log = logging.getLogger(__name__)


def masked(gm: IRModule) -> Iterator[tuple[Tensor, Tensor, Pattern]]:
    """(weight, mask, pattern) of everything masked: layers, and calls of the masked operators."""
    for module in gm.modules():
        if isinstance(module, (MaskedLinear, MaskedConv2d)):
            yield module.weight, module.mask, module.pattern
    for node in gm.graph.nodes:
        if node.target in (ops.masked_linear, ops.masked_conv2d) and len(node.args) > 4:
            sources = node.args[1:3]
            if all(getattr(source, "op", None) == "get_attr" for source in sources):
                weight, mask = (attribute(gm, str(source.target)) for source in sources)
                yield weight, mask, Pattern(*node.args[-2:])


def pack_tensors(gm: IRModule, kinds: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file: masked weights and their masks replaced by what is packed; ``kinds`` is told.

    A weight whose removed values aren't zero, or whose mask isn't N:M, stays as it is.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    stored, whole = dict(tensors), []
    for weight, mask, pattern in masked(gm):
        name, place = names.get(id(weight)), names.get(id(mask))
        if name is None or place is None or name not in stored or place not in stored:
            continue  # packed already, for another layer that shares it
        weight, mask = weight.detach(), mask.detach()
        if weight.numel() == 0 or weight.shape != mask.shape or bool((weight[~mask] != 0).any()):
            whole.append(name)
            continue
        try:
            values, words = pack(weight, mask, *pattern)
        except InputError:
            whole.append(name)
            continue
        del stored[name], stored[place]
        stored[f"{name}.values"], stored[f"{name}.mask"] = values, _deflated(words)
        kinds[name]["packed"] = {"n": pattern.n, "m": pattern.m, "shape": list(weight.shape), "mask": place}
    if whole:
        log.warning(
            "%d masked weights are stored whole, as what their masks remove is not zero or the masks are not N:M (%s); "
            "layer.apply_mask() makes it zero",
            len(whole),
            ", ".join(whole[:3]),
        )
    return stored


def unpack_tensors(kinds: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`pack_tensors`.

    Raises:
        Refusal: packed tensors that make no N:M weight.
    """
    whole = dict(tensors)
    for name, kind in kinds.items():
        if "packed" not in kind:
            continue
        spec, values, bits = kind["packed"], whole.pop(f"{name}.values"), whole.pop(f"{name}.mask")
        if spec["mask"] in whole or name in whole:
            raise Refusal(f"tensor {name} or its mask is there twice")
        try:
            whole[name], whole[spec["mask"]] = _unpacked(values, bits, spec["n"], spec["m"], spec["shape"])
        except Refusal as error:
            raise error.at(f"packed weight {name}") from error
    return whole


def _unpacked(values: Tensor, bits: Tensor, n: Any, m: Any, shape: Any) -> tuple[Tensor, Tensor]:
    """(weight, mask), both contiguous."""
    plain = all(type(i) is int and i > 0 for i in (n, m, *shape))
    if not plain or not n <= m <= MAX_M or len(shape) not in (2, 4) or group_axis(tuple(shape)) % m:
        raise Refusal("its pattern and shape are malformed", found=shown((n, m, shape)))
    out, k = shape[0], math.prod(shape[1:])
    if tuple(values.shape) != (out, k // m * n) or not values.is_floating_point() or bits.dtype != torch.uint8:
        expected = f"values {(out, k // m * n)} and bytes"
        raise Refusal(f"its parts make no {n}:{m} weight", expected=expected, found=f"{tuple(values.shape)}")
    if values.is_meta:  # of describe(): the structure alone
        weight = values.new_empty(shape)
        return weight, torch.empty(shape, dtype=torch.bool, device="meta")
    kept = _mask_rows(_inflated(bits, out, k, m), out, k, m)
    if not bool((kept.unflatten(-1, (-1, m)).sum(-1, dtype=torch.uint8) == n).all()):
        raise Refusal("its mask does not keep as many values in each group as it says", expected=f"{n} of {m}")
    rows = values.new_zeros((out, k))
    rows[kept] = values.reshape(-1)
    # not .contiguous(): it keeps whatever strides an axis of size 1 has
    mask = torch.empty(shape, dtype=torch.bool).copy_(from_rows(kept, shape))
    return values.new_empty(shape).copy_(from_rows(rows, shape)), mask


def _deflated(words: Tensor) -> Tensor:
    """Words of a mask as bytes: little-endian, deflated with Huffman codes alone (runs hardly occur)."""
    raw = words.cpu().contiguous().numpy()
    raw = raw.byteswap() if sys.byteorder == "big" else raw
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return torch.frombuffer(bytearray(deflate.compress(raw.data) + deflate.flush()), dtype=torch.uint8)


def _inflated(bits: Tensor, out: int, k: int, m: int) -> Tensor:
    """Inverse of :func:`_deflated`; never makes more bytes than the mask has."""
    size = out * word_count(k, m) * word_dtype(m).itemsize
    inflate = zlib.decompressobj(-15)
    try:
        raw = inflate.decompress(bits.numpy().data, size + 1)
    except zlib.error as error:
        raise Refusal("its mask can't be inflated", hint="the file is damaged: copy it again") from error
    if len(raw) != size or not inflate.eof or inflate.unused_data:
        raise Refusal("its mask has another length", expected=f"{size} bytes", found=f"{len(raw)} or more")
    words = torch.frombuffer(bytearray(raw), dtype=word_dtype(m))
    if sys.byteorder == "big":
        words = torch.from_numpy(words.numpy().byteswap())
    return words.reshape(out, -1)


def _mask_rows(words: Tensor, out: int, k: int, m: int) -> Tensor:
    """Words -> boolean rows (out, k)."""
    span = groups_per_word(m) * m
    kept = torch.empty((out, words.shape[1], span), dtype=torch.bool)
    for p in range(span):
        kept[..., p] = (words >> p) & 1 != 0
    kept = kept.flatten(1)
    if bool(kept[:, k:].any()):
        raise Refusal("its mask has bits beyond its last column")
    return kept[:, :k]
