"""Order of the entries of a ``ROWS`` weight: columns that two neighbouring rows both keep come first.

The kernel computes rows in pairs. Where the next entries of both rows have the same columns, it loads the activations
of a column once for both; loads are what limits it. Random 12:16 rows share two thirds of their entries, 8:16 rows a
third. The kernel compares the indices, so that any other order gives the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def common_first(kept: Tensor, step: int) -> Tensor:
    """Return the columns of each row in storage order: common ones, other kept ones, the rest; each part ascending.

    Every pair of rows has the same number of common columns, the largest multiple of ``step`` that all pairs reach:
    loops of equal length are predicted well. The last kept column of a row is never among them, because checks read the
    width of a block from its last entry. An odd last row has none.

    Args:
        kept: boolean, (rows, columns).
    """
    paired = len(kept) // 2 * 2
    common = torch.zeros_like(kept)
    if paired and kept.shape[1]:
        total = kept.cumsum(-1)
        before_last = kept & (total < total[:, -1:])
        both = before_last[:paired].unflatten(0, (-1, 2)).all(1)
        count = int(both.sum(-1).min()) // step * step
        common[:paired] = (both & (both.cumsum(-1) <= count)).repeat_interleave(2, 0)
    rank = kept.to(torch.uint8) + common.to(torch.uint8)
    return rank.argsort(dim=-1, descending=True, stable=True)


def pack_rows(block: Tensor, kept: Tensor, entries: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values and the index of a block of a ``ROWS`` weight, padded with zeros to ``entries`` per row."""
    order = common_first(kept, step)[:, :entries]
    order = torch.nn.functional.pad(order, (0, entries - order.shape[1]))
    valid = torch.arange(entries) < kept.sum(-1, keepdim=True)
    order = order * valid
    return block.gather(1, order) * valid, order.to(torch.uint8), torch.empty(0)
