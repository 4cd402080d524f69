"""Top-1 against the number of merged tokens, on real images and without training.

    python -m bench.tokens.accuracy --data FOLDER --tome-r 0 4 8 12 13 16 20

FOLDER holds ``vit_tiny_patch16_224_fp16.safetensors`` and image files, .npz with uint8 ``jpeg`` (concatenated JPEG
bytes), int64 ``offsets`` and ``labels`` of ImageNet's 1000 classes; images are 224 x 224, normalised with mean and
standard deviation 0.5.

Tokens are merged in three ways: by their keys with proportional attention, by their keys without it, and, as a control,
with the keys replaced by random numbers, which merges the same number of tokens at random. Intervals are Wilson's,
95 %; "lost" and "won" count the images that only the dense or only the merged model classifies correctly.

Results go into tome_accuracy.json and tome_accuracy.png.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from bench import common
from mpcompile import Config, Pipeline, transform
from mpcompile.ir.module import IRModule
from mpcompile.kernels import ops
from mpcompile.passes.merge_tokens.insert import MergeTokens

NAME = "tome_accuracy"
MODEL = "vit_tiny_patch16_224"
WAYS = ("proportional", "not proportional", "random")


def images_of(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) in fp32, normalised, and labels (N,)."""
    data = np.load(path)
    offsets, stream = data["offsets"], data["jpeg"].tobytes()
    pictures = [
        np.asarray(Image.open(io.BytesIO(stream[start:stop])).convert("RGB"))
        for start, stop in itertools.pairwise(offsets)
    ]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return (pixels - 0.5) / 0.5, torch.from_numpy(data["labels"].astype(np.int64))


def randomised(gm: IRModule) -> IRModule:
    """The module with random numbers in place of the keys by which tokens are matched."""
    for node in [n for n in gm.graph.nodes if n.target is ops.token_merge]:
        with gm.graph.inserting_before(node):
            noise = gm.graph.call_function(torch.randn_like, (node.args[1],))
        node.update_arg(1, noise)
    gm.recompile()
    return gm


def merged(model: nn.Module, r: int, way: str) -> IRModule:
    config = Config(pattern="dense", tome_r=r, tome_method="tome", tome_proportional=way != "not proportional")
    gm = transform(model, torch.zeros(1, 3, 224, 224), config, pipeline=Pipeline([MergeTokens()]))
    return randomised(gm) if way == "random" else gm


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Tensor:
    """A boolean per image: True if the model classifies it correctly."""
    torch.manual_seed(0)
    found = torch.cat([model(chunk).argmax(-1) for chunk in images.split(batch)])
    return found == labels


def interval(hits: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z, p = 1.959964, hits / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def measure(model: nn.Module, path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per r and way of merging."""
    images, labels = images_of(path)
    dense = right(model, images, labels, args.batch)
    records = []
    for r in args.tome_r:
        for way in WAYS if r else ("dense",):
            macs, hits = 1.0, dense
            if r:
                gm = merged(model, r, way)
                macs, hits = gm.plan.macs.executed / gm.plan.macs.dense, right(gm, images, labels, args.batch)
            low, high = interval(int(hits.sum()), len(labels))
            records.append(
                {
                    "images": path.stem,
                    "r": r,
                    "way": way,
                    "right": int(hits.sum()),
                    "of": len(labels),
                    "interval": [low, high],
                    "lost": int((dense & ~hits).sum()),
                    "won": int((~dense & hits).sum()),
                    "macs_ratio": macs,
                }
            )
            print(path.stem, r, way, f"{int(hits.sum())}/{len(labels)}", file=sys.stderr, flush=True)
    return records


def plot(records: list[dict[str, Any]], folder: Path) -> None:
    """Plot top-1 against r, one panel per set of images."""
    sets = list(dict.fromkeys(record["images"] for record in records))
    with common.plotted(folder / f"{NAME}.png", (5 * len(sets), 4), columns=len(sets), sharey=True) as canvas:
        if canvas is None:
            return
        figure, axes = canvas
        for axis, images in zip(axes[0], sets, strict=True):
            rows = [record for record in records if record["images"] == images]
            dense = next(record for record in rows if record["r"] == 0)
            for way in WAYS:
                line = [dense, *[record for record in rows if record["way"] == way]]
                share = [100 * record["right"] / record["of"] for record in line]
                error = [
                    [s - 100 * record["interval"][0] for s, record in zip(share, line, strict=True)],
                    [100 * record["interval"][1] - s for s, record in zip(share, line, strict=True)],
                ]
                axis.errorbar([record["r"] for record in line], share, error, marker="o", capsize=2, label=way)
            axis.set_title(images, fontsize=9)
            axis.set_xlabel("tokens merged a block")
        axes[0, 0].set_ylabel("top-1, %")
        axes[0, 0].legend(fontsize=8)
        figure.suptitle(f"{MODEL}, not trained after merging", fontsize=10)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="weights and images")
    parser.add_argument(
        "--images", nargs="+", default=["nips2017_ccby_500_dev", "imagenet_sample_500_dev"], help="(%(default)s)"
    )
    parser.add_argument("--tome-r", type=int, nargs="+", metavar="R", help="(0 4 8 12 13 16 20)")
    parser.add_argument("--batch", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    common.fill(args, {"tome_r": [0, 4, 8, 12, 13, 16, 20]}, {"tome_r": [0, 8]})
    torch.set_num_threads(args.threads)
    model = timm.create_model(MODEL).eval()
    weights = load_file(args.data / f"{MODEL}_fp16.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    records = [record for name in args.images for record in measure(model, args.data / f"{name}.npz", args)]
    path = common.save(NAME, {"model": MODEL, "environment": common.environment(), "records": records}, args.out)
    rows = [
        [
            record["images"],
            record["r"],
            record["way"],
            f"{100 * record['right'] / record['of']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            f"{record['lost']} / {record['won']}",
            f"{record['macs_ratio']:.3f}",
        ]
        for record in records
        for low, high in [record["interval"]]
    ]
    print(common.table(rows, ["images", "r", "matching", "top-1 %, 95 %", "lost / won", "MACs"]))
    plot(records, args.out)
    print(f"figures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
