"""Memory layouts of N:M weights for the CPU kernels: blocks of columns, and in each block a list of entries per row.

A block covers the input columns whose activations the kernel holds in the first-level cache: up to :data:`ROWS_BLOCK`
or :data:`PAIRS_BLOCK` columns. Storage order is blocks, then rows of a block, then entries of a row.

* ``ROWS`` (fp32; bf16 on processors without bf16 products): an entry is one kept value and its column in the block (one
  byte). 5 bytes per kept value in fp32, 3 in bf16. Each pair of rows begins with columns that both rows keep
  (row_order.py); the order is otherwise that of the columns.
* ``QUADS`` (bf16, 2:4): an entry is two kept values and a number that identifies their *pair* of columns. For every
  four columns the kernel holds all six pairs, interleaved as bf16 dot-product instructions read them.
* ``OCTS`` (bf16, 1:4): as ``QUADS``, but a pair takes one column from each of two neighbouring groups of four: sixteen
  pairs.
* ``RING`` (bf16, any N:M): as ``QUADS``, with pairs of columns at most three apart. A value without a partner is stored
  with a zero. Rows need different numbers of entries, so the four rows of a group are padded to the same even number of
  entries, and stored in turn, two entries of each row at a time. A table holds the start of each group of four rows.

Pair layouts take 5 bytes per two kept values.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.nm_format import MAX_M, from_rows, to_rows
from mpcompile.kernels.nm_linear import panels, sparse24
from mpcompile.kernels.nm_linear.row_order import pack_rows

ROWS, QUADS, RING, OCTS = 0, 1, 2, 3
NAMES = {ROWS: "rows", QUADS: "quads", RING: "ring", OCTS: "octs"}

ROWS_BLOCK = 96  # columns; 24 to 42 KiB for 64 to 112 fp32 tokens
PAIRS_BLOCK = 64  # columns; all their pairs take 24 KiB for 32 (RING) or 64 (QUADS) bf16 tokens
OCTS_BLOCK = 96  # columns; all their pairs take 24 KiB for 32 bf16 tokens
REACH = 3  # how far apart the columns of a RING pair may be
ENTRY_STEP = 4  # entries that the ROWS kernel reads at a time
RING_ROWS = 4  # rows that share one number of entries
RING_SPARE = 32  # one spare entry is added per this many
CONV_COLUMNS, CONV_CHANNELS = 96, 10  # a convolution's block: about this many (tap, channel) columns, and channels
QUAD_PAIRS = tuple(itertools.combinations(range(4), 2))


def block_columns(layout: int, m: int) -> int:
    """Return the number of columns in a full block of a matrix with groups of ``m``."""
    if layout == ROWS:
        return ROWS_BLOCK // m * m
    return OCTS_BLOCK if layout == OCTS else PAIRS_BLOCK


def channel_block(m: int) -> int:
    """Return the number of input channels in a full block of a convolution with groups of ``m``."""
    return m * max(1, CONV_CHANNELS // m)


class Cut(NamedTuple):
    """The cut of a weight's columns into blocks of up to ``wide`` channels at up to ``some`` taps each.

    A matrix has one tap. A convolution is cut along channels first and taps second, so that a block reads few channels;
    inside a block the taps are outermost. Packing, the checks of operators and the loading of files all use this class.
    conv.h and layouts.h implement the same cut in C++.
    """

    channels: int
    wide: int
    taps: int
    some: int

    @classmethod
    def of(cls, shape: Sequence[int], layout: int, m: int) -> Cut:
        """Return the cut of a weight of ``shape``."""
        taps = math.prod(shape[2:])
        if taps <= 1:
            return cls(shape[1], block_columns(layout, m), taps, 1)
        wide = channel_block(m)
        parts = -(-taps * wide // CONV_COLUMNS)
        return cls(shape[1], wide, taps, -(-taps // parts))

    def widths(self) -> list[tuple[int, int]]:
        """Return pairs (columns of a block, number of such blocks): at most four pairs."""
        (parts, rest), (times, left) = divmod(self.channels, self.wide), divmod(self.taps, self.some)
        pairs = [(self.wide * self.some, parts * times), (self.wide * left, parts)]
        pairs += [(rest * self.some, times), (rest * left, 1)]
        return [(width, count) for width, count in pairs if width and count]


def blocks(shape: Sequence[int], layout: int, m: int) -> list[Tensor]:
    """Return the columns of each block, as indices into the execution layout (see nm_format)."""
    cut = Cut.of(shape, layout, m)
    if not cut.channels * cut.taps:
        return []
    return [
        (chosen[:, None] * cut.channels + part[None]).flatten()
        for part in torch.arange(cut.channels).split(cut.wide)
        for chosen in torch.arange(cut.taps).split(cut.some)
    ]


def row_entries(width: int, n: int, m: int) -> int:
    """Return the entries per row of a ROWS block of ``width`` columns: kept values and padding."""
    return -(-(width // m * n + min(n, width % m)) // ENTRY_STEP) * ENTRY_STEP


def block_entries(layout: int, width: int, n: int, m: int) -> int:
    """Return the number of entries of a row in a block of ``width`` columns, for any layout but ``RING``."""
    if layout == ROWS:
        return row_entries(width, n, m)
    return -(-width // (8 if layout == OCTS else 4))


def index_bound(layout: int, width: int) -> int:
    """Return the exclusive upper bound of the numbers in the index of a block of ``width`` columns."""
    return {ROWS: width, QUADS: -(-width // 4) * 6, RING: width * REACH, OCTS: -(-width // 8) * 16}[layout]


def _check_layout(layout: int) -> None:
    if layout not in NAMES and layout not in panels.NAMES:
        raise InputError("no such layout", expected=f"one of {sorted(NAMES)}", found=layout)


def pack(weight: Tensor, mask: Tensor, n: int, m: int, layout: int) -> tuple[Tensor, Tensor]:
    """Pack a weight under an N:M mask into a layout.

    Args:
        weight: (out, in) or (out, in, kh, kw), fp32 or bf16; ``QUADS``, ``OCTS`` and ``RING`` need bf16.
        mask: boolean, of the weight's shape, ``n`` of every ``m`` columns set in the execution layout. ``QUADS`` takes
            only 2:4, ``OCTS`` only 1:4.

    Returns:
        ``values`` in the weight's dtype and ``index`` in uint8, both one-dimensional.

    Raises:
        InputError: the mask does not keep exactly ``n`` of every ``m``, or there is no such layout.
    """
    _check_layout(layout)
    rows, kept = to_rows(weight), to_rows(mask)
    bad = -1 if weight.shape[1] % m else 0
    if not bad and kept.numel():
        bad = int((kept.unflatten(-1, (-1, m)).sum(-1, dtype=torch.uint8) != n).sum())
    if bad:
        found = f"{bad} groups with another count" if bad > 0 else f"{weight.shape[1]} inputs"
        raise InputError(f"the mask is not {n}:{m}", expected=f"exactly {n} of every {m} kept", found=found)
    if layout in panels.NAMES:
        return panels.pack(weight * mask)
    nothing = rows.new_empty(0), torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.long)
    parts = [nothing]
    for columns in blocks(weight.shape, layout, m):
        block, chosen = rows[:, columns], kept[:, columns]
        if layout == ROWS:
            parts.append(pack_rows(block, chosen, row_entries(len(columns), n, m), ENTRY_STEP))
        elif layout == QUADS:
            parts.append(_pack_quads(block, chosen))
        elif layout == OCTS:
            parts.append(_pack_octs(block, chosen))
        else:
            parts.append(_pack_ring(block, chosen))
    values = torch.cat([v.flatten() for v, _, _ in parts])
    index = torch.cat([i.flatten() for _, i, _ in parts])
    if layout == RING:
        # A table precedes the column numbers: how many entries come before each group of four rows of each block, as
        # little-endian int32.
        counts = torch.cat([c for _, _, c in parts]) * RING_ROWS
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        spare = len(index) // RING_SPARE + 8  # room for another mask of the same pattern in the same buffers
        values = torch.nn.functional.pad(values, (0, 2 * spare))
        index = torch.cat([starts.view(torch.uint8), torch.nn.functional.pad(index, (0, spare))])
    return values.contiguous(), index.contiguous()


@functools.lru_cache(maxsize=4096)
def fits(values: int, index: int, shape: tuple[int, ...], n: int, m: int, layout: int) -> bool:
    """Return True if ``values`` values and ``index`` index bytes can hold a weight of ``shape`` in a layout."""
    if layout in sparse24.NAMES:
        return (n, m) == (2, 4) and sparse24.fits(values, index, shape)
    if layout in panels.NAMES:
        return panels.fits(values, index, shape)
    widths = Cut.of(shape, layout, m).widths()
    if layout == RING:
        return index - values // 2 == table_bytes(shape, m)
    entries = shape[0] * sum(block_entries(layout, width, n, m) * count for width, count in widths)
    return index == entries and values == (entries if layout == ROWS else 2 * entries)


def last_places(columns: int, n: int, m: int) -> tuple[int, int, int]:
    """Return width, entries per row, and kept values per row of the last ``ROWS`` block of a matrix."""
    full = block_columns(ROWS, m)
    width = columns % full or full
    return width, row_entries(width, n, m), width // m * n


def table_bytes(shape: Sequence[int], m: int) -> int:
    """Return the size in bytes of the table that precedes the index of a ``RING`` weight of ``shape``."""
    parts = sum(count for _, count in Cut.of(shape, RING, m).widths())
    return 4 * (parts * -(-shape[0] // RING_ROWS) + 1)


def check(values: Tensor, index: Tensor, m: int, layout: int, shape: Sequence[int] | None = None) -> None:
    """Check that an index from an untrusted source stays inside its weight's blocks.

    Args:
        shape: shape of the weight; None for a matrix of any size.

    Raises:
        InputError: a number in the index is too large, or the tensors do not have the form of the layout.
    """
    if layout in sparse24.NAMES and values.dim() == index.dim() == 1 and index.dtype == torch.uint8:
        sparse24.check(values, index)
        return
    if layout in panels.NAMES and values.dim() == 1 and not index.numel():
        return
    if (
        layout not in NAMES
        or not 1 <= m <= MAX_M
        or values.dim() != 1
        or index.dim() != 1
        or index.dtype != torch.uint8
    ):
        raise InputError("these are not packed weights", expected=f"two vectors of a layout in {sorted(NAMES)}")
    numbers = index
    if layout == RING:
        table = index[: max(0, len(index) - len(values) // 2)]
        numbers = index[len(table) :]
        starts = table.view(torch.int32) if len(table) % 4 == 0 and len(table) else torch.tensor([-1])
        steps = starts.diff()
        if starts[0] != 0 or starts[-1] > len(numbers) or bool((steps < 0).any()) or bool((steps % 8 != 0).any()):
            raise InputError("the table of packed weights is damaged", hint="pack or save them again")
    widths = [block_columns(layout, m)] if shape is None else [w for w, _ in Cut.of(shape, layout, m).widths()]
    bound = index_bound(layout, max(widths, default=1))
    if len(numbers) and int(numbers.max()) >= bound:
        largest = int(numbers.max())
        raise InputError("an index of packed weights is outside its block", expected=f"below {bound}", found=largest)


def check_places(index: Tensor, shape: Sequence[int | None], n: int, m: int) -> None:
    """Check that a ``ROWS`` index of the right length has ``n`` places in each group.

    Args:
        shape: shape of the weight, with None for the columns of a matrix if their number is unknown.

    Raises:
        InputError: the index has another pattern or another cut, or is damaged.
    """
    out = shape[0] or 0
    if not out or not len(index):
        return
    if None in shape:
        each, full = len(index) // out, row_entries(block_columns(ROWS, m), n, m)
        parts = -(-each // full)
        counts = [full] * (parts - 1) + [each - full * (parts - 1)]
        kept: list[int | None] = [block_columns(ROWS, m) // m * n] * (parts - 1) + [None]
    else:
        widths = [len(columns) for columns in blocks([size or 0 for size in shape], ROWS, m)]
        counts, kept = [row_entries(width, n, m) for width in widths], [width // m * n for width in widths]
    start = 0
    for entries, count in zip(counts, kept, strict=True):
        rows = index[start : start + out * entries].view(out, entries)
        possible = range(entries, max(0, entries - ENTRY_STEP), -1) if count is None else (count,)
        if not any(c % n == 0 and _in_groups(rows, c, n, m) for c in possible):
            raise InputError(f"an index of packed weights is not {n}:{m}", hint="pack or save them again")
        start += out * entries


def _in_groups(rows: Tensor, count: int, n: int, m: int) -> bool:
    """Return True if each row is ``count`` different places, ``n`` in each group of ``m``, and then zeros."""
    places, rest = rows[:, :count].sort(-1).values, rows[:, count:]
    group = torch.arange(count, device=rows.device) // n
    if bool(rest.any()) or bool((places[:, 1:] <= places[:, :-1]).any()):
        return False
    return bool((places.div(m, rounding_mode="floor") == group.to(torch.uint8)).all())


def _pack_quads(block: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pad = -block.shape[1] % 4
    block = torch.nn.functional.pad(block, (0, pad)).unflatten(-1, (-1, 4))
    kept = torch.nn.functional.pad(kept, (0, pad)).unflatten(-1, (-1, 4))
    number = torch.zeros(16, dtype=torch.uint8)
    for position, (i, j) in enumerate(QUAD_PAIRS):
        number[(1 << i) | (1 << j)] = position
    bits = (kept * torch.tensor([1, 2, 4, 8])).sum(-1)
    code = number[bits]
    places = torch.tensor(QUAD_PAIRS)[code.long()]
    values = block.gather(-1, places)
    index = code + torch.arange(block.shape[1], dtype=torch.uint8) * len(QUAD_PAIRS)
    return values, index, torch.empty(0)


def _pack_octs(block: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pad = -block.shape[1] % 8
    block = torch.nn.functional.pad(block, (0, pad)).unflatten(-1, (-1, 2, 4))
    kept = torch.nn.functional.pad(kept, (0, pad)).unflatten(-1, (-1, 2, 4))
    place = kept.to(torch.uint8).argmax(-1)
    values = (block * kept).sum(-1, dtype=block.dtype)  # one of the four is kept, or none in the padding
    index = place[..., 0] * 4 + place[..., 1] + torch.arange(block.shape[1]) * 16
    return values, index.to(torch.uint8), torch.empty(0)


def _pack_ring(block: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = block.shape[1]
    short = -len(block) % RING_ROWS
    block = torch.nn.functional.pad(block, (0, 0, 0, short))
    kept = torch.nn.functional.pad(kept, (0, 0, 0, short))
    count = torch.zeros(len(block), dtype=torch.long)
    capacity = int(kept.sum(-1).max()) if len(block) else 0
    first = torch.full((len(block), capacity + 2), -1)
    second = torch.full((len(block), capacity + 2), -1)
    waiting = torch.full((len(block),), -1)
    rows = torch.arange(len(block))
    # From left to right, a kept column pairs with the waiting one if that is near enough, and waits otherwise. Only
    # distance decides, so this greedy order leaves the fewest columns without a partner.
    for c in range(width):
        here = kept[:, c]
        joins = here & (waiting >= 0) & (c - waiting <= REACH)
        alone = here & (waiting >= 0) & ~joins
        done = joins | alone
        first[rows[done], count[done]] = waiting[done]
        second[rows[joins], count[joins]] = c
        count += done
        waiting = torch.where(
            joins, torch.full_like(waiting, -1), torch.where(here, torch.full_like(waiting, c), waiting)
        )
    left = waiting >= 0
    first[rows[left], count[left]] = waiting[left]
    count += left
    four = (count.view(-1, RING_ROWS).amax(-1) + 1) // 2 * 2
    entries = int(four.max()) if len(four) else 0
    first, second = first[:, :entries], second[:, :entries]
    low = block.gather(1, first.clamp(min=0)) * (first >= 0)
    high = block.gather(1, second.clamp(min=0)) * (second >= 0)
    step = torch.where(second >= 0, second - first - 1, torch.zeros_like(first))
    number = torch.where(first >= 0, first * REACH + step, torch.zeros_like(first)).to(torch.uint8)
    inside = torch.arange(0, entries, 2) < four[:, None]  # (fours, entries / 2)
    values = torch.stack([low, high], -1).view(-1, RING_ROWS, entries // 2, 2, 2).transpose(1, 2)[inside]
    return values, number.view(-1, RING_ROWS, entries // 2, 2).transpose(1, 2)[inside], four


def unpack(values: Tensor, index: Tensor, shape: Sequence[int], n: int, m: int, layout: int) -> Tensor:
    """Return the dense weight of ``shape`` that (values, index) hold; differentiable in ``values``.

    Example:
        >>> w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> unpack(*pack(w, w > 2, 2, 4, ROWS), (1, 4), 2, 4, ROWS)
        tensor([[0., 0., 3., 4.]])
    """
    if layout in sparse24.NAMES:
        return sparse24.unpack(values, index, shape, layout)
    if layout in panels.NAMES:
        return panels.unpack(values, shape)
    _check_layout(layout)
    out, k = int(shape[0]), math.prod(shape[1:])
    parts = blocks(shape, layout, m)
    dense = values.new_zeros(out * k)
    start = 0
    starts: Tensor | None = None
    four = -(-out // RING_ROWS)
    if layout == RING:
        size = (len(parts) * four + 1) * 4
        starts = index[:size].contiguous().view(torch.int32).long()
        index = index[size:]
    for b, columns in enumerate(parts):
        width = len(columns)
        if starts is not None:
            bounds = starts[b * four : (b + 1) * four + 1]
            end = int(bounds[-1])
            each = bounds.diff() // RING_ROWS
            steps = torch.arange(RING_ROWS).repeat_interleave(2).repeat(int(each.sum()) // 2)
            row = torch.arange(four).repeat_interleave(each * RING_ROWS) * RING_ROWS + steps
        else:
            entries = block_entries(layout, width, n, m)
            end = start + out * entries
            row = torch.arange(out).repeat_interleave(entries)
        number = index[start:end].long()
        if layout == ROWS:
            place, value = number, values[start:end]
        else:
            value = values[2 * start : 2 * end]
            if layout == QUADS:
                pair = torch.tensor(QUAD_PAIRS)[number % 6] + number[:, None] // 6 * 4
            elif layout == OCTS:
                pair = number[:, None] // 16 * 8 + torch.stack([number // 4 % 4, number % 4 + 4], -1)
            else:
                pair = (number // REACH)[:, None] + torch.stack([torch.zeros_like(number), number % REACH + 1], -1)
            place, row = pair.flatten(), row.repeat_interleave(2)
            valid = (row < out) & (place < width)
            place, row, value = place[valid], row[valid], value[valid]
        # index_add, not a copy: padding entries name real columns, to which they add zero instead of
        # overwriting them.
        dense = dense.index_add(0, row * k + columns[place], value)
        start = end
    return from_rows(dense.view(out, k), list(shape))
