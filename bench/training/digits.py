"""The accuracy cost of the demo's job over all scans, cross-validated on scikit-learn's digits.

    python -m bench.training.digits --seeds 0 1 2

Each of four parts of the 1,797 scans is held out once. The dense transformer is trained on the other three, pruned
(8:16) and merged until at least 60 % of its executed multiply-accumulates are saved, and distilled for three epochs on
its training data; then both models predict the held-out part. Drops are paired, scan by scan. All seeds use the same
scans, so the interval over all seeds treats each scan once, with the mean of its drops.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from bench.common import common_arguments, environment, fill, load, save, table
from bench.masks.ladder import packed, right, unpacked
from bench.training.distill import paired_drop
from mpcompile import Config, distill, transform
from mpcompile.cli.demo_job import FOLDS, Batches, Demo, load_data, split, train_dense

SCANS = 1797


def held_out(demo: Demo, fold: int, args: argparse.Namespace) -> tuple[float, dict[str, Tensor]]:
    """MACs saved, and the held-out scans that the dense, the pruned and the distilled model classify correctly."""
    data = load_data(demo.seed, fold)
    dense = train_dense(demo, data, fold)
    config = Config(pattern=args.pattern, tome_r=args.tome_r)
    calibration = data.train[0][:256].split(64)
    student = transform(dense, data.test[0][:64], config, calibration, seed=demo.seed)
    found = {"dense": right(dense, data.test), "pruned": right(student.eval(), data.test)}
    torch.manual_seed(demo.seed)
    distill(student, dense, Batches(data.train, demo.seed + 1), lr=args.lr, epochs=args.epochs, progress=False)
    found["distilled"] = right(student.eval(), data.test)
    return student.plan.macs.reduction, found


def over_seeds(drops: Tensor) -> tuple[float, float, float]:
    """Mean and 95 % interval of the drop, as shares.

    Args:
        drops: (seeds, scans), dense correct minus distilled correct.
    """
    each = drops.mean(0)
    mean, width = float(each.mean()), 1.96 * float(each.std() / len(each) ** 0.5)
    return mean, mean - width, mean + width


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--pattern", default="8:16")
    parser.add_argument("--tome-r", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    fill(args, {"seeds": [0, 1, 2]}, {"seeds": [0]})
    torch.set_num_threads(args.threads)
    options = {k: getattr(args, k) for k in ("pattern", "tome_r", "epochs", "lr", "quick")}
    result: dict[str, Any] = load("digits", args.out) or {}
    if result.get("options") != options:
        result = {"options": options, "parts": []}
    folds = range(1 if args.quick else FOLDS)
    for seed in args.seeds:
        for fold in folds:
            if any((part["seed"], part["fold"]) == (seed, fold) for part in result["parts"]):
                continue
            saved, found = held_out(Demo(args.quick, seed, progress=False), fold, args)
            counts = {name: int(hits.sum()) for name, hits in found.items()}
            part = {"seed": seed, "fold": fold, "of": len(found["dense"]), "macs saved": saved, **counts}
            print(part, flush=True)
            part["hits"] = {name: packed(hits) for name, hits in found.items()}
            result["parts"].append(part)
            save("digits", {**result, "environment": environment(args.threads)}, args.out)
    summarise(result, args)


def summarise(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table, and write the drop of each seed and over all of them to the JSON file."""
    rows, drops = [], []
    for seed in args.seeds:
        parts = sorted((p for p in result["parts"] if p["seed"] == seed), key=lambda p: p["fold"])
        places = torch.cat([split(SCANS, seed, p["fold"])[1] for p in parts])
        hits = {n: torch.cat([unpacked(p["hits"][n], p["of"]) for p in parts]) for n in parts[0]["hits"]}
        drop, low, high = paired_drop(hits["dense"], hits["distilled"])
        shares = [f"{float(h.double().mean()):.2%}" for h in hits.values()]
        rows.append([seed, len(places), *shares, _points(drop, low, high)])
        drops.append(torch.zeros(SCANS).index_put((places,), hits["dense"].float() - hits["distilled"].float()))
    if not args.quick:
        result["drop"] = over_seeds(torch.stack(drops))
        rows.append(["all", SCANS, "", "", "", _points(*result["drop"])])
        save("digits", {**result, "environment": environment(args.threads)}, args.out)
    saved = min(p["macs saved"] for p in result["parts"])
    print(table(rows, ["seed", "scans", "dense", "pruned", "distilled", "paired drop, points [95 %]"]))
    print(f"executed MACs: {saved:.1%} fewer")


def _points(drop: float, low: float, high: float) -> str:
    return f"{100 * drop:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


if __name__ == "__main__":
    main()
