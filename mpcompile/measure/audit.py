"""Audit: measure a compiled model against the dense model it came from.

The report has accuracy with an interval and paired with the dense model, MACs counted from tensors, bytes of the
weights as stored, and latency against the best dense build of the same dtype, with all builds interleaved in one run.
On a CPU with bf16 dot products, an fp32 audit also shows the dense model in bf16, which may well be the fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile._moved import renamed
from mpcompile.backend import CompiledGraph, compiled_graphs
from mpcompile.calibration.data import as_batches
from mpcompile.data.batches import read
from mpcompile.data.labels import Labels
from mpcompile.data.outputs import numbers_of
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import training_flags
from mpcompile.measure.accuracy import Comparison
from mpcompile.measure.builds import Frozen, bf16_build, module_of, run
from mpcompile.measure.cost import fill_in_cost
from mpcompile.measure.environment import conditions, first_tensor
from mpcompile.measure.latency import fill_in_latency, time_builds
from mpcompile.measure.remarks import add_remarks
from mpcompile.measure.report import COMPILED, DENSE_BF16, DENSE_COMPILED, DENSE_EAGER, DENSE_FROZEN, Report, Row
from mpcompile.measure.rivals import PAUSE, Entry, check_device, precision_of, rival_rows
from mpcompile.runtimes.base import Runtime
from mpcompile.runtimes.catalogue import named

Build = Callable[..., Any]
__getattr__ = renamed(__name__, {"environment": "measure.environment.conditions"})


def audit(
    model: nn.Module,
    compiled: Build,
    inputs: Any,
    labels: Any = None,
    *,
    others: Mapping[str, Build] | None = None,
    dense_compiled: Build | None = None,
    dense_bf16: bool | Build | None = None,
    against: str | Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    rounds: int = 20,
    progress: bool = True,
) -> Report:
    """Measure a compiled model against the dense one.

    Every build runs in eval mode under ``torch.no_grad()``: on all inputs once, for accuracy and agreement, then on
    the first batch ``rounds`` times, in turn, for latency. Inputs are read once, and one batch is held at a time.

    Args:
        model: the dense model.
        compiled: the build to audit, usually ``torch.compile(gm, backend="mpsparse")``.
        inputs: one batch (a tensor or dict), or an iterable of batches; (input, label) tuples bring their labels, and
            so do entries ``labels``, ``label``, ``targets`` or ``target`` of a dict. Entries that the model does not
            take are left out.
        labels: class numbers of all inputs, of any integer type, at once or in parts. None uses the labels in the
            batches; without any, accuracy is not measured.
        others: further builds to show between the dense ones and ``compiled``, by name.
        dense_compiled: the dense model compiled. None compiles it with ``torch.compile`` and, on a CPU when latency is
            measured, once more with freezing.
        dense_bf16: show the dense model in bf16: True compiles it with ``torch.compile``, a callable is used as it is
            (called with the unchanged inputs), False shows no such row. None shows it when latency is measured, inputs
            are fp32 and the CPU has native bf16. ``speedup`` is not measured against it.
        against: other runtimes, of ``"onnxruntime"`` and ``"openvino"``. The dense model joins the comparison in each
            of them and in every precision that they have here, with as many threads as torch; so does the transformed
            graph itself, if ``compiled`` is one. The best of torch's and theirs at the audited precision is the
            baseline of ``speedup``. A row that cannot be measured has a ``reason``.
        calibration: batches from which these runtimes take the ranges of int8; without it, there is no int8.
        rounds: timings of each build; 0 measures no latency.
        progress: show progress bars (on a terminal).

    Returns:
        A :class:`Report`. If dynamo has passed its recompile limit and runs the eager model, ``fell_back`` is set, a
        note says so, and the row's MACs are those of the code that ran.

    Raises:
        ConfigError: a runtime is not installed (the message names the extra that it needs), is not known, or the inputs
            are not on the CPU.
        InputError: there are no inputs, labels do not match the inputs or the model's classes, or builds return
            outputs of different shapes.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> report = audit(model, model, torch.randn(4, 16), rounds=0, dense_compiled=model)
        >>> report["compiled sparse"].agree
        1.0
    """
    runtimes = named(against)
    batches = _non_empty(inputs)
    first = next(batches, None)
    if first is None:
        raise InputError("there are no inputs", expected="at least one sample", found="none")
    known = Labels(labels)
    builds = _dense_builds(model, first, dense_compiled, dense_bf16, rounds)
    rows = [_dense_row(name, first) for name in builds]
    builds |= {**(others or {}), COMPILED: compiled}
    rivals, ours = _in_runtimes(model, compiled, first, runtimes, calibration, progress)
    builds |= {row.name: build for row, build in (*rivals, *ours) if build is not None}
    rows += [row for row, _ in rivals] + [Row(name) for name in others or ()] + [row for row, _ in ours]
    report = Report([*rows, Row(COMPILED, precision=precision_of(first))], conditions(first))
    report.environment |= {runtime.name: runtime.version for runtime in runtimes}
    measured = [row for row in report.rows if row.reason is None]
    modules = {id(m): m for m in map(module_of, builds.values()) if isinstance(m, nn.Module)}
    with training_flags(nn.ModuleList(modules.values()), False), torch.no_grad():
        bar = tqdm(itertools.chain([first], batches), desc="compare", unit="batch", disable=None if progress else True)
        graphs = _compare(bar, known, builds, measured)
        report.fell_back = not graphs and _compiles(compiled)
        for row in measured:
            fill_in_cost(row, builds[row.name], first, graphs, report.fell_back)
        if rounds:
            fill_in_latency(measured, time_builds(builds, first, rounds, progress, PAUSE if runtimes else 0.0))
    add_remarks(report, compiled, graphs, bool(known.labelled))
    return report


def _compiles(build: Build) -> bool:
    """Return True if a build is compiled by our backend, so that graphs that it compiled must have run."""
    backend = getattr(build, "backend", "mpsparse")  # a runner's, which may be that of another runtime
    return hasattr(build, "_orig_mod") and backend == "mpsparse"


def _dense_builds(
    model: nn.Module, batch: Any, compiled: Build | None, bf16: bool | Build | None, rounds: int
) -> dict[str, Build]:
    builds: dict[str, Build] = {DENSE_EAGER: model}
    builds[DENSE_COMPILED] = torch.compile(model) if compiled is None else compiled
    if compiled is None and rounds and first_tensor(batch).device.type == "cpu":
        builds[DENSE_FROZEN] = Frozen(model)
    in_bf16 = bf16_build(model, batch, bf16, rounds)
    if in_bf16 is not None:
        builds[DENSE_BF16] = in_bf16
    return builds


def _dense_row(name: str, batch: Any) -> Row:
    """Return the row of a dense build of torch."""
    if name == DENSE_BF16:
        return Row(name, precision="bf16", dense=True)
    return Row(name, precision=precision_of(batch), dense=True, baseline=True)


def _in_runtimes(
    model: nn.Module,
    compiled: Build,
    batch: Any,
    runtimes: Sequence[Runtime],
    calibration: Iterable[Any] | None,
    progress: bool,
) -> tuple[list[Entry], list[Entry]]:
    """Return the rows of other runtimes: for the dense model, and for the transformed graph if there is one."""
    if not runtimes:
        return [], []
    check_device(batch)
    data = None if calibration is None else list(calibration)
    graph = module_of(compiled)
    rivals = rival_rows(model, batch, runtimes, data, True, progress)
    return rivals, rival_rows(graph, batch, runtimes, data, False, progress) if isinstance(graph, IRModule) else []


def _sample_count(batch: Any) -> int:
    """Return the number of samples in a batch.

    Raises:
        InputError: its first tensor has no sample axis.
    """
    tensor = first_tensor(batch)
    if not tensor.dim():
        raise InputError("inputs have no axis of samples", expected="tensors (batch, ...)", found="a single number")
    return len(tensor)


def _non_empty(inputs: Any) -> Iterator[Any]:
    """Yield the batches that hold samples, read one at a time."""
    batches = read(as_batches(inputs, "the data to audit"), "the inputs")
    return (batch for batch in batches if _sample_count(batch))


def _compare(
    batches: Iterable[Any], labels: Labels, builds: Mapping[str, Build], rows: Sequence[Row]
) -> list[CompiledGraph]:
    """Run every build on every batch, for accuracy and agreement; return the graphs that ran in the audited build."""
    comparisons = [Comparison(row) for row in rows]
    graphs: dict[CompiledGraph, None] = {}
    for batch in batches:
        samples = _sample_count(batch)
        known = labels.of(batch, samples)
        reference: Tensor | None = None
        for comparison in comparisons:
            name = comparison.row.name
            calls = {g: g.calls for g in compiled_graphs()}
            outputs = numbers_of(run(builds[name], batch)).float()
            reference = outputs if reference is None else reference
            comparison.add(outputs, reference, known, samples)
            if name == COMPILED:
                graphs |= dict.fromkeys(g for g in compiled_graphs() if g.calls > calls.get(g, 0))
    labels.end()
    for comparison in comparisons:
        comparison.finish()
    return list(graphs)
