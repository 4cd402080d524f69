"""Search for the order of one class of channels under which magnitude masks remove least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcompile.ir.view import LayerOp
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.base import Context
from mpcompile.passes.channels.axes import ChannelAnalysis
from mpcompile.passes.permute.channel_classes import ChannelClass
from mpcompile.pruning.column_order import retained, search

_ROWS = 512  # rows per class that the search works on, drawn in equal numbers from all its readers
_STEPS = 400  # steps of the search


@dataclass(frozen=True)
class Reordered:
    """A class of channels and its new order.

    Attributes:
        layers: the readers that the order was searched for: those with the most common pattern.
        channels: number of channels in the class.
        orders: number of orders: one, or one per head or group.
        pattern: pattern of these layers.
        order: (orders, channels) indices.
        lost_before, lost_after: share of the weights' energy that magnitude masks remove, mean over the layers.
        writers: layers whose outputs are these channels, by which training compares features with those of the
            original model; empty if there are several orders.
        readers: all layers that read the channels; the first one identifies the class when the decision is applied.
    """

    layers: tuple[str, ...]
    channels: int
    orders: int
    pattern: str
    order: list[list[int]]
    lost_before: float
    lost_after: float
    writers: tuple[str, ...]
    readers: tuple[str, ...]


def best_order(
    candidate: ChannelClass, analysis: ChannelAnalysis, power: Mapping[str, Tensor], ctx: Context
) -> Reordered | None:
    """Return the order of a class under which magnitude masks remove least, or None if the present one is no worse."""
    atoms = analysis.atoms
    size = atoms.size[candidate.atom]
    owners = 1 if candidate.owner is None else atoms.size[candidate.owner]
    patterns = {n: ctx.pattern_for(u) for n, u in candidate.readers.items()}
    pattern: Pattern | None = Counter(patterns.values()).most_common(1)[0][0]
    readers = {n: u for n, u in candidate.readers.items() if patterns[n] == pattern}
    if pattern is None or size % pattern.m or size // pattern.m < 2 or pattern.n == pattern.m:
        return None
    each = [_rows(u, power.get(n), owners, size) for n, u in readers.items()]
    each = [rows / _total(rows) for rows in each]  # gives the relative error of every layer the same weight
    order = search(_sample(each, ctx.seed), pattern, _STEPS, ctx.seed)
    before = sum(float(retained(rows, pattern).sum()) for rows in each)
    after = sum(float(retained(rows.gather(2, order[:, None].expand_as(rows)), pattern).sum()) for rows in each)
    if not after > before:
        return None
    return Reordered(
        layers=tuple(readers),
        channels=size,
        orders=owners,
        pattern=str(pattern),
        order=order.tolist(),
        lost_before=1 - before / len(each),
        lost_after=1 - after / len(each),
        writers=tuple(_writers(candidate, analysis)),
        readers=tuple(candidate.readers),
    )


def _sample(each: Sequence[Tensor], seed: int) -> Tensor:
    """Return the rows that the search works on: the same number per layer, scaled to preserve each layer's total."""
    generator = torch.Generator().manual_seed(seed)
    share = max(32, _ROWS // len(each))
    drawn = [torch.randperm(rows.shape[1], generator=generator)[:share].to(rows.device) for rows in each]
    sample = [rows[:, places] for rows, places in zip(each, drawn, strict=True)]
    return torch.cat([s * (_total(rows) / _total(s)) for s, rows in zip(sample, each, strict=True)], 1)


def _writers(candidate: ChannelClass, analysis: ChannelAnalysis) -> list[str]:
    """Return the layers whose outputs are the channels of a class, if it has a single order; else none."""
    if candidate.owner is not None:
        return []
    expand = analysis.atoms.expand
    weights = [(name, dims) for name, dims in analysis.dims.items() if len(dims) > 1]
    return [name.removesuffix(".weight") for name, dims in weights if expand(dims[0]) == [candidate.atom]]


def _total(scores: Tensor) -> float:
    """Return the sum in float64, so that the order in which threads add up cannot change which order is chosen."""
    return max(float(scores.sum(dtype=torch.float64)), 1e-30)


def _rows(layer: LayerOp, power: Tensor | None, owners: int, size: int) -> Tensor:
    """Return squared weights, times the power of their inputs, as (owners or 1, rows, size)."""
    weight = layer.weight.tensor.detach().float().square()
    if power is not None:
        groups, per = len(power), weight.shape[0] // len(power)
        taps = power.reshape(groups, -1, weight.shape[1]).transpose(1, 2)  # (groups, in, taps)
        taps = taps.repeat_interleave(per, 0).reshape(weight.shape[0], weight.shape[1], *weight.shape[2:])
        weight = weight * taps.to(weight)
    columns = weight.movedim(1, -1)  # (out, taps, in)
    if owners == 1:
        return columns.reshape(1, -1, size)
    if columns.shape[-1] == owners * size:  # heads: (out, heads, channels per head)
        return columns.reshape(-1, owners, size).transpose(0, 1)
    return columns.reshape(owners, -1, size)  # groups: each has its own rows
