"""Rows of an audit for other runtimes: the dense model there, and our own graph, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile.data.calls import call_form
from mpcompile.data.outputs import numbers_of
from mpcompile.errors import ConfigError, InputError, first_line
from mpcompile.ir.module import IRModule
from mpcompile.kernels import ops
from mpcompile.measure.builds import InRuntime
from mpcompile.measure.environment import first_tensor
from mpcompile.measure.report import Row
from mpcompile.runtimes.base import Arguments, Runtime, titled
from mpcompile.runtimes.catalogue import exported, fp32_copy, in_fp32

# Largest relative RMS difference of a sample's outputs from those of the same graph in fp32, median over the samples:
# rounding changes which of several nearly equal tokens merge, in some images. Beyond it, the conversion is wrong.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25, "int8": 0.5}
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PAUSE = 0.01  # seconds between two timings

Entry = tuple[Row, InRuntime | None]  # None if the row has a reason


def precision_of(batch: Any) -> str | None:
    """Return the precision that an audit of a batch is about."""
    return PRECISION.get(first_tensor(batch).dtype)


def check_device(batch: Any) -> None:
    """Check that a batch is where the runtimes run.

    Raises:
        ConfigError: it is not on the processor.
    """
    device = first_tensor(batch).device.type
    if device != "cpu":
        raise ConfigError("other runtimes are compared on the CPU", expected="inputs on the CPU", found=device)


def rival_rows(
    model: nn.Module,
    batch: Any,
    runtimes: Sequence[Runtime],
    calibration: Iterable[Any] | None,
    dense: bool,
    progress: bool = False,
) -> list[Entry]:
    """Return one row for a model in every runtime and precision, with its build or the reason why there is none.

    Args:
        model: the dense model, or a transformed graph.
        batch: one batch, as a loader yields it.
        runtimes: the runtimes, which are installed.
        calibration: batches from which the ranges of int8 are taken.
        dense: True for the dense model.
        progress: show a progress bar (on a terminal): quantisation takes a while.
    """
    args, kwargs = in_fp32(call_form(model, batch))
    whole, label = fp32_copy(model), "dense" if dense else graph_label(model)
    preposition = "" if dense else "in "
    audited = precision_of(batch)
    rows = [
        Row(
            titled(f"{label} {preposition}{runtime.title}", precision),
            runtime=runtime.title,
            precision=precision,
            dense=dense,
            baseline=dense and precision == audited,
        )
        for runtime in runtimes
        for precision in runtime.precisions()
    ]
    try:
        with exported(whole, kwargs or args) as path, torch.no_grad():
            expected = numbers_of(whole(*args, **kwargs))
            data = [call_form(model, part) for part in calibration or ()]
            bar = tqdm(rows, desc="convert", unit="build", disable=None if progress else True)
            by_title = {runtime.title: runtime for runtime in runtimes}
            return [_entry(row, by_title[row.runtime], model, path, (args, kwargs), data, expected) for row in bar]
    except Exception as error:
        for row in rows:
            row.reason = _reason(error)
        return [(row, None) for row in rows]


def _entry(
    row: Row,
    runtime: Runtime,
    model: nn.Module,
    path: Path,
    call: Arguments,
    calibration: Sequence[Arguments],
    expected: Tensor,
) -> Entry:
    assert row.precision is not None
    try:
        data = ((in_fp32(args), in_fp32(kwargs)) for args, kwargs in calibration)
        build = runtime.load(path, row.precision, torch.get_num_threads(), data)
        difference = median_difference(numbers_of(build(*call[0], **call[1])), expected)
    except Exception as error:
        row.reason = _reason(error)
        return row, None
    if not difference <= TOLERANCE[row.precision]:
        row.reason = f"its outputs are wrong: they differ by {difference:.1e} from those of the same graph in torch"
        return row, None
    return row, InRuntime(model, build)


def median_difference(found: Tensor, expected: Tensor) -> float:
    """Return the relative RMS difference of a sample's outputs, median over the samples; of one axis, of all numbers.

    Raises:
        InputError: the shapes differ.

    Example:
        >>> median_difference(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        0.0
    """
    if found.shape != expected.shape:
        raise InputError(
            "outputs have a different shape from the model's", expected=tuple(expected.shape), found=tuple(found.shape)
        )
    rows = (len(found), -1) if found.dim() > 1 else (1, -1)
    found, expected = found.double().reshape(rows), expected.double().reshape(rows)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)).median())


def graph_label(gm: nn.Module) -> str:
    """Return a short name of a transformed graph, such as ``8:16, r = 8``."""
    if not isinstance(gm, IRModule):
        return "transformed"
    patterns = sorted({layer.pattern for layer in gm.plan.layers.values()} - {"dense"})
    words = patterns if len(patterns) < 2 else ["mixed patterns"]
    if any(node.target is ops.token_merge for node in gm.graph.nodes):
        r = gm.plan.config.get("tome_r")
        words = [*words, f"r = {r}" if isinstance(r, int) else "merged"]
    return ", ".join(words) or "transformed"


def _reason(error: Exception) -> str:
    name = "" if type(error).__module__.startswith("mpcompile") else f"{type(error).__name__}: "
    return f"{name}{first_line(error):.300}"
