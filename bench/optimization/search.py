"""The fastest build at a drop: ``mpcompile.optimize`` on real models, reported on images that it never saw.

    python -m bench.optimization.search DATA --models vit_tiny --batch 1 8 --drops 0.01 0.03

DATA is a folder with ``load.py``, weights and labelled images. The search is calibrated and chooses on one set of
images; the drop that is printed is counted on another. Its best build and the dense builds of torch, ONNX Runtime and
OpenVINO (where they are installed) are timed in one interleaved run inside the search.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.common import common_arguments, environment, fill, load, save
from bench.masks.ladder import right, task
from mpcompile import optimize

NAME = "optimize"
TITLES = {"vit_tiny": "ViT-Tiny", "efficientnet_lite0": "EfficientNet-Lite0"}
TITLES |= {f"resnet{depth}": f"ResNet-{depth} (CIFAR)" for depth in (20, 44)}


def measure(args: argparse.Namespace, model: str, batch: int, drop: float) -> dict[str, Any]:
    """Search once, and count top-1 of the result on the evaluation images."""
    job = task(args.data, model)
    images, labels = (part[: args.calibration] for part in job.calibration)
    batches = list(zip(images.split(32), labels.split(32), strict=True))
    start = time.monotonic()
    logging.getLogger("mpcompile").setLevel(logging.INFO)
    result = optimize(
        job.model.eval(),
        batches,
        max_drop=drop,
        confidence=args.confidence,
        batch=batch,
        minutes=args.minutes,
        allow=tuple(args.allow),
        folder=args.folder and Path(args.folder) / f"{model}-{batch}",
    )
    seconds = time.monotonic() - start
    print(result, flush=True)
    evaluation = tuple(part[: args.images] for part in job.evaluation)
    dense, ours = right(job.model, evaluation), right(result.module, evaluation)
    return {
        "model": model,
        "batch": batch,
        "max_drop": drop,
        "allow": list(args.allow),
        "minutes": seconds / 60,
        "frontier": result.frontier.to_dict(),
        "chosen": result.chosen.name,
        "speedup": result.speedup,
        "evaluation": {
            "images": len(evaluation[1]),
            "dense": int(dense.sum()),
            "right": int(ours.sum()),
            "lost": int((dense & ~ours).sum()),
            "won": int((ours & ~dense).sum()),
        },
        "environment": environment(),
    }


def markdown(data: dict[str, Any]) -> str:
    """The table of docs/optimize.md: one line per search."""
    head = [
        "model",
        "batch",
        "at most",
        "chosen",
        "speed",
        "ms; best dense",
        "right on other images",
        "drop",
        "minutes",
    ]
    lines = []
    for row in data["rows"]:
        entries = row["frontier"]["entries"]
        chosen = next(e for e in entries if e["verdict"] == "chosen")
        kept = [e for e in entries if e["dense"] and e["latency_ms"] is not None]
        dense = min(kept, key=lambda e: float(e["latency_ms"]))
        seen = row["evaluation"]
        lines.append(
            [
                TITLES[row["model"]],
                row["batch"],
                f"{100 * row['max_drop']:g} points",
                row["chosen"],
                f"**{row['speedup']:.2f}x**",
                f"{chosen['latency_ms']:.2f}; {dense['name'].removeprefix('dense, ')} {dense['latency_ms']:.2f}",
                f"{seen['right']:,} of {seen['images']:,} (dense {seen['dense']:,})",
                f"{100 * (seen['dense'] - seen['right']) / seen['images']:.2f} points",
                f"{row['minutes']:.0f}",
            ]
        )
    return tabulate(lines, headers=head, tablefmt="pipe", disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with load.py, weights and images")
    parser.add_argument("--models", nargs="+", help="of vit_tiny, efficientnet_lite0, resnet20, resnet44 (vit_tiny)")
    parser.add_argument("--batch", nargs="+", type=int, help="images per call (1 8)")
    parser.add_argument("--drops", nargs="+", type=float, help="largest drops, as shares (.01 .03)")
    parser.add_argument("--allow", nargs="+", default=["masks", "tokens"], help="levers (%(default)s)")
    parser.add_argument("--confidence", type=float, default=0.8, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, help="budget of each search (20)")
    parser.add_argument("--calibration", type=int, help="images of the search (500)")
    parser.add_argument("--images", type=int, help="images of the report (all)")
    parser.add_argument("--folder", help="keep measurements in this folder, to resume")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    parser.add_argument("--tables", action="store_true", help="only print the table of the last measurement")
    common_arguments(parser)
    args = parser.parse_args(argv)
    fill(
        args,
        {
            "models": ["vit_tiny"],
            "batch": [1, 8],
            "drops": [0.01, 0.03],
            "minutes": 20,
            "calibration": 500,
            "images": 10**6,
        },
        {"models": ["resnet20"], "batch": [4], "drops": [0.1], "minutes": 1, "calibration": 64, "images": 32},
    )
    if args.tables:
        print(markdown(load(NAME, args.out)))
        return 0
    torch.set_num_threads(args.threads)
    data = load(NAME, args.out) or {}
    rows = {(r["model"], r["batch"], r["max_drop"], tuple(r["allow"])): r for r in data.get("rows", [])}
    for model in args.models:
        for batch in args.batch:
            for drop in args.drops:
                row = measure(args, model, batch, drop)
                rows[model, batch, drop, tuple(row["allow"])] = row
                save(NAME, {"rows": list(rows.values())}, args.out)
    print(markdown({"rows": list(rows.values())}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
