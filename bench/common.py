"""Shared by the benchmarks: interleaved timing, the environment of a run, tables, JSON and bar charts.

All builds of a comparison are timed in one run, in rounds: every round calls each build once, in random order. So a
change in the machine's load affects all of them, and no build always finds the caches as one other build left them.
Figures are medians, with quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from mpcompile.backend import FREEZING, NATIVE_CALLS
from mpcompile.io.writing import write_atomically
from mpcompile.kernels.cpu import build
from mpcompile.kernels.machine import cpu_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative RMS


def interleave(
    builds: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    progress: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every build in interleaved rounds: build -> seconds of each of its calls.

    Args:
        rounds: timed calls of each build; the order is drawn for each round, with the same seed in every run.
        warmup: untimed rounds before those.
        progress: name under which progress is shown on stderr, if that is a terminal.
        clock: ``time.thread_time`` counts only this thread's processor time, for one thread on a busy machine.
    """
    names = list(builds)
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        if progress and sys.stderr.isatty():
            end = "\r" if index + 1 < rounds else "\033[K\r"
            print(f"\033[K{progress}: round {max(0, index + 1)}/{rounds}", end=end, file=sys.stderr, flush=True)
        for name in order.sample(names, len(names)):
            start = clock()
            builds[name]()
            spent = clock() - start
            if index >= 0:
                seconds[name].append(spent)
    return seconds


def quartiles(seconds: Sequence[float], unit: float = 1e6) -> dict[str, float]:
    """``median``, ``q1`` and ``q3``, times ``unit`` (microseconds by default)."""
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": median * unit, "q1": q1 * unit, "q3": q3 * unit}


def environment(threads: int | None = None) -> dict[str, Any]:
    """The conditions of a run: processor, instruction set of the kernels, torch, threads, date, load."""
    try:
        isa = build.library().isa
    except build.Unavailable as error:
        isa = f"none: {error}"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": isa,
        "torch": torch.__version__,
        "threads": torch.get_num_threads() if threads is None else threads,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load average": [round(load, 2) for load in os.getloadavg()],
    }


def describe(env: Mapping[str, Any]) -> str:
    """The environment on one line."""
    return ", ".join(f"{key} {value}" for key, value in env.items())


def ratio_text(ratio: float) -> str:
    """``1.23x``; below one it adds "slower".

    Example:
        >>> ratio_text(0.8)
        '0.80x slower'
    """
    return f"{ratio:.2f}x" + (" slower" if ratio < 1 else "")


def relative_rms(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference divided by the RMS of the expected values, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


@contextlib.contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Run torch on this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compiled_dense(
    module: torch.nn.Module, x: Tensor, *, freezing: bool = False, **options: Any
) -> tuple[Callable[[Tensor], Tensor], float]:
    """Compile a dense module for ``x`` with ``torch.compile``, immediately; call it under ``torch.no_grad()``.

    ``freezing`` is set both in the options and around the first call: dynamo reads it from Inductor's configuration,
    and two builds with equal options would share one compiled graph. On CPUs such a build is called from C++, as our
    frozen graphs are.

    Returns:
        The build, and the compile time in seconds.
    """
    if freezing:
        options |= FREEZING | NATIVE_CALLS if x.device.type == "cpu" else FREEZING
    run = torch.compile(module, dynamic=False, options=options or None)
    start = time.perf_counter()
    with torch._inductor.config.patch(freezing=freezing):
        run(x)
    return run, time.perf_counter() - start


def load(name: str, folder: Path) -> Any:
    """The data that :func:`save` wrote, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def save(name: str, data: Any, folder: Path = RESULTS) -> Path:
    """Write JSON to ``folder/name.json``, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_atomically(path, json.dumps(data, indent=1) + "\n")
    return path


def table(rows: Sequence[Sequence[Any]], head: Sequence[str], left: int = 1) -> str:
    """A text table whose first ``left`` columns are left-aligned."""
    aligned = ("left",) * left + ("right",) * (len(head) - left)
    return tabulate(rows, headers=head, disable_numparse=True, colalign=aligned if rows else None)


@contextlib.contextmanager
def plotted(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, sharey: bool = False
) -> Iterator[tuple[Any, Any] | None]:
    """A figure and its axes (rows, columns) to draw on, saved to ``path`` afterwards; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'mpcompile[report]')")
        yield None
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained")
    try:
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        print(f"plot: {path}")
    finally:
        plt.close(figure)


def plot(
    name: str, panels: Mapping[str, Mapping[str, Mapping[str, float]]], title: str, folder: Path = RESULTS
) -> None:
    """Draw bars of ratios to ``folder/name.png``, one panel above the other, with a line at 1.

    Args:
        panels: panel -> group of bars -> bar -> ratio.
    """
    series = list(dict.fromkeys(bar for groups in panels.values() for bars in groups.values() for bar in bars))
    widest = max(len(groups) for groups in panels.values())
    size = (max(6.0, 1.5 + widest * (0.3 + 0.22 * len(series))), 0.8 + 2.6 * len(panels))
    color = {bar: f"C{number % 10}" for number, bar in enumerate(series)}
    with plotted(folder / f"{name}.png", size, rows=len(panels), sharey=True) as canvas:
        if canvas is None:
            return
        figure, axes = canvas
        width = 0.8 / max(1, *(len(bars) for groups in panels.values() for bars in groups.values()))
        for axis, (panel, groups) in zip(axes[:, 0], panels.items(), strict=True):
            for place, bars in enumerate(groups.values()):
                for number, (bar, ratio) in enumerate(bars.items()):
                    middle = place + (number - (len(bars) - 1) / 2) * width
                    axis.bar_label(axis.bar(middle, ratio, width, color=color[bar]), fmt="%.2f", fontsize=6)
            axis.axhline(1.0, color="black", linewidth=1)
            axis.set_xticks(range(len(groups)), list(groups), fontsize=8)
            axis.set_title(panel, fontsize=9)
            axis.set_ylabel("best dense / this", fontsize=8)
            axis.margins(y=0.15)
        from matplotlib.patches import Rectangle

        keys = [Rectangle((0, 0), 1, 1, color=color[bar]) for bar in series]
        figure.legend(keys, series, fontsize=7, ncols=4, loc="outside lower center")
        figure.suptitle(title, fontsize=10)


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--quick`` and ``--out``."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny settings, to check that the benchmark runs; the figures are meaningless",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder for JSON and plot (bench/results; with --quick, bench/results/quick)",
    )


def fill(args: argparse.Namespace, full: Mapping[str, Any], quick: Mapping[str, Any]) -> None:
    """Set every option that was not given to its default for a full or a quick run."""
    defaults = {**full, **(quick if args.quick else {}), "out": RESULTS / "quick" if args.quick else RESULTS}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
