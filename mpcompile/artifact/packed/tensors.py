"""Masked weights as a file holds them: the kept values, and the masks of all groups as one code.

Unpacked, a masked weight and its mask take 150 % of the dense fp16 weight; packed, 54.0 % at 2:4 and 55.3 % at 8:16.
Removed values must be zero for that; they are restored as +0.0. Layout of values: :mod:`mpcompile.kernels.nm_format`;
of masks: :mod:`mpcompile.artifact.packed.combinations`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpcompile.artifact.opset import Refusal, shown
from mpcompile.artifact.packed import combinations
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule, masked
from mpcompile.kernels.nm_format import (
    MAX_M,
    Pattern,
    from_rows,
    group_axis,
    pack,
    to_rows,
)

log = logging.getLogger(__name__)


def pack_tensors(gm: IRModule, kinds: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, with masked weights and their masks replaced by packed ones.

    A weight whose removed values are not zero, or whose mask is not N:M, is left unpacked, with a warning.

    Args:
        gm: the IR.
        kinds: the table of :class:`mpcompile.artifact.tree.Tree`; each packed weight is recorded in its entry.
        tensors: all tensors of ``gm`` by name.
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
            values, _ = pack(weight, mask, *pattern)
        except InputError:
            whole.append(name)
            continue
        del stored[name], stored[place]
        stored[f"{name}.values"], stored[f"{name}.mask"] = values, _code(mask, pattern)
        kinds[name]["packed"] = {"n": pattern.n, "m": pattern.m, "shape": list(weight.shape), "mask": place}
    if whole:
        log.warning(
            "%d masked weights are stored in full, because values that their masks remove are not zero or the masks "
            "are not N:M (%s); layer.apply_mask() sets these values to zero",
            len(whole),
            ", ".join(whole[:3]),
        )
    return stored


def unpack_tensors(kinds: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with all weights unpacked, the inverse of :func:`pack_tensors`.

    Raises:
        Refusal: packed tensors that do not make an N:M weight.
    """
    whole = dict(tensors)
    for name, kind in kinds.items():
        if "packed" not in kind:
            continue
        spec, values, bits = kind["packed"], whole.pop(f"{name}.values"), whole.pop(f"{name}.mask")
        if spec["mask"] in whole or name in whole:
            raise Refusal(f"tensor {name} or its mask is in the file twice")
        try:
            whole[name], whole[spec["mask"]] = _unpack(values, bits, spec["n"], spec["m"], spec["shape"])
        except Refusal as error:
            raise error.at(f"packed weight {name}") from error
    return whole


def _unpack(values: Tensor, bits: Tensor, n: Any, m: Any, shape: Any) -> tuple[Tensor, Tensor]:
    """Return weight and mask, both contiguous."""
    plain = all(type(i) is int and i > 0 for i in (n, m, *shape))
    if not plain or not n <= m <= MAX_M or len(shape) not in (2, 4) or group_axis(tuple(shape)) % m:
        raise Refusal("its pattern and shape are malformed", found=shown((n, m, shape)))
    out, k = shape[0], math.prod(shape[1:])
    fits = tuple(values.shape) == (out, k // m * n) and values.is_floating_point()
    if not fits or bits.dim() != 1 or bits.dtype != torch.uint8:
        expected = f"values {(out, k // m * n)} and bytes"
        raise Refusal(f"its parts do not make a {n}:{m} weight", expected=expected, found=f"{tuple(values.shape)}")
    if values.is_meta:  # saving checks shapes and dtypes alone
        weight = values.new_empty(shape)
        return weight, torch.empty(shape, dtype=torch.bool, device="meta")
    kept = torch.from_numpy(combinations.decode(bits.numpy(), out * k // m, n, m)).view(out, k)
    rows = values.new_zeros((out, k))
    rows[kept] = values.reshape(-1)
    # not .contiguous(), which keeps any stride of an axis whose size is 1
    mask = torch.empty(shape, dtype=torch.bool).copy_(from_rows(kept, shape))
    return values.new_empty(shape).copy_(from_rows(rows, shape)), mask


def _code(mask: Tensor, pattern: Pattern) -> Tensor:
    """Return the code of a legal mask, in the order of the execution layout, as bytes."""
    groups = to_rows(mask).reshape(-1, pattern.m).cpu().numpy()
    return torch.from_numpy(combinations.encode(groups, pattern.n))
