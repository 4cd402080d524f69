"""Top-1 without training at equal MACs: layer budgets by several damages, against the same density everywhere.

    python -m bench.masks.allocation DATA --model vit_tiny --targets 0.25 0.375 0.5 --images 128

DATA is a folder with ``load.py``, weights and labelled images. Calibration and evaluation images are different sets.
All choices are pruned in the same way (optimal brain surgeon, least squares) from the same menu. Wins are images that a
choice classifies correctly and uniform does not, losses the reverse, with the exact two-sided sign test of both.
Divergence is the mean Kullback-Leibler divergence from the dense model's predictions, in nats.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from scipy.stats import binomtest
from torch import Tensor

from bench.common import environment, save, table
from bench.masks.ladder import Task, divergence, predict, task
from mpcompile import Config, Pipeline, transform
from mpcompile.data.labels import draw
from mpcompile.ir.module import IRModule
from mpcompile.passes.allocate.decide import Allocate, Comparison
from mpcompile.passes.allocate.menu import Candidate
from mpcompile.passes.allocate.prediction import Samples
from mpcompile.passes.analyze import Analyze
from mpcompile.passes.base import Context
from mpcompile.passes.mask import Mask
from mpcompile.passes.permute import Permute
from mpcompile.passes.restore import Restore

CHOICES = ("uniform", "calibrated", "mp", "magnitude", "seb")
COMPARED = ("calibrated", "mp")  # with uniform, on held-out calibration samples
NAMES = {"magnitude": "layer-normalised magnitude", "seb": "SEB", "mp": "MP predictor"}


class Once(Allocate):
    """Predict damages once for all targets; record the held-out comparison, but always keep the allocation."""

    memory: ClassVar[dict[str, Any]] = {}

    def _data(self, gm: IRModule, ctx: Context, candidates: list[Candidate], kind: str) -> Samples | None:
        if kind not in COMPARED:
            return None
        if "data" not in self.memory:
            self.memory["data"] = super()._data(gm, ctx, candidates, kind)
        return self.memory["data"]

    def _predict(
        self, gm: IRModule, ctx: Context, candidates: list[Candidate], kind: str, data: Samples | None, target: float
    ) -> dict[str, str]:
        if kind != "calibrated":
            return super()._predict(gm, ctx, candidates, kind, data, target)
        if "costs" not in self.memory:
            super()._predict(gm, ctx, candidates, kind, data, target)
            self.memory["costs"] = [candidate.costs for candidate in candidates]
        for candidate, costs in zip(candidates, self.memory["costs"], strict=True):
            candidate.costs = costs
        return {}

    def _better(self, held_out: Comparison) -> str:
        self.memory["kept"] = super()._better(held_out)
        return "allocation"


def prune(job: Task, batches: list[Tensor] | None, choice: str, target: float, args: argparse.Namespace) -> IRModule:
    """The pruned model under one choice."""
    config = Config(mac_reduction=target, patterns=tuple(args.patterns), permute=False if args.no_permute else None)
    steps = [Analyze(), Once(choice), Permute(), Mask(), Restore()]
    return transform(job.model, job.calibration[0][:2], config, batches, pipeline=Pipeline(steps))


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit_tiny", choices=["vit_tiny", "resnet20", "resnet44"])
    parser.add_argument("--targets", nargs="+", type=float, default=[0.25, 0.375, 0.5])
    parser.add_argument(
        "--images", type=int, default=128, help="calibration images; 0 prunes by magnitude, without data"
    )
    parser.add_argument("--evaluate", type=int, help="evaluation images (default: all)")
    parser.add_argument("--patterns", nargs="*", default=[], help="the menu (default: the device's)")
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=CHOICES)
    parser.add_argument("--no-permute", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="name of the JSON file in bench/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    job = task(args.data, args.model)
    job.evaluation = tuple(part[: args.evaluate] for part in job.evaluation)  # type: ignore[assignment]
    x, labels = job.calibration
    batches = list(x[draw(labels.tolist(), args.images)].split(32)) if args.images else None
    expected, truth = predict(job.model, job.evaluation[0]), job.evaluation[1]
    dense = int((expected.argmax(1) == truth).sum())
    name = args.name or f"allocation_{args.model}{'' if args.images else '_no_data'}"
    rows: list[dict[str, Any]] = []
    result = {"model": args.model, "images": args.images, "dense": dense, "of": len(job.evaluation[1]), "rows": rows}
    print(f"{args.model}, dense: {dense} of {len(job.evaluation[1])}", flush=True)
    for target in args.targets:
        before = None
        for choice in [c for c in args.choices if batches or c != "calibrated"]:
            start = time.process_time()
            gm = prune(job, batches, choice, target, args)
            row: dict[str, Any] = {"target": target, "choice": NAMES.get(choice, choice)}
            row |= {"saved": gm.plan.macs.reduction, "cpu_seconds": time.process_time() - start}
            predictions = predict(gm.eval(), job.evaluation[0])
            hits = predictions.argmax(1) == truth
            row["right"] = int(hits.sum())
            row["divergence"] = divergence(expected, predictions)
            before = hits if choice == "uniform" else before
            if before is not None and choice != "uniform":
                wins, losses = int((hits & ~before).sum()), int((before & ~hits).sum())
                row |= {"wins": wins, "losses": losses}
                row["p"] = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
            decision = gm.plan.passes[1].decision
            if choice in COMPARED and decision["held_out"] is not None:
                row |= {"kept": Once.memory["kept"], "held_out": decision["held_out"]}
                row["predicted"] = decision["predicted"]
            row["patterns"] = {n: layer.pattern for n, layer in gm.plan.layers.items()}
            rows.append(row)
            print({k: v for k, v in row.items() if k != "patterns"}, flush=True)
            save(name, {**result, "permute": not args.no_permute, "environment": environment(args.threads)})
    head = ["target", "choice", "MACs saved", "right", "divergence", "wins", "losses", "p", "kept by held-out samples"]
    cells = [
        [
            f"{r['target']:.1%}",
            r["choice"],
            f"{r['saved']:.2%}",
            r["right"],
            f"{r['divergence']:.3f}",
            r.get("wins", ""),
            r.get("losses", ""),
            f"{r['p']:.2g}" if "p" in r else "",
            r.get("kept", ""),
        ]
        for r in rows
    ]
    print(table(cells, head, left=2))


if __name__ == "__main__":
    main()
