"""Notes of an audit: which code ran, and how to read the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpcompile.backend import CompiledGraph
from mpcompile.ir.module import IRModule
from mpcompile.measure.builds import module_of
from mpcompile.measure.report import COMPILED, DENSE_BF16, Report, Row


def add_remarks(report: Report, compiled: Any, graphs: Sequence[CompiledGraph], labelled: bool) -> None:
    """Set the plan and the predicted saving of a report, and append its notes.

    Args:
        report: rows are complete; the last one is the audited build.
        compiled: the audited build.
        graphs: compiled graphs that ran in it.
        labelled: True if the inputs had labels.
    """
    report.plan = _plan(compiled, graphs)
    _remark_on_graphs(report, graphs)
    odd = [row.name for row in report.rows if row.difference is not None and not math.isfinite(row.difference)]
    if odd:
        report.notes.append(f"WARNING: outputs are not finite on some inputs: {', '.join(odd)}")
    row = report.rows[-1]
    if row.speedup is not None and row.speedup < 1:
        engines = {layer.notes.get("lower", {}).get("engine") for g in graphs for layer in g.plan.layers.values()}
        why = (
            ": the reference engine unpacks the weights at every call"
            if any("reference" in str(name) for name in engines)
            else ""
        )
        report.notes.append(f"slower than the best dense build ({row.speedup:.2f}x){why}")
    _compare_prediction(report, graphs)
    _compare_precisions(report)
    _compare_runtimes(report)
    if not labelled:
        report.notes.append("no labels: accuracy was not measured")
    elif row.correct is None:
        report.notes.append("accuracy was not measured: the model returns no logits (batch, classes)")


def _plan(compiled: Any, graphs: Sequence[CompiledGraph]) -> Any:
    module = module_of(compiled)
    if isinstance(module, IRModule):
        return module.plan
    return max((g.plan for g in graphs), key=lambda plan: len(plan.layers)) if graphs else None


def _remark_on_graphs(report: Report, graphs: Sequence[CompiledGraph]) -> None:
    if report.fell_back:
        report.notes.append(
            "WARNING: no compiled graph ran: dynamo has passed its recompile limit and runs the model's eager code (or "
            "the function was not compiled by mpsparse). Raise torch._dynamo.config.recompile_limit, or compile with "
            "dynamic=True"
        )
    elif graphs and not any(g.lowered for g in graphs):
        report.notes.append("the graph keeps dense masked weights: no layer was lowered")


def predicted_saving(graphs: Sequence[CompiledGraph]) -> tuple[float, float] | None:
    """Return (saved, dense) milliseconds of the lowered layers, as lowering timed them, or None without timings."""
    saved = total = 0.0
    for graph in graphs:
        for layer in graph.plan.layers.values():
            entry = layer.notes.get("lower", {})
            us, dense = entry.get("us"), entry.get("dense_us")
            if isinstance(dense, (int, float)) and isinstance(us, (int, float)):
                saved, total = saved + (dense - us) / 1e3, total + dense / 1e3
    return (saved, total) if total else None


def _compare_prediction(report: Report, graphs: Sequence[CompiledGraph]) -> None:
    """Compare the saving that the layers' timings predict with that of the whole model."""
    predicted = predicted_saving(graphs)
    if predicted is None:
        return
    report.predicted_saving_ms, total = predicted
    row = report.rows[-1]
    if row.latency_ms is None or row.speedup is None:
        return
    saves = row.latency_ms * (row.speedup - 1)  # speedup = baseline / latency
    timed = f"by their timings, layers save {report.predicted_saving_ms:.2f} ms of {total:.2f} ms"
    if saves > 0:
        report.notes.append(f"{timed}; the whole model saves {saves:.2f} ms")
    elif report.predicted_saving_ms > 0:
        report.notes.append(
            f"WARNING: {timed}, but the whole model takes {-saves:.2f} ms more than the best dense build: compile it "
            'with engine="dense" instead'
        )


def _compare_precisions(report: Report) -> None:
    """Point out the fastest dense build of another precision that beats this one.

    It is not part of the baseline, but a user who wants speed should know of it.
    """
    row = report.rows[-1]
    if row.latency_ms is None:
        return
    others = [r for r in report.rows if r.dense and not r.baseline and (r.latency_ms or math.inf) < row.latency_ms]
    for other in sorted(others, key=lambda r: r.latency_ms or 0.0)[:1]:
        assert other.latency_ms is not None
        ratio = row.latency_ms / other.latency_ms
        advice = "run the model in bf16 and audit it there" if other.name == DENSE_BF16 else "it may suit you better"
        report.notes.append(
            f"{other.name} takes {other.latency_ms:.2f} ms, {ratio:.2f}x as fast as this {row.precision} build "
            f"({_kept(other)}): {advice}"
        )


def _kept(row: Row) -> str:
    """Return what a build keeps of the dense model's results."""
    if row.lost is not None and row.won is not None:
        return f"top-1 {100 * (row.won - row.lost) / row.samples:+.1f} points"
    return f"relative difference of outputs {row.difference:.1e}"


def _compare_runtimes(report: Report) -> None:
    """Say which dense build is the best, and where this build runs fastest, if other runtimes were compared."""
    report.notes += [f"{row.name} was not run: {row.reason}" for row in report.rows if row.reason is not None]
    if all(row.runtime == "torch" for row in report.rows):
        return
    best, own = report.best_dense, report.rows[-1]
    if best is None or own.latency_ms is None:
        return
    report.notes.append(f"the best dense build is {best.name}: {best.latency_ms:.2f} ms")
    ours = [row for row in report.rows if not row.dense and row.precision == own.precision and row.latency_ms]
    ours = sorted((row for row in ours if row is own or row.runtime != "torch"), key=lambda row: row.latency_ms or 0.0)
    places = [f"{_place(row)} {row.latency_ms:.2f} ms" for row in ours]
    if len(places) > 1:
        report.notes.append(f"this build runs fastest in {places[0]}; {', '.join(places[1:])}")


def _place(row: Row) -> str:
    return "torch.compile" if row.name == COMPILED else row.runtime
