"""Top-1 without training, rung by rung: which masks lose least on a real model?

    python -m bench.masks.ladder DATA --model vit_tiny --patterns 2:4 8:16 --images 64 256

DATA is a folder with ``load.py``, weights and labelled images. Calibration and evaluation images are different sets.
Every rung is compared image by image with the one that it builds on: wins are images that only the higher rung
classifies correctly. Rows that are already in the JSON file are not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import RESULTS, environment, load, save
from mpcompile import Config, transform
from mpcompile.data.labels import draw

RUNGS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude"},
    "wanda": {"score": "wanda"},
    "covariance": {"score": "covariance"},
    "obs": {"score": "obs"},
    "covariance+restore": {"score": "covariance", "restore": True},
    "obs+restore": {"score": "obs", "restore": True},
    "obs+restore+targets": {"score": "obs", "restore": True, "calibrate": "adapted"},
    "obs+restore+targets+permute": {"score": "obs", "restore": True, "calibrate": "adapted", "permute": True},
}
BELOW = {
    "wanda": "magnitude",
    "covariance": "wanda",
    "obs": "covariance",
    "covariance+restore": "covariance",
    "obs+restore": "obs",
    "obs+restore+targets": "obs+restore",
    "obs+restore+targets+permute": "obs+restore+targets",
}


@dataclasses.dataclass
class Task:
    """A model, its calibration and its evaluation images."""

    model: nn.Module
    calibration: tuple[Tensor, Tensor]
    evaluation: tuple[Tensor, Tensor]


def load_module(folder: Path) -> Any:
    """``load.py`` of the data folder."""
    spec = importlib.util.spec_from_file_location("measuring_data", folder / "load.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(load: Any, name: str, norm: Any) -> tuple[Tensor, Tensor]:
    """All images of a file, normalised by a mean and a standard deviation per channel, and their labels."""
    pixels, labels = load.images(name)
    mean, deviation = (torch.tensor(t).view(1, 3, 1, 1) for t in norm)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - mean) / deviation, torch.from_numpy(labels)


def task(folder: Path, name: str) -> Task:
    """One of ``vit_tiny``, ``efficientnet_lite0``, ``resnet20`` and ``resnet44``."""
    load = load_module(folder)
    if name in ("vit_tiny", "efficientnet_lite0"):
        norm = load.NORM["vit_tiny_patch16_224"] if name == "vit_tiny" else load.LITE
        return Task(
            load.vit_tiny() if name == "vit_tiny" else load.efficientnet_lite0(),
            images(load, "imagenet_sample_500_dev.npz", norm),
            images(load, "nips2017_ccby_500_dev.npz", norm),
        )
    return Task(
        load.cifar_resnet(int(name.removeprefix("resnet"))),
        images(load, "cifar10_train20k_dev.npz", load.NORM["cifar_resnet"]),
        images(load, "cifar10_test5k_dev.npz", load.NORM["cifar_resnet"]),
    )


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor, batch: int = 50) -> Tensor:
    """Log-probabilities of the classes, (images, classes)."""
    return torch.cat([model(part).log_softmax(-1) for part in x.split(batch)])


def divergence(dense: Tensor, predictions: Tensor) -> float:
    """Mean Kullback-Leibler divergence from the dense model's predictions, in nats; both from :func:`predict`."""
    return float((dense.exp() * (dense - predictions)).sum(-1).mean())


def packed(hits: Tensor) -> str:
    """Encode which images are classified correctly (boolean) in hex, one bit per image."""
    return np.packbits(hits.numpy()).tobytes().hex()


def unpacked(text: str, count: int) -> Tensor:
    """The inverse of :func:`packed`."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count)
    return torch.from_numpy(bits).bool()


def right(model: nn.Module, data: tuple[Tensor, Tensor], batch: int = 50) -> Tensor:
    """A boolean per image: True if the model classifies it correctly."""
    return predict(model, data[0], batch).argmax(1) == data[1]


def measure(
    job: Task, dense: Tensor, pattern: str, count: int, rung: str, flips: bool
) -> tuple[dict[str, Any], Tensor]:
    """One row, and a boolean per image, True if it is classified correctly; ``dense``: the dense log-probabilities."""
    x, labels = job.calibration
    chosen = x[draw(labels.tolist(), count)]
    batches = list((torch.cat([chosen, chosen.flip(-1)]) if flips else chosen).split(32))
    options = {"restore": False, "permute": False, **RUNGS[rung]}
    calibrate = options.pop("calibrate", "pruned")
    start, cpu = time.perf_counter(), time.process_time()
    gm = transform(job.model, batches[0][:2], Config(pattern=pattern, **options), batches, calibrate=calibrate).eval()
    row: dict[str, Any] = {"pattern": pattern, "images": count, "flips": flips, "rung": rung}
    row |= {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    predictions = predict(gm, job.evaluation[0])
    hits = predictions.argmax(1) == job.evaluation[1]
    row |= {"right": int(hits.sum()), "of": len(hits), "divergence": round(divergence(dense, predictions), 5)}
    return row | {"masked": len(gm.plan.masked)}, hits


def compare(rows: list[dict[str, Any]]) -> None:
    """Add wins and losses of each row against the rung that it builds on, from ``hits``, see :func:`packed`."""
    by_key = {(r["pattern"], r["images"], r["flips"], r["rung"]): r for r in rows}
    for (pattern, images, flips, rung), row in by_key.items():
        below = by_key.get((pattern, images, flips, BELOW.get(rung, "")))
        if below is not None and "hits" in row and "hits" in below:
            ours, theirs = int(row["hits"], 16), int(below["hits"], 16)
            row |= {
                "against": BELOW[rung],
                "wins": (ours & ~theirs).bit_count(),
                "losses": (theirs & ~ours).bit_count(),
            }


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit_tiny", choices=["vit_tiny", "resnet20", "resnet44"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "8:16"])
    parser.add_argument("--images", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--flips", action="store_true", help="calibrate on mirrored copies of the images, too")
    parser.add_argument("--name", help="name of the JSON file in bench/results")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    job = task(args.data, args.model)
    name = args.name or f"mask_ladder_{args.model}"
    dense = predict(job.model, job.evaluation[0])
    correct = int((dense.argmax(1) == job.evaluation[1]).sum())
    print(f"dense: {correct} of {len(dense)}", flush=True)
    result = load(name, args.out) or {"rows": []}
    result |= {"model": args.model, "dense": correct, "of": len(dense)}
    rows = result["rows"]
    for pattern, count, rung in itertools.product(args.patterns, args.images, args.rungs):
        asked = {"pattern": pattern, "images": count, "flips": args.flips, "rung": rung}
        same = [row for row in rows if asked.items() <= row.items()]
        if any("hits" in row for row in same):
            continue
        row, hits = measure(job, dense, pattern, count, rung, args.flips)
        print(row, flush=True)
        for old in same:  # a row without hits
            rows.remove(old)
        rows.append({**row, "hits": packed(hits)})
        compare(rows)
        save(name, {**result, "environment": environment()}, args.out)


if __name__ == "__main__":
    main()
