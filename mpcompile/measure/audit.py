"""Audit: what a compiled model really does, beside the dense model it came from.

Accuracy with an interval and paired with the dense model, MACs counted from tensors, bytes of the weights as they are
stored, and latency against the best dense build of the same dtype, all builds interleaved in one run. On a CPU with
bf16 dot products an fp32 audit also shows the dense model in bf16, which is easily the fastest of all.
"""

from __future__ import annotations

import copy
import itertools
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from tqdm import tqdm

from mpcompile.backend import CompiledGraph, compiled_graphs
from mpcompile.calibration.data import as_batches
from mpcompile.data.batches import read
from mpcompile.data.labels import Labels, check_range
from mpcompile.errors import InputError
from mpcompile.ir.macs import count, flop_counter
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.shapes import propagate
from mpcompile.measure.report import BARS, COMPILED, DENSE_BF16, DENSE_COMPILED, DENSE_EAGER, DENSE_FROZEN, Report, Row


def environment(batch: Any) -> dict[str, Any]:
    """What a figure depends on: processor, threads, versions, dtype and batch."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    tensor = _first_tensor(batch)
    device = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else cpu
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "batch": tensor.shape[0],
    }


def _first_tensor(batch: Any) -> Tensor:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise InputError("inputs hold no tensor", expected="batches of tensors", found=type(batch).__name__)


def _run(build: Callable[..., Any], batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        result = build(**batch)
    else:
        result = build(batch[0] if isinstance(batch, (tuple, list)) else batch)
    result = result[0] if isinstance(result, (tuple, list)) else result
    if not isinstance(result, Tensor):
        raise InputError("the model returns no tensor", expected="logits (batch, classes)", found=type(result).__name__)
    return result


def _time(builds: Mapping[str, Callable[..., Any]], batch: Any, rounds: int, progress: bool) -> dict[str, list[float]]:
    """Milliseconds a call, every round timing every build once, in an order of its own, drawn anew."""
    times: dict[str, list[float]] = {name: [] for name in builds}
    names, order = list(builds), random.Random(0)
    cuda = _first_tensor(batch).is_cuda
    for _ in tqdm(range(rounds), desc="time", unit="round", disable=None if progress else True):
        for name in order.sample(names, len(names)):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            _run(builds[name], batch)
            if cuda:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _dense_macs(model: nn.Module, batch: Any) -> int | None:
    """MACs per sample of a module as it is, or None where it can't run on fake tensors."""
    try:
        # With gradients on, for the counter's module tracker: see mpcompile.ir.graph.propagate.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
            fake = (
                {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
                if isinstance(batch, Mapping)
                else mode.from_tensor(_first_tensor(batch))
            )
            with flop_counter() as counter:
                _run(model, fake)
    except Exception:
        return None
    return counter.get_total_flops() // 2 // _first_tensor(batch).shape[0]


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 natively, so that dense bf16 is faster than dense fp32."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return False
    words = set(info.read_text(errors="replace").split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


class _Frozen:
    """The dense model compiled with Inductor's freezing."""

    def __init__(self, model: nn.Module) -> None:
        self._orig_mod = model  # as torch.compile has it
        self.run = torch.compile(model, options={"freezing": True})
        self.seen: set[tuple[Any, ...]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = tuple(v.shape for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        if key in self.seen:
            return self.run(*args, **kwargs)
        with torch._inductor.config.patch(freezing=True):  # dynamo reads it there when it compiles
            found = self.run(*args, **kwargs)
        self.seen.add(key)
        return found


class _InBf16:
    """A bf16 build of the dense model that takes what the fp32 one takes."""

    def __init__(self, model: nn.Module) -> None:
        self.module = copy.deepcopy(model).bfloat16().eval()
        self._orig_mod = self.module  # as torch.compile has it, for MACs and bytes
        self.run = torch.compile(self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*map(self.cast, args), **self.cast(kwargs))

    def cast(self, value: Any) -> Any:
        """A tensor, or the tensors of a dict or sequence, in bf16 where they hold fractions."""
        if isinstance(value, Mapping):
            return {key: self.cast(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return [self.cast(item) for item in value]
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def _bf16_build(model: nn.Module, batch: Any, wanted: bool | Callable[..., Any] | None, rounds: int) -> Any:
    """The build for the bf16 row, or None for no such row."""
    if wanted is None:
        tensor = _first_tensor(batch)
        wanted = rounds > 0 and tensor.device.type == "cpu" and tensor.dtype is torch.float32 and has_bf16()
    return _InBf16(model) if wanted is True else wanted or None


def _predicted(graphs: list[CompiledGraph]) -> tuple[float, float] | None:
    """(saved, dense) milliseconds of the lowered layers as lowering timed them, or None where it didn't."""
    saved = total = 0.0
    for graph in graphs:
        for layer in graph.plan.layers.values():
            entry = layer.notes.get("lower", {})
            us, dense = entry.get("us"), entry.get("dense_us")
            if isinstance(dense, (int, float)) and isinstance(us, (int, float)):
                saved, total = saved + (dense - us) / 1e3, total + dense / 1e3
    return (saved, total) if total else None


def _parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _masked_macs(gm: IRModule, batch: Any) -> tuple[int, int]:
    inputs = list(batch.values()) if isinstance(batch, Mapping) else [_first_tensor(batch)]
    propagate(gm, inputs)
    macs, _ = count(gm)
    return macs.executed, macs.paper


def _lowered_bytes(graphs: list[CompiledGraph], model: nn.Module) -> int:
    """Parameters as the last graph stores them: packed where it is lowered, the module's own elsewhere."""
    slots = [slot for g in graphs if g.lowered for slot in g.slots]
    saved = {slot.name: slot.dense_nbytes - slot.nbytes for slot in slots}
    return _parameter_bytes(model) - sum(saved.values())


def _describe(row: Row, build: Any, batch: Any, graphs: list[CompiledGraph], report: Report) -> None:
    """MACs and bytes of a build."""
    module = getattr(build, "_orig_mod", build)
    if not isinstance(module, nn.Module):
        return
    row.weight_bytes = _parameter_bytes(module)
    if isinstance(module, IRModule):
        row.macs, row.paper_macs = _masked_macs(module, batch)
    else:
        cast = isinstance(build, _InBf16)
        row.macs = row.paper_macs = _dense_macs(build.module if cast else module, build.cast(batch) if cast else batch)
    if row.name != COMPILED or module is build:
        return
    if report.fell_back:
        row.macs = row.paper_macs = _dense_macs(module, batch)
    elif graphs:
        row.weight_bytes = _lowered_bytes(graphs, module)
        if not isinstance(module, IRModule):
            row.macs = sum(g.plan.macs.executed for g in graphs)
            row.paper_macs = sum(g.plan.macs.paper for g in graphs)


class _Comparison:
    """Sums over the samples of what one build makes of them, beside the dense model; no sample is kept."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.agreeing: int | None = None
        self.error = self.energy = 0.0

    def add(self, outputs: Tensor, reference: Tensor, labels: Tensor | None) -> None:
        """One batch.

        Raises:
            InputError: the builds return different shapes, or a label is no class of the model.
        """
        row = self.row
        if outputs.shape != reference.shape:
            raise InputError(
                f"{row.name} returns another shape than the model",
                expected=tuple(reference.shape),
                found=tuple(outputs.shape),
            )
        row.samples += len(outputs)
        self.error += float((outputs - reference).double().square().sum())
        self.energy += float(reference.double().square().sum())
        if outputs.dim() != 2:
            return
        mine, dense = outputs.argmax(-1), reference.argmax(-1)
        self.agreeing = (self.agreeing or 0) + int((mine == dense).sum())
        if labels is not None:
            check_range(labels, outputs.shape[1])
            labels = labels.to(outputs.device)
            right, was = mine == labels, dense == labels
            row.correct = (row.correct or 0) + int(right.sum())
            row.lost = (row.lost or 0) + int((was & ~right).sum())
            row.won = (row.won or 0) + int((right & ~was).sum())

    def end(self) -> None:
        """The row's shares, from the sums."""
        row = self.row
        row.difference = (self.error / max(self.energy, 1e-60)) ** 0.5
        row.agree = None if self.agreeing is None else self.agreeing / row.samples
        if row.correct is not None:
            interval = binomtest(row.correct, row.samples).proportion_ci(0.95, "wilson")
            row.interval = (float(interval.low), float(interval.high))


def _samples(batch: Any) -> int:
    """Samples of a batch.

    Raises:
        InputError: its first tensor has no axis of samples.
    """
    tensor = _first_tensor(batch)
    if not tensor.dim():
        raise InputError("inputs have no axis of samples", expected="tensors (batch, ...)", found="a single number")
    return len(tensor)


def _filled(inputs: Any) -> Iterator[Any]:
    """The batches that hold samples, read one at a time."""
    return (batch for batch in read(as_batches(inputs, "what is to be audited"), "the inputs") if _samples(batch))


def _compare(
    batches: Iterable[Any], labels: Labels, builds: Mapping[str, Callable[..., Any]], rows: list[Row]
) -> list[CompiledGraph]:
    """Every build on every batch, for accuracy and agreement; returns the graphs that ran in the audited build."""
    sums = [_Comparison(row) for row in rows]
    graphs: dict[CompiledGraph, None] = {}
    for batch in batches:
        known = labels.of(batch, _samples(batch))
        reference: Tensor | None = None
        for total in sums:
            before = {g: g.calls for g in compiled_graphs()}
            outputs = _run(builds[total.row.name], batch).float()
            reference = outputs if reference is None else reference
            total.add(outputs, reference, known)
            if total.row.name == COMPILED:
                graphs |= dict.fromkeys(g for g in compiled_graphs() if g.calls > before.get(g, 0))
    labels.end()
    for total in sums:
        total.end()
    return list(graphs)


def audit(
    model: nn.Module,
    compiled: Callable[..., Any],
    inputs: Any,
    labels: Any = None,
    *,
    others: Mapping[str, Callable[..., Any]] | None = None,
    dense_compiled: Callable[..., Any] | None = None,
    dense_bf16: bool | Callable[..., Any] | None = None,
    rounds: int = 20,
    progress: bool = True,
) -> Report:
    """Measure a compiled model against the dense one.

    Every build runs in eval mode under ``torch.no_grad()``: on all inputs once, for accuracy and agreement, then on
    the first batch ``rounds`` times, in turn, for latency. Inputs are read once, and one batch is held at a time.

    Args:
        model: the dense model.
        compiled: what is to be audited, usually ``torch.compile(gm, backend="mpsparse")``.
        inputs: one batch (a tensor or dict), or an iterable of batches; (input, label) tuples bring labels along.
        labels: class numbers of all inputs, of any whole-number type, or in parts; None takes those in the batches,
            and where there are none measures no accuracy.
        others: further builds to show between the dense ones and ``compiled``, by name.
        dense_compiled: the dense model compiled; None compiles it with ``torch.compile`` and, on a CPU where latency is
            measured, once more with freezing.
        dense_bf16: show the dense model in bf16, compiled by ``torch.compile`` or as given here (called with the
            inputs as they are). None shows it where latency is measured, inputs are fp32 and the CPU has native bf16.
            It is no part of the bar that ``speedup`` is measured against.
        rounds: timings of each build; 0 measures no latency.
        progress: show progress bars (on a terminal).

    Returns:
        A :class:`Report`. If dynamo has passed its recompile limit and runs the eager model, ``fell_back`` is set, a
        note says so, and the row's MACs are those of the code that ran.

    Raises:
        InputError: no inputs, labels that don't fit or are no classes of the model, or builds whose outputs differ in
            shape.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> report = audit(model, model, torch.randn(4, 16), rounds=0, dense_compiled=model)
        >>> report["compiled sparse"].agree
        1.0
    """
    batches = _filled(inputs)
    first = next(batches, None)
    if first is None:
        raise InputError("there are no inputs", expected="at least one sample", found="none")
    known = Labels(labels)
    builds: dict[str, Callable[..., Any]] = {DENSE_EAGER: model}
    builds[DENSE_COMPILED] = torch.compile(model) if dense_compiled is None else dense_compiled
    if dense_compiled is None and rounds and _first_tensor(first).device.type == "cpu":
        builds[DENSE_FROZEN] = _Frozen(model)
    in_bf16 = _bf16_build(model, first, dense_bf16, rounds)
    if in_bf16 is not None:
        builds[DENSE_BF16] = in_bf16
    builds.update(others or {})
    builds[COMPILED] = compiled
    report = Report([Row(name) for name in builds], environment(first))
    modules = nn.ModuleList(
        {id(m): m for m in (getattr(b, "_orig_mod", b) for b in builds.values()) if isinstance(m, nn.Module)}.values()
    )
    with training_flags(modules, False), torch.no_grad():
        bar = tqdm(itertools.chain([first], batches), desc="compare", unit="batch", disable=None if progress else True)
        graphs = _compare(bar, known, builds, report.rows)
        report.fell_back = not graphs and hasattr(compiled, "_orig_mod")
        for row in report.rows:
            _describe(row, builds[row.name], first, graphs, report)
        if rounds:
            times = _time(builds, first, rounds, progress)
            best = min(statistics.median(times[name]) for name in BARS if name in times)
            for row in report.rows:
                row.latency_ms = statistics.median(times[row.name])
                low, _, high = statistics.quantiles(times[row.name], n=4) if rounds > 1 else (row.latency_ms,) * 3
                row.quartiles_ms, row.speedup = (low, high), best / row.latency_ms
    _remarks(report, compiled, graphs, bool(known.labelled))
    return report


def _remarks(report: Report, compiled: Any, graphs: list[CompiledGraph], labelled: bool) -> None:
    module = getattr(compiled, "_orig_mod", compiled)
    if isinstance(module, IRModule):
        report.plan = module.plan
    elif graphs:
        report.plan = max((g.plan for g in graphs), key=lambda plan: len(plan.layers))
    if report.fell_back:
        report.notes.append(
            "WARNING: no compiled graph ran: dynamo has passed its recompile limit and runs the model's eager code (or "
            "the function wasn't compiled by mpsparse). Raise torch._dynamo.config.recompile_limit, or compile with "
            "dynamic=True"
        )
    elif graphs and not any(g.lowered for g in graphs):
        report.notes.append("the graph keeps dense masked weights: no layer was lowered")
    odd = [row.name for row in report.rows if row.difference is not None and not math.isfinite(row.difference)]
    if odd:
        report.notes.append(f"WARNING: outputs are not finite on some inputs: {', '.join(odd)}")
    row = report.rows[-1]
    if row.speedup is not None and row.speedup < 1:
        engines = {layer.notes.get("lower", {}).get("engine") for g in graphs for layer in g.plan.layers.values()}
        why = ": the reference engine spreads packed weights out at every call" if "reference" in engines else ""
        report.notes.append(f"slower than the best dense build ({row.speedup:.2f}x){why}")
    _compare_prediction(report, graphs)
    _compare_bf16(report)
    if not labelled:
        report.notes.append("no labels: accuracy was not measured")
    elif row.correct is None:
        report.notes.append("accuracy was not measured: the model returns no logits (batch, classes)")


def _compare_prediction(report: Report, graphs: list[CompiledGraph]) -> None:
    """What the layers were timed to save, beside what the whole model saves."""
    predicted = _predicted(graphs)
    if predicted is None:
        return
    report.predicted_saving_ms, total = predicted
    row = report.rows[-1]
    if row.latency_ms is None or row.speedup is None:
        return
    saves = row.latency_ms * (row.speedup - 1)  # speedup = bar / latency
    timed = f"layers were timed to save {report.predicted_saving_ms:.2f} ms of {total:.2f} ms"
    if saves > 0:
        report.notes.append(f"{timed}; the whole model saves {saves:.2f} ms")
    elif report.predicted_saving_ms > 0:
        report.notes.append(
            f"WARNING: {timed}, but the whole model takes {-saves:.2f} ms more than the best dense build: compile it "
            'with engine="dense" instead'
        )


def _compare_bf16(report: Report) -> None:
    """Another dtype is no bar, but whoever wants speed should know."""
    row = report.rows[-1]
    other = next((r for r in report.rows if r.name == DENSE_BF16), None)
    if other is None or other.latency_ms is None or row.latency_ms is None or other.latency_ms >= row.latency_ms:
        return
    ratio = row.latency_ms / other.latency_ms
    report.notes.append(
        f"dense bf16 takes {other.latency_ms:.2f} ms, {ratio:.2f}x as fast as this fp32 build "
        f"(relative difference of outputs {other.difference:.1e}): run the model in bf16 and audit it there"
    )
