"""Calibration: one streamed pass over data -> second moments of what enters each layer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from tqdm import tqdm

from mpcompile.errors import InputError
from mpcompile.graph import IRModule, LayerOp, layers, shape_of, training_flags
from mpcompile.importers import Imported

_ROWS = 16384  # input rows of a layer that one batch contributes at most, evenly spaced


def as_batches(data: Any) -> Iterable[Any]:
    """One tensor or one dict is one batch; anything else is an iterable of batches."""
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not isinstance(data, Iterable):
        raise InputError(
            "calibration has the wrong type",
            expected="an iterable of batches (tensors, tuples whose first item is the input, or dicts)",
            found=type(data).__name__,
        )
    return data


def peek(data: Any) -> tuple[Any, Iterable[Any]]:
    """The first batch, and an iterable that still starts with it.

    Raises:
        InputError: there is none.
    """
    iterator = iter(as_batches(data))
    try:
        first = next(iterator)
    except StopIteration:
        raise InputError("calibration is empty", expected="at least one batch", found="none") from None
    return first, itertools.chain([first], iterator)


def model_inputs(batch: Any, names: list[str]) -> list[Any]:
    """The inputs in a batch, in the order of ``names``: all by keyword from a dict, else the first alone."""
    if isinstance(batch, Mapping):
        if set(batch) != set(names):
            raise InputError("a calibration batch has the wrong keys", expected=", ".join(names), found=list(batch))
        return [batch[name] for name in names]
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise InputError("a calibration batch is empty", expected="a tuple whose first item is the input")
        batch = batch[0]
    if not isinstance(batch, Tensor):
        raise InputError(
            "a calibration batch has the wrong type",
            expected="a tensor, a tuple whose first item is the input, or a dict",
            found=type(batch).__name__,
        )
    return [batch]


def group_moments(x: Tensor, layer: LayerOp, m: int) -> tuple[Tensor, int]:
    """Sum over input rows of h h' for each group h of ``m`` columns, and the number of rows.

    Args:
        x: input of the layer, (..., in) or (B, C, H, W).

    Returns:
        (groups, K / m, m, m) in float64, columns in the execution layout.
    """
    if layer.geometry is None:
        rows = x.reshape(1, -1, x.shape[-1])
        taps = [rows]
    else:
        geometry, (_, _, kh, kw) = layer.geometry, layer.weight.tensor.shape
        (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
        padded = F.pad(x, (pw, pw, ph, ph))
        height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
        taps = []
        for i, j in itertools.product(range(kh), range(kw)):
            seen = padded[:, :, i * dh : i * dh + sh * height : sh, j * dw : j * dw + sw * width : sw]
            taps.append(seen.permute(1, 0, 2, 3).reshape(geometry.groups, -1, seen[:, 0].numel()).transpose(1, 2))
    total, count = [], taps[0].shape[1]
    step = -(-count // _ROWS)
    for tap in taps:
        h = tap[:, ::step].float().unflatten(-1, (-1, m)).transpose(1, 2)  # (groups, in / m, rows, m)
        total.append((h.transpose(-1, -2) @ h).double())
    return torch.cat(total, 1), len(range(0, count, step))


class _Collector(fx.Interpreter):
    """Runs the graph and adds up moments at the layers it watches."""

    def __init__(self, gm: IRModule, watched: list[LayerOp], sizes: Mapping[str, int]) -> None:
        super().__init__(gm)
        self.watched = {layer.node: layer for layer in watched}
        self.sizes = sizes
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        layer = self.watched.get(n)
        if layer is not None:
            total, count = group_moments(self.env[layer.input], layer, self.sizes[layer.name])
            known = self.sums.get(layer.name)
            self.sums[layer.name] = total if known is None else known + total
            self.counts[layer.name] = self.counts.get(layer.name, 0) + count
        return super().run_node(n)


def _batches(model: Imported, calibration: Iterable[Any]) -> Iterator[list[Any]]:
    """Each calibration batch as the full list of graph inputs, its shape checked against the example's."""
    placeholders = [n for n in model.gm.graph.nodes if n.op == "placeholder"]
    data = [n for n in placeholders if n.name not in model.lifted.tensors]
    device = next((p.device for p in model.gm.parameters()), torch.device("cpu"))
    for index, batch in enumerate(calibration):
        values = model_inputs(batch, [str(n.target) for n in data])
        if len(values) != len(data):
            raise InputError(
                f"calibration batch {index} has the wrong number of inputs",
                expected=f"{len(data)} ({', '.join(str(n.target) for n in data)}), as a dict",
                found=len(values),
            )
        for node, value in zip(data, values, strict=True):
            shape = shape_of(node)
            if shape is not None and tuple(value.shape[1:]) != shape[1:]:
                raise InputError(
                    f"calibration batch {index} has the wrong shape",
                    expected=f"(batch, {', '.join(map(str, shape[1:]))}), as in example_inputs",
                    found=tuple(value.shape),
                    hint="calibrate with the transform and the resolution of inference",
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InputError(f"calibration batch {index} is not finite", expected="no NaN and no infinity")
        moved = dict(zip(data, (v.to(device) for v in values), strict=True))
        yield [moved[n] if n in moved else model.lifted.tensors[n.name] for n in placeholders]


def collect_moments(model: Imported, calibration: Any, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Mean second moments of the inputs of each layer, group by group, on the dense model in eval mode.

    Args:
        model: the imported model, its nodes carrying shapes.
        calibration: an iterable of batches.
        sizes: layers to watch, by name -> columns a group (m).

    Returns:
        Layer name -> (groups, K / m, m, m), float32.

    Raises:
        InputError: no batch, or one of another shape or type than the example inputs.
    """
    watched = [layer for layer in layers(model.gm, model.lifted) if layer.name in sizes]
    collector = _Collector(model.gm, watched, sizes)
    with training_flags(model.gm, False), torch.no_grad():
        for values in tqdm(_batches(model, as_batches(calibration)), desc="calibrate", unit="batch", disable=None):
            try:
                collector.run(*values)
            except RuntimeError as error:
                raise InputError(f"the model rejects a calibration batch: {str(error).splitlines()[0]}") from error
    if not collector.counts:
        raise InputError("calibration is empty", expected="at least one batch", found="none")
    return {name: (total / collector.counts[name]).float() for name, total in collector.sums.items()}
