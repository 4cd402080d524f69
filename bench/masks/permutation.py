"""Permutation: efficacy of the search on random scores, magnitude retained at real shapes, and equality of permuted
dense graphs, on full-size models with random weights.

    python -m bench.masks.permutation --models vit_base_patch16_224 resnet50
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.common import RESULTS, environment, load, save
from bench.masks.speed import shaken
from mpcompile import Config
from mpcompile.capture.importers import import_model
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers
from mpcompile.kernels.nm_format import Pattern, to_rows
from mpcompile.passes.base import Context
from mpcompile.passes.channels.axes import analyse
from mpcompile.passes.mask import eligible
from mpcompile.passes.permute import Permute, classes, fold
from mpcompile.pruning.column_order import efficacy, retained, search

MODELS = (
    "vit_base_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "convnextv2_base",
    "resnet50",
    "resnet152d",
    "resnext50_32x4d",
    "mobilenetv3_large_100",
)


def random_scores(steps: int) -> list[dict[str, Any]]:
    """Efficacy at 64 x 128, 2:4, for |Gaussian| and uniform scores."""
    rows = []
    for kind in ("gaussian", "uniform"):
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            scores = torch.randn(64, 128, generator=generator).abs()
            scores = scores if kind == "gaussian" else torch.rand(64, 128, generator=generator)
            start = time.perf_counter()
            order = search(scores[None], Pattern(2, 4), steps)[0]
            seconds = time.perf_counter() - start
            before, after = (float(retained(s, Pattern(2, 4))) for s in (scores, scores[:, order]))
            percent = efficacy(before, after, scores, Pattern(2, 4))
            rows.append({"scores": kind, "seed": seed, "efficacy": round(percent, 2), "seconds": round(seconds, 3)})
    return rows


@torch.no_grad()
def shuffled(name: str) -> dict[str, Any]:
    """Relative change of the output after every class of channels is put into a random order."""
    model, x = shaken(name), torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    gm = import_model(model, x).gm.eval()
    start = time.perf_counter()
    analysis = analyse(gm, [x])
    found = classes(analysis, {u.name: u for u in layers(gm)})
    seconds = time.perf_counter() - start
    orders = {}
    generator = torch.Generator().manual_seed(0)
    for item in found:
        owners = 1 if item.owner is None else analysis.atoms.size[item.owner]
        order = torch.rand(owners, analysis.atoms.size[item.atom], generator=generator).argsort(1)
        orders[item.atom] = (item.owner, order)
    before = gm(x)
    fold(gm, analysis, orders)
    difference = float((gm(x) - before).abs().max() / before.abs().max())
    return {
        "model": name,
        "classes": len(found),
        "layers": sum(len(c.readers) for c in found),
        "unknown": sorted(analysis.unknown),
        "difference": difference,
        "analysis_seconds": round(seconds, 2),
    }


@torch.no_grad()
def kept(name: str, text: str) -> dict[str, Any]:
    """Share of the sum of |w| that magnitude masks keep over all masked layers, before and after Permute."""
    model, x, pattern = shaken(name), torch.zeros(1, 3, 224, 224), Pattern.parse(text)
    imported = import_model(model, x)
    gm, config = imported.gm.eval(), Config(text, score="magnitude", permute=True)
    context = Context(config, imported.inputs, imported.lifted)
    propagate(gm, imported.inputs)
    names = set(eligible(gm, context))
    weights = {u.name: u.weight.tensor for u in layers(gm) if u.name in names}

    def share() -> float:
        sizes = [to_rows(w.detach()).abs() for w in weights.values()]
        return sum(float(retained(s, pattern)) for s in sizes) / sum(float(s.double().sum()) for s in sizes)

    before, start = share(), time.perf_counter()
    Permute().run(gm, context)
    seconds = time.perf_counter() - start
    decision = context.plan.passes[-1].decision
    row = {"model": name, "pattern": text, "layers": len(names), "classes": len(decision["classes"])}
    row |= {"retained_before": round(before, 5), "retained_after": round(share(), 5), "seconds": round(seconds, 1)}
    return row | {"difference": decision.get("difference")}


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--shapes", nargs="*", default=("vit_base_patch16_224", "resnet50"))
    parser.add_argument("--patterns", nargs="*", default=("2:4", "8:16"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {**(load("permutation", RESULTS) or {}), "environment": environment()}
    if args.steps:
        result |= {"steps": args.steps, "search": random_scores(args.steps)}
        print(*result["search"], sep="\n", flush=True)
    jobs: dict[str, list[Callable[[], dict[str, Any]]]] = {
        "equality": [partial(shuffled, name) for name in args.models],
        "retained": [partial(kept, name, pattern) for name in args.shapes for pattern in args.patterns],
    }
    for part, calls in jobs.items():
        for call in calls:
            row = call()
            rows = [r for r in result.get(part, []) if any(r.get(k) != row.get(k) for k in ("model", "pattern"))]
            result[part] = [*rows, row]
            print(row, flush=True)
            save("permutation", result)
    save("permutation", result)


if __name__ == "__main__":
    main()
