"""Calibration: batches on their way through the graph -> second moments of what enters each layer.

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

_COLUMNS = 512  # of second moments, computed together
_VALUES = 1 << 24  # input values of a layer that one batch contributes at most, in evenly spaced rows
FULL, BLOCK, DIAGONAL = "full", "block", "diagonal"


def kind_for(layer: LayerOp, m: int, budget: float) -> tuple[str, int]:
    """The richest statistics of a layer that fit into ``budget`` bytes, and the bytes they take (float64)."""
    groups = 1 if layer.geometry is None else layer.geometry.groups
    k = math.prod(layer.weight.tensor.shape[1:])
    for kind, size in ((FULL, groups * k * k * 8), (BLOCK, groups * k * m * 8)):
        if size <= budget:
            return kind, size
    return DIAGONAL, groups * k * 8


def input_rows(x: Tensor, layer: LayerOp) -> tuple[Tensor, slice]:
    """What a layer multiplies its rows with: (groups, rows, K) in the execution layout, and which rows were taken.

    Args:
        x: input of the layer, (..., in) or (B, C, H, W).
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
    """Outputs of a layer as (rows, out), the rows that :func:`input_rows` took."""
    flat = y.reshape(-1, y.shape[-1]) if layer.geometry is None else y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
    return flat[taken].float()


@dataclass
class Moments:
    """Means over the input rows x of one layer, and over the outputs y that it should give. float64.

    Attributes:
        count: input rows seen.
        kind: ``"full"``, ``"block"`` or ``"diagonal"``.
        xx: E[x x'], (groups, K, K); or its diagonal blocks (groups, K / m, m, m); or its diagonal (groups, K).
        x: E[x], (groups, K).
        yx: E[y x'], (out, K), where y is not what the weight makes of these x; else None.
        y: E[y], (out,), likewise.
    """

    count: int
    kind: str
    xx: Tensor
    x: Tensor
    yx: Tensor | None = None
    y: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, for a file."""
        found = {"count": torch.tensor(self.count), "xx": self.xx, "x": self.x, "yx": self.yx, "y": self.y}
        return {k: v.contiguous() for k, v in found.items() if v is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Inverse of :meth:`tensors`."""
        xx, x = tensors["xx"], tensors["x"]
        kind = DIAGONAL if xx.shape == x.shape else FULL if xx.dim() == 3 else BLOCK
        return cls(int(tensors["count"]), kind, xx, x, tensors.get("yx"), tensors.get("y"))

    def block(self, m: int) -> Tensor:
        """Diagonal blocks of E[x x'], (groups, K / m, m, m); with zeros beside the diagonal where no more is known."""
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
        """The same about the means: what counts where constant parts of the outputs are taken off again."""
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
    """X' X, (groups, rows, K) -> (groups, K, K). It is symmetric: blocks of columns below the diagonal are mirrored."""
    k = rows.shape[-1]
    result = rows.new_empty((len(rows), k, k))
    for start in range(0, k, _COLUMNS):
        block = slice(start, min(k, start + _COLUMNS))
        above = rows[:, :, : block.stop].transpose(1, 2) @ rows[:, :, block]
        result[:, : block.stop, block] = above
        result[:, block, :start] = above[:, :start].transpose(1, 2)
    return result


class Accumulator:
    """Adds up the moments of one layer batch by batch."""

    def __init__(self, layer: LayerOp, m: int, kind: str) -> None:
        self.layer, self.m, self.kind, self.count = layer, m, kind, 0
        self.sums: dict[str, Tensor] = {}

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value.double()

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Input of the layer, and the output it should give, both as the graph has them."""
        rows, taken = input_rows(x, self.layer)
        self.count += rows.shape[1]
        # In float64: in which order threads add must not decide between masks.
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
        """The means.

        Raises:
            InputError: the layer's inputs were not finite.
        """
        means = {key: value / self.count for key, value in self.sums.items()}
        if not bool(torch.isfinite(means["xx"]).all()):
            raise InputError(
                "what enters this layer on the calibration data is not finite",
                layer=self.layer.name,
                expected="finite activations",
                found="NaN or infinity",
                hint="calibrate in fp32, and with the transform of inference",
            )
        return Moments(self.count, self.kind, means["xx"], means["x"], means.get("yx"), means.get("y"))


class _Collector(fx.Interpreter):
    """Runs the graph and adds up moments at the layers it watches."""

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
    """Moments of the inputs of each layer on the dense model in eval mode, in one pass.

    Args:
        model: the imported model, its nodes carrying shapes.
        values: the graph inputs of every batch, from :func:`batches`.
        sizes: layers to watch, by name -> columns a group (m).
        budget: bytes for all of them together: a layer keeps full moments, else blocks, else the diagonal, as its
            share of what is left allows.
        kind: of all of them, whatever the budget.

    Raises:
        InputError: no batch, or one that the model rejects.
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
