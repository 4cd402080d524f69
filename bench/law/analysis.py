"""Time to analyse a model and to choose its layer budgets.

    python -m bench.law.analysis

Wall time of ``mpcompile.analyze`` on random weights, and of the knapsack with 156 layers and 6 patterns. The time
of the analysis depends on shapes and rejections: weights that reject the law are fitted a second time, with the scales
of rows and columns removed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import timm
import torch

from bench.common import common_arguments, environment, fill, save, table
from mpcompile import analyze
from mpcompile.pruning import knapsack

FLOORS = {"vit_base_patch16_224": 15.0, "vit_large_patch16_224": 60.0, "resnet152d": 30.0}


def analysis(name: str) -> dict[str, Any]:
    """Time the analysis of one model, with the initial weights of timm."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    start, cpu = time.perf_counter(), time.process_time()
    result = analyze(model, progress=False)
    seconds, spent = time.perf_counter() - start, time.process_time() - cpu
    fits = [f for layer in result.layers.values() for f in layer.fits.values()]
    row = {"model": name, "matrices": len(fits), "mp": sum(f.verdict == "mp" for f in fits)}
    return {**row, "seconds": seconds, "cpu_seconds": spent, "floor": FLOORS.get(name)}


def budget(seed: int, spread: float) -> dict[str, Any]:
    """Time the knapsack: 156 layers of several sizes with 6 options each, to save half of the MACs.

    ``spread`` is the standard deviation of the logarithm of their costs.
    """
    rng = np.random.default_rng(seed)
    density = np.array([1, 0.75, 0.625, 0.5, 0.375, 0.25])
    loss = np.array([0, 0.0135, 0.0391, 0.0876, 0.16, 0.27])
    size = np.array([3, 1, 4, 4] * 39) * rng.choice([1.0, 2.0, 4.0], 156)
    costs = [loss * rng.lognormal(0, spread) * rng.uniform(0.9, 1.1, 6).cumsum() / np.arange(1, 7) for _ in size]
    saved = [s * (1 - density) for s in size]
    start = time.perf_counter()
    chosen, price = knapsack.solve(costs, saved, 0.5 * size.sum())
    seconds = time.perf_counter() - start
    got = sum(s[i] for s, i in zip(saved, chosen, strict=True)) / size.sum()
    cost = sum(c[i] for c, i in zip(costs, chosen, strict=True))
    even = knapsack.even_mix([density] * 156, saved, 0.5 * size.sum())
    uniform = sum(c[i] for c, i in zip(costs, even, strict=True))
    return {
        "spread": spread,
        "seconds": seconds,
        "saved": got,
        "cost": cost,
        "cost of uniform": uniform,
        "price": price,
    }


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--models", nargs="+")
    args = parser.parse_args()
    fill(args, {"models": list(FLOORS)}, {"models": ["resnet10t"]})
    choices = [budget(seed, spread) for spread in (0.0, 1e-3, 1.0, 2.0) for seed in range(3)]
    rows = []
    for name in args.models:
        rows.append(analysis(name))
        print(rows[-1], flush=True)
        save("analysis", {"models": rows, "knapsack": choices, "environment": environment()}, args.out)
    cells = [[r["model"], r["matrices"], r["mp"], f"{r['seconds']:.1f}", r["floor"] or ""] for r in rows]
    print(table(cells, ["model", "matrices", "follow the law", "seconds", "floor"]))
    keys = ["spread", "seconds", "saved", "cost", "cost of uniform"]
    print(table([[f"{c[k]:.4g}" for k in keys] for c in choices], keys))


if __name__ == "__main__":
    main()
