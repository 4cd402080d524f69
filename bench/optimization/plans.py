"""Are predicted drops right? Random plans of merging and masks, their predicted and their measured drops.

    python -m bench.optimization.plans DATA --plans 20

DATA is a folder with ``load.py``, weights and labelled images. The damage model is fitted on one set of images, as
``mpcompile.optimize`` fits it; top-1 is counted on both sets. The figure that matters is the rank correlation: a search
needs the right order.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from bench.common import common_arguments, environment, fill, plotted, save, table
from bench.masks.ladder import right, task
from mpcompile import Config, transform
from mpcompile.optimization.accuracy.images import batched, split
from mpcompile.optimization.numbers.model import Model
from mpcompile.optimization.numbers.space import MACS, Space
from mpcompile.optimization.recipe import Recipe

NAME = "optimize_plans"


def draw(numbers: Model, generator: random.Random) -> tuple[Recipe, float]:
    """A random level of merging and, mostly, random patterns, with the damage that is predicted for both."""
    level = generator.choice(numbers.levels)
    density, chosen = generator.uniform(0, 1) ** 2, list[tuple[str, str]]()
    masks = 0.0
    if generator.random() < 0.7 or not any(level.merges):
        for menu in numbers.menus:
            place = min(len(menu.patterns) - 1, int(density * generator.random() * len(menu.patterns)))
            masks += menu.damages[place]
            chosen += [(layer, menu.patterns[place]) for layer in menu.layers] if place else []
    return Recipe(level.merges, tuple(chosen)), numbers.damage(level.damage, masks)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    job = task(args.data, args.model)
    model = job.model.eval()
    images, labels = (part[: args.calibration] for part in job.calibration)
    fit, held = split((images, labels, 32), 0, 0.2, 0.6)
    everything = batched(*(part[: args.images] for part in job.evaluation), 50)
    for part in (fit, held, everything):
        part.add_dense(model)
    example = held.first(1)
    start = time.monotonic()
    space = Space(model, example, Config(), fit, MACS, 0, True)
    numbers = space.measure(True, True, 0.0)
    seconds = time.monotonic() - start
    generator, rows = random.Random(args.seed), list[dict[str, Any]]()
    while len(rows) < args.plans:
        recipe, damage = draw(numbers, generator)
        gm = transform(model, example, recipe.config(Config()), fit.batches if recipe.masked else None).eval()
        own, other = held.judge(gm), everything.judge(gm)
        row = {"recipe": str(recipe), "damage": damage, "predicted": numbers.drops.of(damage)}
        row |= {"held_out": own.record() | {"drop": own.drop}, "other": other.record() | {"drop": other.drop}}
        rows.append({**row, "macs": gm.plan.macs.executed / gm.plan.macs.dense})
        print(
            f"{recipe}: predicted {row['predicted']:.2%}, {own.drop:.2%} held out, {other.drop:.2%} other", flush=True
        )
    dense = int(right(model, tuple(part[: args.images] for part in job.evaluation)).sum())
    return {"environment": environment(), "space_s": seconds, "dense": dense, "rows": rows, **correlations(rows)}


def correlations(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of predictions with drops on both sets, and with divergences."""
    damage = [row["damage"] for row in rows]
    return {
        "rank correlation, held out": float(spearmanr(damage, [r["held_out"]["drop"] for r in rows]).statistic),
        "rank correlation, other images": float(spearmanr(damage, [r["other"]["drop"] for r in rows]).statistic),
        "rank correlation, divergence": float(spearmanr(damage, [r["other"]["divergence"] for r in rows]).statistic),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with load.py, weights and images")
    parser.add_argument("--model", default="vit_tiny", help="(%(default)s)")
    parser.add_argument("--plans", type=int, help="(20)")
    parser.add_argument("--calibration", type=int, help="images of the search (500)")
    parser.add_argument("--images", type=int, help="images of the other set (all)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    fill(
        args,
        {"plans": 20, "calibration": 500, "images": 10**6},
        {"plans": 3, "calibration": 48, "images": 32},
    )
    torch.manual_seed(args.seed)
    data = measure(args)
    lines = [
        [
            r["recipe"],
            f"{r['macs']:.1%}",
            *(f"{v:.2%}" for v in (r["predicted"], r["held_out"]["drop"], r["other"]["drop"])),
        ]
        for r in sorted(data["rows"], key=lambda r: float(r["damage"]))
    ]
    print(table(lines, ["plan", "MACs", "predicted", "held out", "other images"]))
    for name, value in data.items():
        if name.startswith("rank"):
            print(f"{name}: {value:.3f}")
    print(save(NAME, data, args.out))
    with plotted(args.out / f"{NAME}.png", (5.2, 3.8)) as canvas:
        if canvas is not None:
            axes = canvas[1][0, 0]
            axes.scatter([100 * r["predicted"] for r in data["rows"]], [100 * r["other"]["drop"] for r in data["rows"]])
            axes.set_xlabel("predicted drop, points")
            axes.set_ylabel("drop on other images, points")
            axes.grid(alpha=0.3)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
