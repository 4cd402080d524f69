"""Accuracy kept without labels: masks, then reconstruction of blocks, then distillation, on real models.

    python -m bench.masks.reconstruction DATA --model vit_tiny --patterns 8:16 2:4 --seeds 0 1
    python -m bench.masks.reconstruction DATA --model vit_tiny --patterns 2:4 --tome-r 8 --distill 3

DATA is a folder with ``load.py``, weights and labelled images. Masks, reconstruction and distillation use one set of
images (no labels), top-1 is counted on another. ``--holdout N`` holds out N images of the first set and counts on them
instead, to choose options. Rows that are already in the JSON file are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mpcompile
from bench.common import RESULTS, environment, load, plotted, save, table
from bench.masks.ladder import Task, divergence, packed, predict, task
from bench.training.distill import AUGMENT, BATCH, Augmented, held_out, paired_drop
from mpcompile import Config, Reconstruction, Training
from mpcompile.data.labels import draw
from mpcompile.data.mixing import MixedBatches
from mpcompile.ir.module import IRModule

IMAGES = {"vit_tiny": 500, "efficientnet_lite0": 500, "resnet20": 512, "resnet44": 512}
DISTILLATION: dict[str, dict[str, Any]] = {
    "vit_tiny": {"lr": 3e-5, "alpha": 1.0, "features": 10.0, "weight_decay": 0.0},
    "efficientnet_lite0": {"lr": 3e-5, "alpha": 1.0, "features": 1.0, "weight_decay": 0.0, "freeze_bn": True},
    "resnet20": {"lr": 1e-4, "alpha": 1.0, "features": 1.0, "weight_decay": 0.0, "freeze_bn": True},
    "resnet44": {"lr": 1e-4, "alpha": 1.0, "features": 1.0, "weight_decay": 0.0, "freeze_bn": True},
}
KEY = ("model", "pattern", "tome_r", "seed", "holdout", "calibrate", "distill", "options")


class Counter:
    """Counts right answers on the evaluation images, and compares them image by image with the dense model's."""

    def __init__(self, job: Task) -> None:
        self.images, self.labels = job.evaluation
        self.dense = predict(job.model, self.images)
        self.right = self.dense.argmax(1) == self.labels

    def row(self, model: nn.Module, before: Tensor | None = None) -> tuple[dict[str, Any], Tensor]:
        """Return figures of a model, with wins and losses against ``before`` (booleans per image), and its own."""
        predictions = predict(model, self.images)
        hits = predictions.argmax(1) == self.labels
        drop, low, high = paired_drop(self.right, hits)
        row: dict[str, Any] = {"right": int(hits.sum()), "divergence": round(divergence(self.dense, predictions), 5)}
        row |= {"drop": drop, "drop 95 %": [low, high], "hits": packed(hits)}
        if before is not None:
            row |= {"wins": int((hits & ~before).sum()), "losses": int((before & ~hits).sum())}
        return row, hits


