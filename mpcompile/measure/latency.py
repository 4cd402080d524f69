"""Latency of all builds, timed in interleaved rounds of one run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from mpcompile.data.calls import call_form
from mpcompile.measure.builds import module_of
from mpcompile.measure.environment import first_tensor
from mpcompile.measure.report import Row


def time_builds(
    builds: Mapping[str, Callable[..., Any]],
    batch: Any,
    rounds: int,
    progress: bool,
    pause: float = 0.0,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Return the milliseconds of every call, per build. Each round times every build, in a random order.

    Args:
        builds: by name.
        batch: what each is called with.
        rounds: timings per build.
        progress: show a progress bar.
        pause: seconds before each call. Runtimes keep threads of their own, which spin for a few milliseconds behind a
            call and would take a core from the next build.
        calls: per build and round. With more than one, a call before them is not timed: the builds before have filled
            the caches with their weights.
    """
    times: dict[str, list[float]] = {name: [] for name in builds}
    names, order = list(builds), random.Random(0)
    cuda = first_tensor(batch).is_cuda
    forms = {name: call_form(module_of(build), batch) for name, build in builds.items()}
    for _ in tqdm(range(rounds), desc="time", unit="round", disable=None if progress else True):
        for name in order.sample(names, len(names)):
            build, (args, kwargs) = builds[name], forms[name]
            time.sleep(pause)
            if calls > 1:
                build(*args, **kwargs)
            for _ in range(calls):
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                build(*args, **kwargs)
                if cuda:
                    torch.cuda.synchronize()
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def fill_in_latency(rows: Sequence[Row], times: Mapping[str, Sequence[float]]) -> None:
    """Set the median, the quartiles and the speed-up over the fastest baseline in every row that has times."""
    best = min(statistics.median(times[row.name]) for row in rows if row.baseline and row.name in times)
    for row in rows:
        if row.name not in times:
            continue
        samples = times[row.name]
        row.latency_ms = statistics.median(samples)
        low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (row.latency_ms,) * 3
        row.quartiles_ms, row.speedup = (low, high), best / row.latency_ms
