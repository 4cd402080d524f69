"""Audit: what a compiled model really does, beside the dense model it came from.

Accuracy with an interval and paired with the dense model, MACs counted from tensors, bytes of the weights as they are
stored, and latency against the best dense build of the same dtype, all builds interleaved in one run.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest
from tabulate import tabulate
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mpcompile.backend import CompiledGraph, compiled_graphs
from mpcompile.calibration import as_batches
from mpcompile.errors import InputError
from mpcompile.graph import IRModule, propagate, training_flags
from mpcompile.macs import count
from mpcompile.plan import Plan

DENSE_EAGER, DENSE_COMPILED, COMPILED = "dense eager", "dense compiled", "compiled sparse"


@dataclass
class Row:
    """One build of the model.

    Attributes:
        correct, samples: top-1 hits among the labelled samples, or None without labels.
        interval: 95 % Wilson interval of the top-1 share.
        agree: share of samples on which the arg max is the dense model's.
        lost, won: samples that only the dense model, or only this build, gets right.
        difference: relative RMS difference of the outputs from the dense model's.
        macs, paper_macs: per sample, executed and by the paper's convention.
        weight_bytes: parameters as this build stores them.
        latency_ms, quartiles_ms: median and quartiles of one batch.
        speedup: median of the best dense build / median of this one.
    """

    name: str
    correct: int | None = None
    samples: int = 0
    interval: tuple[float, float] | None = None
    agree: float | None = None
    lost: int | None = None
    won: int | None = None
    difference: float | None = None
    macs: int | None = None
    paper_macs: int | None = None
    weight_bytes: int = 0
    latency_ms: float | None = None
    quartiles_ms: tuple[float, float] | None = None
    speedup: float | None = None

    @property
    def top1(self) -> float | None:
        """Share of the labelled samples that are right."""
        return None if self.correct is None or not self.samples else self.correct / self.samples


@dataclass
class Report:
    """What :func:`audit` found. Prints as a table.

    Attributes:
        fell_back: dynamo no longer runs the compiled graph but the model's own eager code.
    """

    rows: list[Row]
    environment: dict[str, Any]
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)
    fell_back: bool = False

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**asdict(row), "top1": row.top1} for row in self.rows]
        plan = self.plan.to_dict() if self.plan is not None else None
        return {
            "rows": rows,
            "environment": self.environment,
            "notes": self.notes,
            "fell_back": self.fell_back,
            "plan": plan,
        }

    def to_json(self, indent: int | None = None) -> str:
        """The report and its plan as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> str:
        """One row a build."""
        labelled = any(row.correct is not None for row in self.rows)
        dense = self.rows[0]
        lines = []
        for row in self.rows:
            line = [row.name]
            if labelled:
                low, high = row.interval or (0, 0)
                line.append("" if row.top1 is None else f"{row.top1:.2%} [{low:.1%}, {high:.1%}]")
            paired = f" (-{row.lost} +{row.won})" if row.lost is not None and row is not dense else ""
            line.append("" if row.agree is None else f"{row.agree:.2%}{paired}")
            line.append(f"{row.difference:.1e}" if row.difference is not None and row is not dense else "")
            share = f" (-{1 - row.macs / dense.macs:.2%})" if row.macs and dense.macs and row.macs != dense.macs else ""
            line.append(f"{row.macs / 1e6:,.2f}{share}" if row.macs else "")
            line.append(f"{row.weight_bytes / 2**20:,.3f}")
            low, high = row.quartiles_ms or (0, 0)
            line.append("" if row.latency_ms is None else f"{row.latency_ms:.2f} [{low:.2f}, {high:.2f}]")
            line.append("" if row.speedup is None else f"{row.speedup:.2f}x")
            lines.append(line)
        head = ["build", *(["top-1 [95 %]"] if labelled else []), "agree (lost, won)", "rel. diff"]
        head += ["MMAC executed", "weights MiB", "latency ms [quartiles]", "vs best dense"]
        return tabulate(lines, headers=head, disable_numparse=True, colalign=("left",) + ("right",) * (len(head) - 1))

    def __str__(self) -> str:
        env = ", ".join(f"{k} {v}" for k, v in self.environment.items())
        return "\n".join([self.table(), "", env, *(f"note: {n}" for n in self.notes)])


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


def _labels(batches: list[Any], labels: Any) -> Tensor | None:
    """Labels given, or the second items of (input, label) batches, as one tensor; None where there are none."""
    if labels is None:
        pairs = all(isinstance(b, (tuple, list)) and len(b) > 1 and isinstance(b[1], Tensor) for b in batches)
        if not pairs or any(b[1].is_floating_point() for b in batches):
            return None
        labels = [b[1] for b in batches]
    tensor = labels if isinstance(labels, Tensor) else torch.cat([torch.as_tensor(part).reshape(-1) for part in labels])
    samples = sum(len(_first_tensor(b)) for b in batches)
    if tensor.numel() != samples:
        raise InputError("labels don't fit the inputs", expected=f"{samples} labels", found=tensor.numel())
    return tensor.reshape(-1)