def clocked(call: Any) -> tuple[Any, dict[str, float]]:
    """Call, and return the result with wall and processor seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    result = call()
    spent = {"seconds": round(time.perf_counter() - start, 1), "cpu seconds": round(time.process_time() - cpu, 1)}
    return result, spent


def kept(folder: Path | None, name: str, make: Callable[[], IRModule]) -> tuple[IRModule, dict[str, float]]:
    """Return a student, and the time it took: made, or loaded from the folder that keeps students."""
    if folder is None:
        return clocked(make)
    path, times = folder / f"{name}.mpc", folder / f"{name}.json"
    if not path.exists():
        gm, spent = clocked(make)
        folder.mkdir(parents=True, exist_ok=True)
        mpcompile.save(gm, path)
        times.write_text(json.dumps(spent))
    return mpcompile.load(path), json.loads(times.read_text())


def distilled(job: Task, args: argparse.Namespace, gm: IRModule, seed: int) -> dict[str, Any]:
    """Distil a student in place, without labels; return the options and the losses."""
    training = Training.from_options({**DISTILLATION[args.model], "epochs": args.distill, "seed": seed})
    if args.distill_lr is not None:
        training = dataclasses.replace(training, lr=args.distill_lr)
    kind = "vit_tiny" if args.model == "efficientnet_lite0" else "resnet20" if "resnet" in args.model else args.model
    data = Augmented(job.calibration, AUGMENT[kind])
    collate = MixedBatches(args.distill_mix) if args.distill_mix else None
    loader = DataLoader(data, BATCH[kind], shuffle=True, drop_last=len(data) % BATCH[kind] == 1, collate_fn=collate)
    result = mpcompile.distill(gm, job.model, loader, training=training, progress=False)
    return {"options": training.to_dict(), "loss of epochs": result.losses}


def measure(job: Task, args: argparse.Namespace, key: dict[str, Any], options: Reconstruction) -> dict[str, Any]:
    """Measure one row: the masked student, the reconstructed one, and the distilled one."""
    counter, seed, pattern, r = Counter(job), key["seed"], key["pattern"], key["tome_r"]
    x, labels = job.calibration
    count = min(args.images or IMAGES[args.model], len(x))
    batches = list(x[draw(labels.tolist(), count, seed)].split(50))
    name = f"{args.model}-{pattern}-{r}-{seed}-{count}-{args.holdout}"
    how = {"calibrate": args.calibrate, "seed": seed}
    config = (
        Config(mac_reduction=float(pattern[:-1]) / 100, tome_r=r)
        if pattern.endswith("%")
        else Config(pattern, tome_r=r)
    )
    gm, spent = kept(args.work, name, lambda: mpcompile.transform(job.model, x[:2], config, batches, **how))
    first, hits = counter.row(gm.eval())
    row = {**key, "dense": int(counter.right.sum()), "of": len(counter.right), "masked": {**first, **spent}}
    print(f"masked: {first['right']} of {row['of']}, divergence {first['divergence']}", flush=True)
    if not args.masks_only:
        options = dataclasses.replace(options, seed=seed)
        changed = [f"{field}={value}" for field, value in key["options"].items()]
        student, name = gm, "-".join([name, *changed])
        gm, spent = kept(args.work, name, lambda: mpcompile.reconstruct(student, job.model, batches, options=options))
        figures, hits = counter.row(gm.eval(), hits)
        record = next(r for r in reversed(gm.plan.passes) if r.name == "reconstruct")
        row["reconstructed"] = {**figures, **spent, "record": record.decision}
        print(f"reconstructed: {figures['right']}, divergence {figures['divergence']}, {spent}", flush=True)
    if args.distill:
        training, spent = clocked(lambda: distilled(job, args, gm, seed))
        figures, _ = counter.row(gm.eval(), hits)
        row["distilled"] = {**figures, **spent, **training}
        print(f"distilled: {figures['right']}, divergence {figures['divergence']}, {spent}", flush=True)
    row |= {"images": sum(len(b) for b in batches), "threads": torch.get_num_threads()}
    row |= {"macs saved": gm.plan.macs.reduction}
    return row | {"peak rss MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def chart(rows: list[dict[str, Any]], folder: Path, name: str) -> None:
    """Draw top-1 against executed multiply-accumulates, before and after reconstruction, to ``folder/NAME.png``."""
    drawn: dict[Any, dict[str, Any]] = {}  # one row for each point on the first axis
    for row in rows:
        if row["model"] == "vit_tiny" and not row["seed"] and "reconstructed" in row:
            drawn.setdefault((row["pattern"], row["tome_r"]), row)
    rows = list(drawn.values())
    if not rows:
        return
    with plotted(folder / f"{name}.png", (7.2, 4.2)) as canvas:
        if canvas is None:
            return
        axes = canvas[1][0, 0]
        for r, marker in zip(sorted({row["tome_r"] for row in rows}), "os^v", strict=False):
            same = sorted((row for row in rows if row["tome_r"] == r), key=lambda row: row["macs saved"])
            saved = [100 * (1 - row["macs saved"]) for row in same]
            for stage, color in (("masked", "C7"), ("reconstructed", "C0")):
                right = [100 * row[stage]["right"] / row["of"] for row in same]
                merged = f", {r} tokens merged per block" if r else ""
                axes.scatter(saved, right, marker=marker, color=color, label=f"{stage}{merged}", zorder=3)
            for row, x in zip(same, saved, strict=True):
                place = (x, 100 * row["reconstructed"]["right"] / row["of"])
                axes.annotate(row["pattern"], place, xytext=(4, 5), textcoords="offset points", fontsize=7)
        axes.axhline(100 * rows[0]["dense"] / rows[0]["of"], color="C7", linewidth=0.8, linestyle="--", label="dense")
        axes.set_xlabel("executed multiply-accumulates, % of dense")
        axes.set_ylabel(f"top-1 on {rows[0]['of']} images, %")
        axes.margins(x=0.08)  # for the names at the right
        axes.set_title("ViT-Tiny/16, no labels", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=7)


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit_tiny", choices=list(IMAGES))
    parser.add_argument("--patterns", nargs="+", default=["8:16", "2:4"], help="N:M, or 30%% of MACs to save by a plan")
    parser.add_argument("--tome-r", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, metavar="N", help="images of masks and reconstruction")
    parser.add_argument("--minutes", type=float, help="time budget of the reconstruction")
    parser.add_argument("--views", type=int, help="rounds over the images, in place of a time budget")
    parser.add_argument("--epochs", type=int, help="epochs per region, in place of a time budget")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other options of Reconstruction")
    parser.add_argument("--calibrate", default="pruned_to_dense", choices=["pruned_to_dense", "adapted"])
    parser.add_argument("--masks-only", action="store_true", help="no reconstruction")
    parser.add_argument("--distill", type=int, default=0, metavar="EPOCHS", help="epochs of distillation at the end")
    parser.add_argument("--distill-lr", type=float)
    parser.add_argument("--distill-mix", type=float, default=0.0, help="share of images mixed with others meanwhile")
    parser.add_argument("--holdout", type=int, default=0, metavar="N", help="count on N calibration images instead")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="folder that keeps masked students")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", default="reconstruction", help="name of the JSON file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {k: getattr(args, k) for k in ("minutes", "views", "epochs") if getattr(args, k) is not None}
    given |= {name: _number(value) for name, value in (change.split("=") for change in args.set)}
    options = Reconstruction.from_options(given)
    job = task(args.data, args.model)
    if args.holdout:
        job = held_out(job, args.holdout)
    result = load(args.name, args.out) or {"rows": []}
    for pattern, r, seed in itertools.product(args.patterns, args.tome_r, args.seeds):
        distill = [args.distill, args.distill_lr, *([args.distill_mix] if args.distill_mix else [])]
        kinds = {"distill": distill, "options": None if args.masks_only else given}
        key = {"model": args.model, "pattern": pattern, "tome_r": r, "seed": seed, "holdout": args.holdout}
        key |= {"calibrate": args.calibrate, **kinds}
        if any(all(row.get(k, "pruned_to_dense") == key[k] for k in KEY) for row in result["rows"]):
            continue
        result["rows"].append({**measure(job, args, key, options), "environment": environment()})
        save(args.name, result, args.out)
    show(result["rows"])
    chart(result["rows"], args.out, args.name)


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    head = ["model", "pattern", "tome_r", "seed", "dense", "masked", "reconstructed", "distilled", "of"]
    lines = []
    for row in rows:
        stages = [
            str(row[stage]["right"]) if stage in row else "" for stage in ("masked", "reconstructed", "distilled")
        ]
        lines.append([row["model"], row["pattern"], row["tome_r"], row["seed"], row["dense"], *stages, row["of"]])
    print(table(lines, head, left=2))


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


if __name__ == "__main__":
    main()
