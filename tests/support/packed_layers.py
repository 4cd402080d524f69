"""Random layers with N:M masks, their packed weights, and arguments of the native operators for them."""

from __future__ import annotations

import torch

from mpcompile.kernels.nm_linear import layouts
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.nm_linear.layouts import OCTS, QUADS, RING, ROWS
from mpcompile.kernels.nm_linear.panels import PANELS
from mpcompile.pruning.scores import top_n


def usable(dtype, n, m):
    """Layouts of a pattern that the kernels of this processor can read."""
    usable_layouts = [ROWS, PANELS] if dtype is torch.float32 else [ROWS]
    if dtype is torch.bfloat16 and native.kernels().nm_pairs():
        usable_layouts.append(RING)
        usable_layouts += [QUADS] if (n, m) == (2, 4) else [OCTS] if (n, m) == (1, 4) else []
    return usable_layouts


def layer(shape, n, m, dtype, seed=0):
    """A random weight and N:M mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    rows = layouts.to_rows(torch.randn(shape, generator=generator))
    mask = layouts.from_rows(top_n(rows.unflatten(-1, (-1, m)), n).flatten(-2), shape)
    return weight, mask


def matrix(out=16, k=64, n=2, m=4, dtype=torch.float32, layout=ROWS):
    return layouts.pack(*layer((out, k), n, m, dtype), n, m, layout)


GEMM = {"out": 16, "n": 2, "m": 4, "layout": ROWS, "activation": "none"}
CONV = {
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
    "n": 2,
    "m": 4,
    "shape": [8, 8, 3, 3],
    "layout": ROWS,
    "activation": "none",
}