def _time(builds: Mapping[str, Callable[..., Any]], batch: Any, rounds: int, progress: bool) -> dict[str, list[float]]:
    """Milliseconds a call, every round timing every build once, in an order that rotates."""
    times: dict[str, list[float]] = {name: [] for name in builds}
    names = list(builds)
    cuda = _first_tensor(batch).is_cuda
    for index in tqdm(range(rounds), desc="time", unit="round", disable=None if progress else True):
        for name in itertools.islice(itertools.cycle(names), index % len(names), index % len(names) + len(names)):
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
        # With gradients on, for the counter's module tracker: see mpcompile.graph.propagate.
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
            fake = (
                {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()}
                if isinstance(batch, Mapping)
                else mode.from_tensor(_first_tensor(batch))
            )
            with FlopCounterMode(display=False) as counter:
                _run(model, fake)
    except Exception:
        return None
    return counter.get_total_flops() // 2 // _first_tensor(batch).shape[0]


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
        row.macs = row.paper_macs = _dense_macs(module, batch)
    if row.name != COMPILED or module is build:
        return
    if report.fell_back:
        row.macs = row.paper_macs = _dense_macs(module, batch)
    elif graphs:
        row.weight_bytes = _lowered_bytes(graphs, module)
        if not isinstance(module, IRModule):
            row.macs = sum(g.plan.macs.executed for g in graphs)
            row.paper_macs = sum(g.plan.macs.paper for g in graphs)


def _score(row: Row, outputs: Tensor, reference: Tensor, labels: Tensor | None) -> None:
    """Accuracy and agreement with the dense model's outputs."""
    if outputs.shape != reference.shape:
        raise InputError(
            f"{row.name} returns another shape than the model",
            expected=tuple(reference.shape),
            found=tuple(outputs.shape),
        )
    row.samples = len(outputs)
    row.difference = float((outputs - reference).norm() / reference.norm().clamp(min=1e-30))
    if outputs.dim() != 2:
        return
    mine, dense = outputs.argmax(-1), reference.argmax(-1)
    row.agree = float((mine == dense).double().mean())
    if labels is not None:
        right, was = mine == labels, dense == labels
        row.correct, row.lost, row.won = int(right.sum()), int((was & ~right).sum()), int((right & ~was).sum())
        interval = binomtest(row.correct, row.samples).proportion_ci(0.95, "wilson")
        row.interval = (float(interval.low), float(interval.high))


def audit(
    model: nn.Module,
    compiled: Callable[..., Any],
    inputs: Any,
    labels: Any = None,
    *,
    others: Mapping[str, Callable[..., Any]] | None = None,
    dense_compiled: Callable[..., Any] | None = None,
    rounds: int = 20,
    progress: bool = True,
) -> Report:
    """Measure a compiled model against the dense one.

    Every build runs in eval mode under ``torch.no_grad()``: on all inputs once, for accuracy and agreement, then on
    the first batch ``rounds`` times, in turn, for latency.

    Args:
        model: the dense model.
        compiled: what is to be audited, usually ``torch.compile(gm, backend="mpsparse")``.
        inputs: one batch (a tensor or dict), or an iterable of batches; (input, label) tuples bring labels along.
        labels: class indices of all inputs, or None for no accuracy.
        others: further builds to show between the dense ones and ``compiled``, by name.
        dense_compiled: the dense model compiled; None compiles it with ``torch.compile``.
        rounds: timings of each build; 0 measures no latency.
        progress: show progress bars (on a terminal).

    Returns:
        A :class:`Report`. If dynamo has passed its recompile limit and runs the eager model, ``fell_back`` is set, a
        note says so, and the row's MACs are those of the code that ran.

    Raises:
        InputError: no inputs, labels that don't fit, or builds whose outputs differ in shape.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> report = audit(model, model, torch.randn(4, 16), rounds=0, dense_compiled=model)
        >>> report["compiled sparse"].agree
        1.0
    """
    batches = list(as_batches(inputs))
    if not batches:
        raise InputError("there are no inputs", expected="at least one batch", found="none")
    known = _labels(batches, labels)
    builds: dict[str, Callable[..., Any]] = {DENSE_EAGER: model}
    builds[DENSE_COMPILED] = torch.compile(model) if dense_compiled is None else dense_compiled
    builds.update(others or {})
    builds[COMPILED] = compiled
    report = Report([Row(name) for name in builds], environment(batches[0]))
    modules = nn.ModuleList(
        {id(m): m for m in (getattr(b, "_orig_mod", b) for b in builds.values()) if isinstance(m, nn.Module)}.values()
    )
    with training_flags(modules, False), torch.no_grad():
        reference: Tensor | None = None
        graphs: list[CompiledGraph] = []
        for row in tqdm(report.rows, desc="compile and compare", unit="build", disable=None if progress else True):
            before = {g: g.calls for g in compiled_graphs()}
            outputs = torch.cat([_run(builds[row.name], batch).float() for batch in batches])
            reference = outputs if reference is None else reference
            _score(row, outputs, reference, None if known is None else known.to(outputs.device))
            if row.name == COMPILED:
                graphs = [g for g in compiled_graphs() if g.calls > before.get(g, 0)]
                report.fell_back = not graphs and hasattr(compiled, "_orig_mod")
        for row in report.rows:
            _describe(row, builds[row.name], batches[0], graphs, report)
        if rounds:
            times = _time(builds, batches[0], rounds, progress)
            best = min(statistics.median(times[name]) for name in (DENSE_EAGER, DENSE_COMPILED))
            for row in report.rows:
                row.latency_ms = statistics.median(times[row.name])
                low, _, high = statistics.quantiles(times[row.name], n=4) if rounds > 1 else (row.latency_ms,) * 3
                row.quartiles_ms, row.speedup = (low, high), best / row.latency_ms
    _remarks(report, compiled, graphs, known)
    return report


def _remarks(report: Report, compiled: Any, graphs: list[CompiledGraph], labels: Tensor | None) -> None:
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
    row = report.rows[-1]
    if row.speedup is not None and row.speedup < 1:
        engines = {layer.notes.get("lower", {}).get("engine") for g in graphs for layer in g.plan.layers.values()}
        why = ": the reference engine spreads packed weights out at every call" if "reference" in engines else ""
        report.notes.append(f"slower than the best dense build ({row.speedup:.2f}x){why}")
    if labels is None:
        report.notes.append("no labels: accuracy was not measured")
