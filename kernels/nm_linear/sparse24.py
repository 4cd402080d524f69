"""2:4 weights as NVIDIA's sparse tensor cores read them: kept values, and two bits of metadata for each one's position.

Rows are zero-padded to a multiple of :data:`ROWS_UNIT`, and columns to a multiple of :data:`COLUMNS_UNIT`, so that
every tile is full and one packed weight serves all tiles. The eight positions in sixteen dense columns make a half
word. A metadata word holds the half words of two rows eight apart. Words are in the order in which the lanes of a warp
(``mma.sp``) or the threads of a warpgroup (``wgmma.sp``) read them. The PTX ISA defines both orders in its figures of
sparse fragments and metadata storage.

An eight-byte checksum of values and metadata follows the metadata. With ``MPCOMPILE_DEBUG=1`` it is checked at every
call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.nm_format import from_rows, to_rows

MMA_SP, WGMMA_SP = 16, 17  # numbers that the layouts of the CPU kernels (layouts.py) do not use
NAMES = {MMA_SP: "mma.sp", WGMMA_SP: "wgmma.sp"}

ROWS_UNIT, COLUMNS_UNIT = 128, 128
CHECKSUM_BYTES = 8
_LEGAL = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)  # two positions of a group, the lower one in the lower bits


def padded(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of the padded dense weight.

    Example:
        >>> padded((1000, 768)), padded((64, 16, 3, 3))
        ((1024, 768), (128, 256))
    """
    columns = 1
    for axis in shape[1:]:
        columns *= int(axis)
    return -(-int(shape[0]) // ROWS_UNIT) * ROWS_UNIT, -(-columns // COLUMNS_UNIT) * COLUMNS_UNIT


def fits(values: int, index: int, shape: Sequence[int]) -> bool:
    """Return True if ``values`` values and ``index`` index bytes hold a weight of ``shape``."""
    rows, columns = padded(shape)
    return values == rows * columns // 2 and index == rows * columns // 8 + CHECKSUM_BYTES


def pack(weight: Tensor, mask: Tensor, layout: int) -> tuple[Tensor, Tensor]:
    """Pack a weight under a 2:4 mask into (values, index), both one-dimensional.

    Args:
        weight: (out, in) or (out, in, kh, kw), fp16 or bf16, on any device.
        mask: boolean, of the weight's shape, two of every four set in the execution layout (see nm_format).
        layout: ``MMA_SP`` or ``WGMMA_SP``: the order of metadata words.

    Returns:
        ``values`` in the weight's dtype, row after row of the padded weight, and ``index`` (uint8): metadata, then the
        checksum.

    Raises:
        InputError: the mask does not keep exactly two of every four.

    Example:
        >>> weight = torch.arange(8.0, dtype=torch.half).view(1, 8)
        >>> values, index = pack(weight, weight % 4 > 1, MMA_SP)
        >>> values[:4]
        tensor([2., 3., 6., 7.], dtype=torch.float16)
        >>> bool((unpack(values, index, (1, 8), MMA_SP) == weight * (weight % 4 > 1)).all())
        True
    """
    if weight.shape != mask.shape or weight.shape[1] % 4:
        found = f"a weight {tuple(weight.shape)} and a mask {tuple(mask.shape)}"
        expected = "a mask of its shape, inputs a multiple of 4"
        raise InputError("a weight cannot be packed 2:4", expected=expected, found=found)
    dense, kept = to_rows(weight), to_rows(mask)
    bad = int((kept.unflatten(-1, (-1, 4)).sum(-1, dtype=torch.uint8) != 2).sum())
    if bad:
        raise InputError("the mask is not 2:4", expected="exactly 2 of every 4 kept", found=f"{bad} other groups")
    rows, columns = padded(weight.shape)
    place = torch.arange(4, dtype=torch.uint8, device=weight.device)
    position = place.expand(*kept.unflatten(-1, (-1, 4)).shape)[kept.unflatten(-1, (-1, 4))]
    short = (0, columns // 2 - dense.shape[1] // 2, 0, rows - dense.shape[0])
    values = torch.nn.functional.pad(dense[kept].view(len(dense), -1), short)
    two = torch.nn.functional.pad(position.view(len(dense), -1) + 1, short)  # 0 where padded
    filler = place[:2].repeat(columns // 4)
    index = _words(torch.where(two == 0, filler, two - 1), layout).view(torch.uint8).flatten()
    values = values.flatten().contiguous()
    return values, torch.cat([index, checksum(values, index)])


def _words(position: Tensor, layout: int) -> Tensor:
    """Return the metadata words (int32, in the order of ``layout``) of positions 0..3 (rows, columns / 2)."""
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=position.device)
    half = (position.unflatten(-1, (-1, 8)).to(torch.int32) << shifts).sum(-1, dtype=torch.int32)
    if layout == MMA_SP:  # lane 4g + 2s + q: rows 16s + g and 16s + g + 8 of 32, half word q of 32 columns
        half = half.view(len(half) // 32, 2, 2, 8, -1, 2)
        order = (0, 3, 2, 1, 4)
    else:  # thread 32w + 4g + q: rows 16w + g and 16w + g + 8 of 64, half word q of 64 columns
        half = half.view(len(half) // 64, 4, 2, 8, -1, 4)
        order = (0, 3, 1, 2, 4)
    return (half[:, :, 0] | (half[:, :, 1] << 16)).permute(order).contiguous().flatten()


def _positions(index: Tensor, rows: int, columns: int, layout: int) -> Tensor:
    """Return the positions of metadata words: the inverse of :func:`_words`."""
    words = index[: rows * columns // 8].view(torch.int32)
    if layout == MMA_SP:
        words = words.view(rows // 32, columns // 32, 8, 2, 2).permute(0, 3, 2, 1, 4)
    else:
        words = words.view(rows // 64, columns // 64, 4, 8, 4).permute(0, 2, 3, 1, 4)
    half = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF], 2).reshape(rows, columns // 16, 1)
    shifts = torch.arange(0, 16, 2, dtype=torch.int32, device=index.device)
    return ((half >> shifts) & 3).view(rows, columns // 2)


def unpack(values: Tensor, index: Tensor, shape: Sequence[int], layout: int) -> Tensor:
    """Return the dense weight of ``shape`` that (values, index) hold; differentiable in ``values``."""
    rows, columns = padded(shape)
    position = _positions(index, rows, columns, layout).view(rows, columns // 4, 2).long()
    dense = values.new_zeros(rows, columns // 4, 4).scatter(-1, position, values.view(rows, columns // 4, 2))
    k = 1
    for axis in shape[1:]:
        k *= int(axis)
    return from_rows(dense.view(rows, columns)[: shape[0], :k], list(shape))


def checksum(values: Tensor, index: Tensor) -> Tensor:
    """Return eight bytes that change if a value or metadata byte changes, or if two of either are swapped."""

    def weighted(words: Tensor) -> Tensor:
        words = words.long()
        return (words * (torch.arange(len(words), device=words.device) * 2 + 1)).sum()

    total = weighted(values.view(torch.int16)) * 0x9E3779B1 + weighted(index.view(torch.int32))
    return total.view(1).view(torch.uint8)


def check(values: Tensor, index: Tensor) -> None:
    """Check that the instructions define a result for metadata from an untrusted source.

    Raises:
        InputError: two positions of a group are equal or descend, or the checksum does not match.
    """
    if len(index) < CHECKSUM_BYTES or len(index) % 4 or values.dtype.itemsize != 2:
        raise InputError("these are not packed 2:4 weights", expected="tensors from sparse24.pack")
    legal = torch.zeros(16, dtype=torch.bool, device=index.device)
    legal[list(_LEGAL)] = True
    legal = (legal[:, None] & legal[None, :]).flatten()
    if not bool(legal[index[:-CHECKSUM_BYTES].long()].all()):
        raise InputError("2:4 metadata names positions out of order", hint="pack or save the weights again")
    if not torch.equal(checksum(values, index[:-CHECKSUM_BYTES]), index[-CHECKSUM_BYTES:]):
        raise InputError("2:4 metadata does not belong to these values", hint="pack or save the weights again")


def debugging() -> bool:
    """Return True if every call must check its packed weights first, which waits for the GPU."""
    return os.environ.get("MPCOMPILE_DEBUG") == "1"
