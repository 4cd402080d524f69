"""The accuracy that a few epochs of distillation recover on real models and images.

    python -m bench.training.distill DATA --task vit_tiny --patterns 2:4 --tome-r 0 8
    python -m bench.training.distill DATA --task resnet20 --patterns 2:4 8:16 --seeds 0 1

DATA is a folder with ``load.py``, weights and labelled images. Training and calibration use one set of images,
evaluation another, which is not used before the end. Methods: ``ours`` (masks by OBS, restored and permuted),
``magnitude`` (masks by magnitude, then the same distillation), ``sr-ste`` and ``gradual`` (dense weights under moving
masks, the same distillation). Rows already in the JSON file are not measured again. ``--holdout N`` holds out N
training images and evaluates on them instead, to choose options.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import mpcompile
from bench.common import environment, load, save, table
from bench.masks.ladder import Task, right, task
from mpcompile import Config, Training, distill, transform
from mpcompile.data.labels import draw
from mpcompile.ir.module import IRModule
from mpcompile.training.distill import apply_masks

METHODS = ("ours", "magnitude", "sr-ste", "gradual")
# ViT-Tiny's were chosen by divergence on 100 held-out training images, the others beforehand; none on evaluation data.
OPTIONS: dict[str, dict[str, Any]] = {
    "vit_tiny": {"lr": 1e-4, "alpha": 1.0, "features": 10.0, "weight_decay": 0.01, "precision": "bf16"},
    "resnet20": {"lr": 1e-3, "alpha": 1.0, "features": 1.0, "weight_decay": 1e-4, "bn_batches": 20},
}
BATCH = {"vit_tiny": 8, "resnet20": 64}
CALIBRATION = {"vit_tiny": 500, "resnet20": 512}


class Crop:
    """Random crops of images padded by 4 pixels, and flips."""

    def __call__(self, image: Tensor) -> Tensor:
        y, x = torch.randint(0, 9, (2,)).tolist()
        image = F.pad(image, (4,) * 4)[:, y : y + image.shape[1], x : x + image.shape[2]]
        return image.flip(-1) if torch.rand(()) < 0.5 else image


AUGMENT: dict[str, Any] = {
    "vit_tiny": v2.Compose([v2.RandomResizedCrop(224, scale=(0.7, 1.0), antialias=True), v2.RandomHorizontalFlip()]),
    "resnet20": Crop(),
}


class Augmented(Dataset[tuple[Tensor, int]]):
    """Images and labels, augmented each time they are read."""

    def __init__(self, data: tuple[Tensor, Tensor], augment: Any) -> None:
        self.images, self.labels, self.augment = *data, augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.augment(self.images[index]), int(self.labels[index])


def paired_drop(dense: Tensor, sparse: Tensor) -> tuple[float, float, float]:
    """Drop in accuracy on the same images, and its 95 % interval (Agresti and Min 2005), as shares.

    Args:
        dense, sparse: a boolean per image, True if that model classifies it correctly.
    """
    lost, won, n = int((dense & ~sparse).sum()), int((sparse & ~dense).sum()), len(dense)
    centre = (lost - won) / (n + 2)
    width = 1.96 * ((lost + won + 1) - (lost - won) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return (lost - won) / n, centre - width, centre + width


def student(job: Task, method: str, pattern: str, r: int, seed: int, images: int) -> IRModule:
    """The student before training."""
    x, labels = job.calibration
    if method == "ours":
        batches = list(x[draw(labels.tolist(), min(images, len(x)), seed)].split(50))
        return transform(job.model, x[:2], Config(pattern=pattern, tome_r=r), batches, calibrate="adapted", seed=seed)
    options = {"score": "magnitude", "permute": False, "restore": False}
    gm = transform(job.model, x[:2], Config(pattern=pattern, tome_r=r, **options))
    if method != "magnitude":
        gm.load_state_dict(job.model.state_dict(), strict=False)
    return gm


def measure(job: Task, args: argparse.Namespace, method: str, pattern: str, r: int, seed: int) -> dict[str, Any]:
    """Measure one row."""
    torch.manual_seed(seed)
    start, cpu = time.perf_counter(), time.process_time()
    key = f"{args.task}-{method}-{pattern.replace(':', 'of')}-{r}-{seed}-{args.holdout}"
    kept_at = None if args.work is None else args.work / f"{key}.mpc"
    if kept_at is not None and kept_at.exists():
        gm = mpcompile.load(kept_at)
    else:
        gm = student(job, method, pattern, r, seed, args.calibration)
        if kept_at is not None:
            args.work.mkdir(parents=True, exist_ok=True)
            mpcompile.save(gm, kept_at)
    made = time.perf_counter() - start
    print(f"{key}: transformed in {made:.0f} s", flush=True)
    dense = right(job.model, job.evaluation)
    masked = copy.deepcopy(gm).eval()
    apply_masks(masked)
    before = right(masked, job.evaluation)
    options = {**OPTIONS[args.task], **dict(change.split("=") for change in args.set)}
    if method in ("sr-ste", "gradual"):
        options["method"] = method
    training = Training.from_options(
        {k: _number(v) for k, v in options.items()} | {"epochs": args.epochs, "seed": seed, "checkpoint_steps": 20}
    )
    x, labels = job.calibration
    kept = draw(labels.tolist(), args.train, seed) if args.train < len(x) else range(len(x))
    data = Augmented((x[list(kept)], labels[list(kept)]), AUGMENT[args.task])
    loader = DataLoader(data, BATCH[args.task], shuffle=True, drop_last=len(data) % BATCH[args.task] == 1)
    began = time.perf_counter()
    out = None if args.work is None else args.work / key
    resume = "never" if out is None else "auto"
    result = distill(gm, job.model, loader, training=training, out=out, resume=resume, progress=False)
    trained = time.perf_counter() - began
    after = right(gm.eval(), job.evaluation)
    drop, low, high = paired_drop(dense, after)
    row = {"task": args.task, "method": method, "pattern": pattern, "tome_r": r, "seed": seed, "epochs": args.epochs}
    row |= {"training images": len(data), "calibration images": args.calibration, "holdout": args.holdout}
    row |= {"of": len(dense), "dense": int(dense.sum()), "before": int(before.sum()), "after": int(after.sum())}
    row |= {"wins": int((after & ~dense).sum()), "losses": int((dense & ~after).sum())}
    row |= {"drop": drop, "drop 95 %": [low, high], "train loss": result.losses, "options": training.to_dict()}
    return row | {
        "seconds transform": made,
        "seconds training": trained,
        "cpu seconds": time.process_time() - cpu,
        "macs saved": gm.plan.macs.reduction,
    }


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def held_out(job: Task, count: int) -> Task:
    """Evaluate on the last ``count`` images of a shuffled training set, and train on the others."""
    x, labels = job.calibration
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, rest = order[:-count], order[-count:]
    return Task(job.model, (x[train], labels[train]), (x[rest], labels[rest]))


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", default="vit_tiny", choices=list(OPTIONS))
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--methods", nargs="+", default=["ours"], choices=METHODS)
    parser.add_argument("--tome-r", nargs="+", type=int, default=[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train", type=int, default=1 << 30, metavar="N", help="training images (default: all)")
    parser.add_argument("--calibration", type=int, metavar="N", help="calibration images")
    parser.add_argument("--holdout", type=int, default=0, metavar="N", help="evaluate on N training images instead")
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="other training options")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="folder of students and checkpoints, from which runs are resumed"
    )
    parser.add_argument("--name", default="distill", help="name of the JSON file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    args.calibration = args.calibration or CALIBRATION[args.task]
    job = task(args.data, args.task)
    if args.holdout:
        job = held_out(job, args.holdout)
    result = load(args.name, args.out) or {"rows": []}
    keys = ("task", "method", "pattern", "tome_r", "seed", "epochs", "holdout")
    for pattern, r, seed, method in [
        (p, r, s, m) for p in args.patterns for r in args.tome_r for s in args.seeds for m in args.methods
    ]:
        wanted = (args.task, method, pattern, r, seed, args.epochs, args.holdout)
        if not args.set and any(tuple(row[k] for k in keys) == wanted for row in result["rows"]):
            continue
        row = measure(job, args, method, pattern, r, seed)
        row["peak rss MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        row["environment"] = environment()
        result["rows"].append(row)
        save(args.name, result, args.out)
        print(
            {k: row[k] for k in ("method", "pattern", "tome_r", "seed", "dense", "before", "after", "of")}, flush=True
        )
    head = ["task", "pattern", "tome_r", "method", "seed", "dense", "before", "after", "of", "drop, points [95 %]"]
    rows = []
    for row in result["rows"]:
        low, high = row["drop 95 %"]
        text = f"{100 * row['drop']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append([row["task"], row["pattern"], row["tome_r"], row["method"], *(row[k] for k in head[4:9]), text])
    print(table(rows, head, left=2))


if __name__ == "__main__":
    main()
