"""Moments: means and second moments of the inputs of each layer.

:func:`collect` runs the dense graph once and gathers the moments of every layer; stream.py goes layer by layer instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from tqdm import tqdm

from mpcompile.errors import InputError, first_line
from mpcompile.ir.effects import own_copies
from mpcompile.ir.module import Imported
from mpcompile.ir.numerics import exact, training_flags
from mpcompile.ir.view import LayerOp, layers

_COLUMNS = 512  # columns of second moments that are computed together
_VALUES = 1 << 24  # input values per layer and batch; of larger inputs, evenly spaced rows are taken
FULL, BLOCK, DIAGONAL = "full", "block", "diagonal"


def kind_for(layer: LayerOp, m: int, budget: float) -> tuple[str, int]:
    """Return the most complete kind of statistics that fits into ``budget`` bytes, and its bytes in float64.

    The diagonal is always allowed.
    """
    groups = 1 if layer.geometry is None else layer.geometry.groups
    k = math.prod(layer.weight.tensor.shape[1:])
    for kind, size in ((FULL, groups * k * k * 8), (BLOCK, groups * k * m * 8)):
        if size <= budget:
            return kind, size
    return DIAGONAL, groups * k * 8


def input_rows(x: Tensor, layer: LayerOp) -> tuple[Tensor, slice]:
    """Return the input rows that a layer multiplies by its weight, and the slice of rows that were taken.

    Args:
        x: input of the layer, (..., in) or (B, C, H, W).

    Returns:
        (groups, rows, K) in the execution layout, and the slice.
    """
    if layer.geometry is None:
        rows = x.reshape(1, -1, x.shape[-1])
        taken = slice(None, None, max(1, -(-rows.numel() // _VALUES)))
        return rows[:, taken].float(), taken
    geometry, (_, _, kh, kw) = layer.geometry, layer.weight.tensor.shape
    (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
    padded = F.pad(x, (pw, pw, ph, ph))
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    taken = slice(None, None, max(1, -(-(x.shape[0] * height * width * x.shape[1] * kh * kw) // _VALUES)))
    taps = []
    for i, j in itertools.product(range(kh), range(kw)):
        seen = padded[:, :, i * dh : i * dh + sh * height : sh, j * dw : j * dw + sw * width : sw]
        tap = seen.permute(1, 0, 2, 3).reshape(geometry.groups, -1, seen[:, 0].numel())[:, :, taken]
        taps.append(tap.transpose(1, 2).float())
    return torch.cat(taps, 2), taken


def output_rows(y: Tensor, layer: LayerOp, taken: slice) -> Tensor:
    """Return outputs of a layer as (rows, out), for the rows that :func:`input_rows` took."""
    flat = y.reshape(-1, y.shape[-1]) if layer.geometry is None else y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
    return flat[taken].float()


@dataclass
class Moments:
    """Means over the input rows x of one layer, and over the target outputs y, in float64.

    Attributes:
        count: input rows seen.
        kind: ``"full"``, ``"block"`` or ``"diagonal"``.
        xx: E[x x'], (groups, K, K); or its diagonal blocks (groups, K / m, m, m); or its diagonal (groups, K).
        x: E[x], (groups, K).
        yx: E[y x'], (out, K), if the targets y differ from the weight's own outputs on x; else None.
        y: E[y], (out,), under the same condition.
    """

    count: int
    kind: str
    xx: Tensor
    x: Tensor
    yx: Tensor | None = None
    y: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as named tensors, for a file."""
        named = {"count": torch.tensor(self.count), "xx": self.xx, "x": self.x, "yx": self.yx, "y": self.y}
        return {k: v.contiguous() for k, v in named.items() if v is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Build moments from the result of :meth:`tensors`."""
        xx, x = tensors["xx"], tensors["x"]
        kind = DIAGONAL if xx.shape == x.shape else FULL if xx.dim() == 3 else BLOCK
        return cls(int(tensors["count"]), kind, xx, x, tensors.get("yx"), tensors.get("y"))

    def block(self, m: int) -> Tensor:
        """Return diagonal blocks of E[x x'], (groups, K / m, m, m); diagonal if only that is known."""
        if self.kind == BLOCK and self.xx.shape[-1] == m:
            return self.xx
        if self.kind == BLOCK and self.xx.shape[-1] % m == 0:
            inner = self.xx.unflatten(3, (-1, m)).unflatten(2, (-1, m))
            return inner.diagonal(dim1=2, dim2=4).movedim(-1, 2).flatten(1, 2)
        if self.kind != FULL:
            return torch.diag_embed(self.power.unflatten(-1, (-1, m)))
        blocks = self.xx.unflatten(2, (-1, m)).unflatten(1, (-1, m))
        return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def centred(self) -> Moments:
        """Return central moments, for a layer whose outputs have their means subtracted later, as BatchNorm does."""
        x = self.x
        if self.kind == FULL:
            outer = x[:, :, None] * x[:, None, :]
        elif self.kind == BLOCK:
            h = x.unflatten(-1, (-1, self.xx.shape[-1]))
            outer = h[..., :, None] * h[..., None, :]
        else:
            outer = x.square()
        yx = self.yx
        if yx is not None and self.y is not None:
            means = zip(self.y.chunk(len(x)), x, strict=True)
            yx = yx - torch.cat([part[:, None] * mean[None, :] for part, mean in means])
        return replace(self, xx=self.xx - outer, yx=yx)

    @property
    def power(self) -> Tensor:
        """E[x_j^2], (groups, K)."""
        if self.kind == DIAGONAL:
            return self.xx
        return self.xx.diagonal(dim1=-2, dim2=-1).flatten(1)


def _gram(rows: Tensor) -> Tensor:
    """Return X' X, (groups, rows, K) -> (groups, K, K). It is symmetric: blocks below the diagonal are mirrored."""
    k = rows.shape[-1]
    result = rows.new_empty((len(rows), k, k))
    for start in range(0, k, _COLUMNS):
        block = slice(start, min(k, start + _COLUMNS))
        above = rows[:, :, : block.stop].transpose(1, 2) @ rows[:, :, block]
        result[:, : block.stop, block] = above
        result[:, block, :start] = above[:, :start].transpose(1, 2)
    return result


class Accumulator:
    """Accumulate the moments of one layer batch by batch."""

    def __init__(self, layer: LayerOp, m: int, kind: str) -> None:
        self.layer, self.m, self.kind, self.count = layer, m, kind, 0
        self.sums: dict[str, Tensor] = {}

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value.double()

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Add an input of the layer, and its target output, both in the layout of the graph."""
        rows, taken = input_rows(x, self.layer)
        self.count += rows.shape[1]
        # In float64, so that the order in which threads add up cannot change which mask is chosen.
        rows = rows.double()
        self._add("x", rows.sum(1))
        if self.kind == FULL:
            self._add("xx", _gram(rows))
        elif self.kind == BLOCK:
            h = rows.unflatten(-1, (-1, self.m)).transpose(1, 2)
            self._add("xx", h.transpose(-1, -2) @ h)
        else:
            self._add("xx", rows.square().sum(1))
        if y is not None:
            wanted = output_rows(y, self.layer, taken).double()
            pairs = zip(wanted.chunk(len(rows), 1), rows, strict=True)
            self._add("yx", torch.cat([part.T @ r for part, r in pairs]))
            self._add("y", wanted.sum(0))

    def result(self) -> Moments:
        """Return the means.

        Raises:
            InputError: the layer's inputs were not finite.
        """
        means = {key: value / self.count for key, value in self.sums.items()}
        if not bool(torch.isfinite(means["xx"]).all()):
            raise InputError(
                "the inputs of this layer on the calibration data are not finite",
                layer=self.layer.name,
                expected="finite activations",
                found="NaN or infinity",
                hint="calibrate in fp32, and with the transform of inference",
            )
        return Moments(self.count, self.kind, means["xx"], means["x"], means.get("yx"), means.get("y"))


class _Collector(fx.Interpreter):
    """Run the graph and accumulate moments at the watched layers."""

    def __init__(self, model: Imported, watched: Mapping[fx.Node, tuple[fx.Node, Accumulator]]) -> None:
        super().__init__(model.gm)
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        if n in self.watched:
            source, accumulator = self.watched[n]
            accumulator.add(self.env[source])
        return super().run_node(n)


@exact()
def collect(
    model: Imported,
    values: Iterable[list[Any]],
    sizes: Mapping[str, int],
    budget: float = math.inf,
    kind: str | None = None,
) -> dict[str, Moments]:
    """Return the moments of the inputs of each layer of the dense model in eval mode, from one pass over the data.

    Args:
        model: the imported model, whose nodes carry shapes.
        values: the graph inputs of every batch, from :func:`mpcompile.calibration.data.batches`.
        sizes: layers to watch, name -> columns per group (m).
        budget: bytes for all layers together: each stores full moments, else blocks, else the diagonal, as its share
            of the remaining bytes allows.
        kind: kind of moments for all layers, regardless of the budget.

    Raises:
        InputError: there is no batch, or the model rejects one.
    """
    uses = [layer for layer in layers(model.gm, model.lifted) if layer.name in sizes]
    first = {layer.name: layer for layer in reversed(uses)}
    by_name: dict[str, Accumulator] = {}
    for position, layer in enumerate(sorted(first.values(), key=lambda u: u.weight.tensor.numel())):
        fits, size = kind_for(layer, sizes[layer.name], budget / (len(first) - position))
        by_name[layer.name] = Accumulator(layer, sizes[layer.name], kind or fits)
        budget -= size
    watched = {layer.node: (layer.input, by_name[layer.name]) for layer in uses}
    collector, seen = _Collector(model, watched), 0
    with training_flags(model.gm, False), torch.no_grad():
        for batch in tqdm(values, desc="calibrate", unit="batch", disable=None):
            seen += 1
            try:
                collector.run(*own_copies(model.gm, batch))
            except RuntimeError as error:
                raise InputError(f"the model rejects a calibration batch: {first_line(error)}") from error
    if not seen:
        raise InputError("calibration is empty", expected="at least one batch", found="none")
    return {name: accumulator.result() for name, accumulator in by_name.items()}
