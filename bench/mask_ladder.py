"""Top-1 without training, rung by rung: which masks lose least on a real model.

    python -m bench.mask_ladder DATA --model vit_tiny --patterns 2:4 8:16 --images 64 256

DATA is a folder with ``load.py``, weights and labelled images. Calibration and evaluation images are different sets.
Every rung is compared image by image with the one before it: wins are images that it alone gets right.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import environment, save
from mpcompile import Config, transform
from mpcompile.calibration import draw

RUNGS: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude"},
    "wanda": {"score": "wanda"},
    "covariance": {"score": "covariance"},
    "obs": {"score": "obs"},
    "covariance+restore": {"score": "covariance", "restore": True},
    "obs+restore": {"score": "obs", "restore": True},
    "obs+restore, dense targets": {"score": "obs", "restore": True, "calibrate": "pruned_to_dense"},
    "obs+restore+permute": {"score": "obs", "restore": True, "permute": True},
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


def images(load: Any, name: str, norm: str) -> tuple[Tensor, Tensor]:
    """All images of a file, normalised, and their labels."""
    pixels, labels = load.images(name)
    mean, deviation = (torch.tensor(t).view(1, 3, 1, 1) for t in load.NORM[norm])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x - mean) / deviation, torch.from_numpy(labels)


def task(folder: Path, name: str) -> Task:
    """One of ``vit_tiny``, ``resnet20`` and ``resnet44``."""
    load = load_module(folder)
    if name == "vit_tiny":
        norm = "vit_tiny_patch16_224"
        return Task(
            load.vit_tiny(),
            images(load, "imagenet_sample_500_dev.npz", norm),
            images(load, "nips2017_ccby_500_dev.npz", norm),
        )
    return Task(
        load.cifar_resnet(int(name.removeprefix("resnet"))),
        images(load, "cifar10_train20k_dev.npz", "cifar_resnet"),
        images(load, "cifar10_test5k_dev.npz", "cifar_resnet"),
    )


@torch.inference_mode()
def right(model: nn.Module, data: tuple[Tensor, Tensor], batch: int = 50) -> Tensor:
    """Which images the model gets right."""
    x, labels = data
    return torch.cat([model(part).argmax(1) for part in x.split(batch)]) == labels


def measure(
    job: Task, pattern: str, count: int, rung: str, before: Tensor | None, flips: bool
) -> tuple[dict[str, Any], Tensor]:
    """One row of the table."""
    x, labels = job.calibration
    chosen = x[draw(labels.tolist(), count)]
    batches = list((torch.cat([chosen, chosen.flip(-1)]) if flips else chosen).split(32))
    options = {"restore": False, "permute": False, **RUNGS[rung]}
    calibrate = options.pop("calibrate", "pruned")
    start, cpu = time.perf_counter(), time.process_time()
    gm = transform(job.model, batches[0][:2], Config(pattern=pattern, **options), batches, calibrate=calibrate)
    row: dict[str, Any] = {"pattern": pattern, "images": count, "flips": flips, "rung": rung}
    row |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    hits = right(gm.eval(), job.evaluation)
    row |= {"right": int(hits.sum()), "of": len(hits)}
    if before is not None:
        row |= {"wins": int((hits & ~before).sum()), "losses": int((before & ~hits).sum())}
    row["masked"] = len(gm.plan.masked)
    return row, hits


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="vit_tiny", choices=["vit_tiny", "resnet20", "resnet44"])
    parser.add_argument("--patterns", nargs="+", default=["2:4", "8:16"])
    parser.add_argument("--images", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rungs", nargs="+", default=list(RUNGS), choices=list(RUNGS))
    parser.add_argument("--flips", action="store_true", help="calibrate on mirrored copies of the images too")
    parser.add_argument("--name", help="of the JSON file in bench/results")
    args = parser.parse_args()
    job = task(args.data, args.model)
    name = args.name or f"mask_ladder_{args.model}"
    dense = right(job.model, job.evaluation)
    print(f"dense: {int(dense.sum())} of {len(dense)}", flush=True)
    rows = []
    for pattern in args.patterns:
        for count in args.images:
            before = None
            for rung in args.rungs:
                row, before = measure(job, pattern, count, rung, before, args.flips)
                rows.append(row)
                print(row, flush=True)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                result = {"model": args.model, "dense": int(dense.sum()), "of": len(dense), "rows": rows}
                save(name, {**result, "peak_rss_mib": round(peak), "environment": environment()})


if __name__ == "__main__":
    main()
