"""Dense weights as the CPU kernels read them: panels of :data:`OUTPUTS` output rows, column after column.

A weight (out, in) becomes (panels, in, OUTPUTS): the outputs of a panel are the lanes of vectors, and the kernel reads
a panel from its first to its last address. The last panel is padded with zero rows. There is no index. A masked weight
keeps its zeros: where its pattern has no faster kernel, this layout serves it as it serves a dense one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PANELS = 4  # beside the layouts of layouts.py and sparse24.py; LAYOUT_PANELS in layouts.h
NAMES = {PANELS: "panels"}
OUTPUTS = 16


def fits(values: int, index: int, shape: Sequence[int]) -> bool:
    """Return True if ``values`` values and ``index`` index bytes hold a weight (out, in)."""
    return len(shape) == 2 and index == 0 and values == -(-shape[0] // OUTPUTS) * OUTPUTS * shape[1]


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Pack a weight (out, in) in fp32.

    Returns:
        ``values`` in the weight's dtype, one-dimensional, and an empty ``index`` in uint8.

    Example:
        >>> pack(torch.eye(2))[0].view(2, 16)[:, :3]
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    padded = torch.nn.functional.pad(weight.detach(), (0, 0, 0, -len(weight) % OUTPUTS))
    values = padded.unflatten(0, (-1, OUTPUTS)).transpose(1, 2).contiguous().flatten()
    return values, torch.empty(0, dtype=torch.uint8, device=weight.device)


def unpack(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the weight of ``shape`` (out, in) that ``values`` hold; differentiable.

    Example:
        >>> unpack(pack(torch.eye(2))[0], (2, 2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    out, columns = shape
    return values.view(-(-out // OUTPUTS), columns, OUTPUTS).transpose(1, 2).flatten(0, 1)[:out]
