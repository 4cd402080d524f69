"""What a search costs before it tries anything: time and memory of its measurements, on a model with random weights.

    python -m bench.optimization.overhead --model vit_base_patch16_224

Damage of every pattern in every layer, divergence of six levels of merging, and the time of every layer in every
pattern at three numbers of tokens, none of it in the cache of timings.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from typing import Any

import timm
import torch

from bench.common import common_arguments, environment, fill, save
from mpcompile import Config
from mpcompile.optimization.accuracy.images import batched
from mpcompile.optimization.numbers.space import LATENCY, Space

NAME = "optimize_overhead"


def peak() -> int:
    """Largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    model = timm.create_model(args.model, **({"depth": 2} if args.quick else {})).eval()
    size = timm.data.resolve_model_data_config(model)["input_size"]
    fit = batched(torch.randn(args.images, *size), None, 32)
    fit.add_dense(model)
    before = peak()
    start = time.monotonic()
    space = Space(model, fit.first(args.batch), Config(), fit, LATENCY, 0, True)
    numbers = space.measure(True, True, 1e9)
    measured = time.monotonic() - start
    start = time.monotonic()
    budgets = [numbers.drops.damage(0.01 * step) for step in (0.1, 0.5, 1, 2, 4)]
    choices = [str(numbers.best(budget).recipe) for budget in budgets]
    solved = (time.monotonic() - start) / len(budgets)
    memory = {"before_bytes": before, "peak_bytes": peak()}
    counts = {"levels": len(numbers.levels), "weights": len(numbers.menus)}
    return {"model": args.model, "images": args.images, "measure_s": measured, "solve_s": solved, **memory, **counts,
            "choices": choices, "environment": environment()}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per call (%(default)s)")
    parser.add_argument("--images", type=int, help="images for fits (128)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    fill(args, {"images": 128}, {"images": 16})
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache  # timings are taken anew
        row = measure(args)
    gib = (row["peak_bytes"] - row["before_bytes"]) / 2**30
    print(f"{row['measure_s']:.0f} s to measure, {row['solve_s']:.2f} s per choice, {gib:.2f} GiB above the model")
    print(save(NAME, row, args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
