"""Speed against retained accuracy: every build of one real model in one chart, beside dense builds of other runtimes.

    python -m bench.kept_accuracy DATA

DATA is a folder with ``load.py``, weights and labelled images. Masks are calibrated on unlabelled images of one set;
top-1 is counted on another. Nothing is trained. Latencies are medians of interleaved rounds. The baseline is the
fastest dense build of torch (eager, ``torch.compile``, freezing), ONNX Runtime and OpenVINO, where they are installed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import (
    common_arguments,
    compiled_dense,
    environment,
    fill,
    interleave,
    plotted,
    quartiles,
    relative_rms,
    save,
    table,
)
from bench.masks.ladder import right, task
from mpcompile import Config, transform
from mpcompile.backend import mpsparse
from mpcompile.runtimes.catalogue import RUNTIMES
from mpcompile.runtimes.catalogue import build as runtime_build

NAME = "kept_accuracy"
BUILDS: dict[str, dict[str, Any]] = {
    "merge 4": {"pattern": "dense", "tome_r": 4},
    "merge 8": {"pattern": "dense", "tome_r": 8},
    "merge 13": {"pattern": "dense", "tome_r": 13},
    "merge 16": {"pattern": "dense", "tome_r": 16},
    "12:16, merge 8": {"pattern": "12:16", "tome_r": 8},
    "8:16": {"pattern": "8:16"},
    "8:16, merge 8": {"pattern": "8:16", "tome_r": 8},
    "2:4": {"pattern": "2:4"},
}
TOLERANCE = 1e-3  # relative RMS of a build's logits to its own graph in eager mode


def dense_builds(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """The usual ways to run the dense model, on the given number of threads."""
    builds: dict[str, Callable[[], Any]] = {"torch eager": functools.partial(model, x)}
    for name, freezing in (("torch compile", False), ("torch compile, frozen", True)):
        builds[name] = functools.partial(compiled_dense(model, x, freezing=freezing)[0], x)
    for name, runtime in RUNTIMES.items():
        if runtime.installed:
            builds[runtime.title] = functools.partial(runtime_build(model, x, name), x)
    return builds


def checked(name: str, run: Callable[[], Any], expected: Tensor) -> None:
    """Refuse to time a build whose outputs differ from those of its own graph.

    Raises:
        SystemExit: they differ.
    """
    error = relative_rms(run(), expected)
    if error > TOLERANCE:
        raise SystemExit(f"{name} is wrong: relative RMS {error:.1e}; nothing was timed")


@torch.no_grad()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build, check, count top-1, then time everything in one interleaved run."""
    job = task(args.data, "vit_tiny")
    model, x = job.model.eval(), job.evaluation[0][: args.batch].contiguous()
    evaluation = tuple(part[: args.images] for part in job.evaluation)
    calibration = list(job.calibration[0][: args.calibration].split(32))
    hits = {"dense": right(model, evaluation)}
    rows: dict[str, dict[str, Any]] = {}
    builds = dense_builds(model, x)
    for name, run in builds.items():
        checked(name, run, model(x))
        rows[name] = {"kind": "dense", "right": int(hits["dense"].sum())}
    for name in args.builds:
        options = BUILDS[name]
        given = None if options["pattern"] == "dense" else calibration
        with torch.enable_grad():
            gm = transform(model, x, Config(**options), given)
        hits[name] = right(gm, evaluation)
        compiled = torch.compile(gm, backend=mpsparse, options={"frozen": True}, dynamic=False)
        builds[name] = functools.partial(compiled, x)
        checked(name, builds[name], gm(x))
        lost, won = (int((a & ~b).sum()) for a, b in ((hits["dense"], hits[name]), (hits[name], hits["dense"])))
        macs = gm.plan.macs.executed / gm.plan.macs.dense
        rows[name] = {"kind": "ours", "right": int(hits[name].sum()), "lost": lost, "won": won, "macs_ratio": macs}
        print(f"{name}: {rows[name]['right']} of {len(evaluation[1])} right", flush=True)
    print(f"timing {len(builds)} builds", flush=True)
    seconds = interleave(builds, args.rounds, progress=NAME)
    for name, row in rows.items():
        row["ms"] = quartiles(seconds[name], 1e3)
    best = min((name for name in rows if rows[name]["kind"] == "dense"), key=lambda name: rows[name]["ms"]["median"])
    for row in rows.values():
        row["speedup"] = rows[best]["ms"]["median"] / row["ms"]["median"]
    settings = {"batch": args.batch, "images": len(evaluation[1]), "calibration": args.calibration}
    return {"environment": environment(), "settings": settings, "best_dense": best, "rows": rows}


def chart(data: dict[str, Any], folder: Path) -> None:
    """Accuracy against speed to ``folder/kept_accuracy.png``."""
    with plotted(folder / f"{NAME}.png", (7.2, 4.2)) as canvas:
        if canvas is None:
            return
        axes = canvas[1][0, 0]
        total = data["settings"]["images"]
        for kind, label, marker, color in (("dense", "dense", "s", "C7"), ("ours", "mpcompile", "o", "C0")):
            rows = {name: row for name, row in data["rows"].items() if row["kind"] == kind}
            points = [(row["speedup"], 100 * row["right"] / total) for row in rows.values()]
            axes.scatter(*zip(*points, strict=True), marker=marker, color=color, label=label, zorder=3)
            for place, (point, name) in enumerate(sorted(zip(points, rows, strict=True))):
                shift = (-2, 6) if kind == "dense" else (6, 4 if place % 2 else -10)  # labels keep clear of each other
                turned = 60 if kind == "dense" else 0
                axes.annotate(name, point, xytext=shift, textcoords="offset points", fontsize=7, rotation=turned)
        axes.set_ylim(top=104)
        axes.axvline(1, color="C7", linewidth=0.8)
        axes.set_xlabel(f"speed against the best dense build ({data['best_dense']}), higher is better")
        axes.set_ylabel(f"top-1 on {total} held-out images, %")
        axes.set_title("ViT-Tiny/16, not retrained after transform, fp32, batch 1", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower left")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with load.py, weights and images")
    parser.add_argument("--builds", nargs="+", choices=BUILDS, metavar="BUILD", help=f"of {', '.join(BUILDS)}")
    parser.add_argument("--batch", type=int, help="images per call (1)")
    parser.add_argument("--images", type=int, help="images that top-1 is counted on (all)")
    parser.add_argument("--calibration", type=int, help="unlabelled images that masks are calibrated on (256)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (41)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    common_arguments(parser)
    args = parser.parse_args(argv)
    fill(
        args,
        {"builds": list(BUILDS), "batch": 1, "images": 500, "calibration": 256, "rounds": 41},
        {"builds": ["merge 8"], "batch": 1, "images": 20, "calibration": 8, "rounds": 3},
    )
    torch.set_num_threads(args.threads)
    data = measure(args)
    total = data["settings"]["images"]
    rows = []
    for name, row in data["rows"].items():
        ms, speed = row["ms"], row["speedup"]
        spread = f"{ms['q1']:.1f}-{ms['q3']:.1f}"
        slower = "" if speed >= 1 else " (slower)"
        rows.append([name, f"{row['right']} of {total}", f"{ms['median']:.1f}", spread, f"{speed:.2f}x{slower}"])
    print(table(rows, ["build", "right", "ms", "quartiles", f"against {data['best_dense']}"]))
    print(f"figures: {save(NAME, data, args.out)}")
    chart(data, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
