"""Permutation: efficacy of the search on random scores, and equality of permuted dense graphs on full-size models.

python -m bench.permutation --models vit_base_patch16_224 resnet50
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from bench.common import environment, save
from bench.mask_speed import shaken
from mpcompile.graph import layers
from mpcompile.importers import import_model
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.axes import analyse
from mpcompile.passes.permute import classes, fold
from mpcompile.permutation import efficacy, retained, search

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
            found = efficacy(before, after, scores, Pattern(2, 4))
            rows.append({"scores": kind, "seed": seed, "efficacy": round(found, 2), "seconds": round(seconds, 3)})
    return rows


@torch.no_grad()
def shuffled(name: str) -> dict[str, Any]:
    """Relative change of the output when every class of channels is put into a random order."""
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


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    result: dict[str, Any] = {"search": random_scores(args.steps), "steps": args.steps, "equality": []}
    for row in result["search"]:
        print(row, flush=True)
    for name in args.models:
        result["equality"].append(shuffled(name))
        print(result["equality"][-1], flush=True)
    save("permutation", {**result, "environment": environment()})


if __name__ == "__main__":
    main()
