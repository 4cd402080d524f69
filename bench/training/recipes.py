"""Does every recipe start and run at full model size?

    python -m bench.training.recipes
    python -m bench.training.recipes --only vit_base_2of4_tome8

Each recipe makes its model (random weights), its student from 4 random images, and two optimiser steps of distillation
on batches of 2, in a separate process. Checks: the masks are legal before and after, the loss is finite, and the
multiply-accumulates, counted from the tensors, equal those that the recipe expects.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch

from bench.common import environment, load, save, table
from mpcompile import distill
from mpcompile.passes.mask import verify
from mpcompile.training.recipes.recipe import Recipe

TOLERANCE = 0.006  # percent points, and G of 1 %: the figures are rounded to two or three digits


def check(name: str) -> dict[str, Any]:
    """Check one recipe in this process."""
    recipe = Recipe.load(name, ["train.bn_batches=2"] if Recipe.load(name).train.bn_batches else [])
    torch.manual_seed(0)
    size = recipe.data.size or 224
    teacher = timm.create_model(recipe.model.partition(".")[0], pretrained=False).eval()
    images = torch.randn(4, 3, size, size)
    start = time.perf_counter()
    student = recipe.student(teacher, [images])
    made = time.perf_counter() - start
    broken = sum(verify(student).values())
    labels = torch.randint(0, 1000, (4,))
    batches = list(zip(images.split(2), labels.split(2), strict=True))
    before = {k: v.clone() for k, v in student.state_dict().items() if k.endswith("weight")}
    start = time.perf_counter()
    result = distill(student, teacher, batches, training=recipe.train, epochs=1, warmup=0, progress=False)
    trained = time.perf_counter() - start
    broken += sum(verify(student).values())
    after = student.state_dict()
    changed = sum(not torch.equal(before[k], after[k]) for k in before)
    macs, expected = student.plan.macs, recipe.macs
    found = {"dense": macs.dense / 1e9, "executed": 100 * macs.reduction, "paper": 100 * macs.paper_reduction}
    near = {k: abs(found[k] - v) <= (0.001 if k == "dense" else TOLERANCE) for k, v in expected.items()}
    return {
        "recipe": name,
        "model": recipe.model,
        "masked": len(student.plan.masked),
        "illegal groups": broken,
        "steps": result.steps,
        "loss": result.losses[0],
        "weights changed": f"{changed} of {len(before)}",
        "macs": found,
        "macs expected": dict(expected),
        "ok": broken == 0 and result.steps == 2 and changed > 0 and all(near.values()),
        "seconds transform": made,
        "seconds of two steps": trained,
        "peak rss MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> None:
    """Check, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=Recipe.names(), help="recipes (default: all)")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(check(args.here)))
        return
    result = load("recipes", args.out) or {"rows": []}
    for name in args.only or Recipe.names():
        command = [sys.executable, "-m", "bench.training.recipes", "--here", name]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            row: dict[str, Any] = {"recipe": name, "ok": False, "failed": done.returncode}
        else:
            row = json.loads(done.stdout.splitlines()[-1])
        result["rows"] = [r for r in result["rows"] if r["recipe"] != name] + [row]
        result["environment"] = environment()
        save("recipes", result, args.out)
        print(row, flush=True)
    rows = []
    for row in result["rows"]:
        macs = row.get("macs", {})
        cells = [f"{macs[k]:.3f}" if k in macs else "" for k in ("dense", "executed", "paper")]
        rows.append([row["recipe"], *cells, row.get("peak rss MiB", ""), "yes" if row["ok"] else "NO"])
    print(table(rows, ["recipe", "dense G", "saved %", "paper's count %", "peak MiB", "ok"]))
    raise SystemExit(0 if all(row["ok"] for row in result["rows"]) else 1)


if __name__ == "__main__":
    main()
