"""Each lever alone, against the search: the fastest build of each family that keeps the accuracy.

    python -m bench.optimization.levers DATA --batch 1

DATA is a folder with ``load.py``, weights and labelled images. Families: a constant number of merged tokens per block
(by keys alone, and sparing what the class token attends to), one pattern in all layers, and budgets of
multiply-accumulates spread over the layers (``mac_reduction``). Of each, the strongest member whose drop on the images
of the choice is at most what is allowed is taken; drops are printed for other images. All builds are timed in one
interleaved run. The result of ``bench.optimization.search`` at the same drop and batch is shown beside them, with the
speed that it had in its own run.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.common import common_arguments, environment, fill, load, save, table
from bench.kept_accuracy import checked, dense_builds
from bench.masks.ladder import right, task
from bench.optimization import search
from mpcompile import Config, transform
from mpcompile.backend import mpsparse
from mpcompile.measure.latency import time_builds
from mpcompile.optimization.builds import CALLS, PAUSE

NAME = "optimize_levers"
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "constant r, by keys": [{"pattern": "dense", "tome_r": r, "tome_method": "tome"} for r in (4, 8, 11, 13, 16)],
    "constant r, saliency": [{"pattern": "dense", "tome_r": r} for r in (4, 8, 11, 13, 16)],
    "one pattern": [{"pattern": pattern} for pattern in ("14:16", "12:16", "10:16", "8:16")],
    "budgets per layer": [{"mac_reduction": share} for share in (0.05, 0.1, 0.2, 0.3)],
}


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    job = task(args.data, args.model)
    model, x = job.model.eval(), job.evaluation[0][: args.batch].contiguous()
    choice, evaluation = ([part[: args.images] for part in parts] for parts in (job.calibration, job.evaluation))
    fit = list(job.calibration[0][: args.fit].split(32))
    dense = [right(model, part) for part in (choice, evaluation)]
    rows: dict[str, dict[str, Any]] = {}
    builds = dense_builds(model, x)
    baseline = list(builds)
    for family, members in FAMILIES.items():
        for options in members:
            name = f"{family}: " + ", ".join(str(v) for k, v in options.items() if k != "tome_method" and v != "dense")
            with torch.enable_grad():
                gm = transform(model, x, Config(**options), fit if options.get("pattern") != "dense" else None).eval()
            hits = [right(gm, part) for part in (choice, evaluation)]
            drops = [float((d.sum() - h.sum()) / len(d)) for d, h in zip(dense, hits, strict=True)]
            rows[name] = {"family": family, "chosen_on": drops[0], "drop": drops[1]}
            print(f"{name}: {drops[0]:.2%} on the images of the choice, {drops[1]:.2%} on others", flush=True)
            if drops[0] > max(args.drops):
                break  # stronger members lose more
            compiled = torch.compile(gm, backend=mpsparse, options={"frozen": True}, dynamic=False)
            builds[name] = functools.partial(compiled, x)
            checked(name, builds[name], gm(x))
    calls = {name: functools.partial(_call, run) for name, run in builds.items()}
    found = time_builds(calls, x, args.rounds, True, PAUSE, CALLS)  # as the search times its builds
    times = {name: statistics.median(values) for name, values in found.items()}
    best = min(baseline, key=times.__getitem__)
    for name, row in rows.items():
        if name in times:
            row["ms"], row["speedup"] = times[name], times[best] / times[name]
    settings = {"batch": args.batch, "fit": args.fit, "best_dense": best, "best_dense_ms": times[best]}
    return {"environment": environment(), "settings": settings, "rows": rows}


def _call(run: Callable[[], Any], x: torch.Tensor) -> Any:
    return run()  # it holds its input


def report(data: dict[str, Any], args: argparse.Namespace) -> list[list[str]]:
    """For each drop and family, the fastest member that keeps it, and the result of the search."""
    lines = []
    found = load(search.NAME, args.out) or {"rows": []}
    for drop in args.drops:
        for family in FAMILIES:
            kept = {
                name: row
                for name, row in data["rows"].items()
                if row["family"] == family and "speedup" in row and row["chosen_on"] <= drop
            }
            name = max(kept, key=lambda n: float(kept[n]["speedup"]), default=None)
            row = {} if name is None else kept[name]
            shown = (f"{row['speedup']:.2f}x", f"{row['drop']:.2%}") if row else ("1.00x", "")
            lines.append([f"{drop:.0%}", name or f"{family}: none", *shown])
        for row in found["rows"]:
            if (row["batch"], row["max_drop"]) == (args.batch, drop) and row["model"] == args.model:
                seen = row["evaluation"]
                lost = (seen["dense"] - seen["right"]) / seen["images"]
                lines.append([f"{drop:.0%}", f"optimize: {row['chosen']}", f"{row['speedup']:.2f}x", f"{lost:.2%}"])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with load.py, weights and images")
    parser.add_argument("--model", default="vit_tiny", help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="images per call (%(default)s)")
    parser.add_argument("--drops", nargs="+", type=float, default=[0.01, 0.03], help="(%(default)s)")
    parser.add_argument("--fit", type=int, help="images that masks are calibrated on (256)")
    parser.add_argument("--images", type=int, help="images that drops are counted on (500)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (25)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    fill(args, {"fit": 256, "images": 500, "rounds": 25}, {"fit": 32, "images": 32, "rounds": 3})
    torch.set_num_threads(args.threads)
    data = measure(args)
    print(save(NAME, data, args.out))
    print(table(report(data, args), ["at most", "build", "speed", "drop on other images"], left=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
