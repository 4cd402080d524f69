"""Which tokens merge, and in which blocks: what each choice costs a real model that is not trained, at equal MACs.

    python -m bench.tokens.pairs --data FOLDER
    python -m bench.tokens.pairs --tables                  # the tables of docs/token_merging.md, from the JSON file

FOLDER holds the weights and image files that ``bench.tokens.accuracy`` reads. For every method (``tome_method``),
schedule (``tome_schedule``) and share of multiply-accumulates to save, tokens are merged until the share is saved; what
dead tokens save is counted in it. Per set of images: images classified correctly, images whose class differs from the
dense model's, and the Kullback-Leibler divergence of the dense model's probabilities from the merged ones', in
nats, with its standard error. The divergence uses no labels and is less noisy than counts. Each choice is compared with
ToMe at a constant number of tokens per block: images that only one of both classifies correctly, and the mean
difference of the divergences with its standard error, image by image.

The first set of images was used to choose the method's weights and the schedule, the second for no choice.

Results go into token_pairs.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import Tensor, nn

from bench import common
from bench.tokens.accuracy import MODEL, images_of
from mpcompile import Config, transform

NAME = "token_pairs"
CHOSEN_ON, REPORTED_ON = "imagenet_sample_500_dev", "nips2017_ccby_500_dev"
METHODS = ("tome", "saliency")
SCHEDULES = ("constant", "parabolic", "auto")  # the last without data
REFERENCE = ("tome", "constant")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says to each image of a set.

    Attributes:
        right: (N,) True if the image is classified correctly.
        changed: (N,) True if the class differs from the dense model's.
        divergence: (N,) of the dense model's probabilities from these, in nats.
    """

    right: Tensor
    changed: Tensor
    divergence: Tensor


@torch.no_grad()
def log_probabilities(model: nn.Module, images: Tensor, batch: int) -> Tensor:
    """The logarithms of the class probabilities, (N, classes) in fp64."""
    return torch.cat([model(chunk).double().log_softmax(-1) for chunk in images.split(batch)])


def answer(found: Tensor, dense: Tensor, labels: Tensor) -> Answer:
    """Compare log-probabilities (N, classes) with the dense model's, and with labels (N,)."""
    classes = found.argmax(-1)
    divergence = (dense.exp() * (dense - found)).sum(-1)
    return Answer(classes == labels, classes != dense.argmax(-1), divergence)


def mean(values: Tensor) -> dict[str, float]:
    """``mean`` and ``error``, the standard error of the mean."""
    return {"mean": float(values.mean()), "error": float(values.std() / len(values) ** 0.5)}


def record(found: Answer, reference: Answer) -> dict[str, Any]:
    """The figures of one choice, beside those of the reference on the same images."""
    return {
        "right": int(found.right.sum()),
        "changed": int(found.changed.sum()),
        "divergence": mean(found.divergence),
        "won": int((found.right & ~reference.right).sum()),
        "lost": int((~found.right & reference.right).sum()),
        "divergence_difference": mean(found.divergence - reference.divergence),
    }


def merged(model: nn.Module, method: str, schedule: str, reduction: float) -> Any:
    config = Config(
        pattern="dense", tome_r="auto", tome_reduction=reduction, tome_schedule=schedule, tome_method=method
    )
    return transform(model, torch.zeros(1, 3, 224, 224), config)


def measure(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per set of images, share to save, method and schedule, the reference first."""
    sets = {name: tuple(t[: args.limit] for t in images_of(args.data / f"{name}.npz")) for name in args.images}
    dense = {name: log_probabilities(model, images, args.batch) for name, (images, _) in sets.items()}
    found: dict[tuple[str, float], Answer] = {}
    records = []
    for reduction in args.reduction:
        choices = [REFERENCE, *((m, s) for m in args.methods for s in args.schedules if (m, s) != REFERENCE)]
        for method, schedule in choices:
            gm = merged(model, method, schedule, reduction)
            macs, tokens = gm.plan.macs, gm.plan.tokens
            for name, (images, labels) in sets.items():
                one = answer(log_probabilities(gm, images, args.batch), dense[name], labels)
                if (method, schedule) == REFERENCE:
                    found[name, reduction] = one
                line = {
                    "images": name,
                    "of": len(labels),
                    "dense_right": int((dense[name].argmax(-1) == labels).sum()),
                    "reduction": reduction,
                    "method": method,
                    "schedule": schedule,
                    "tokens": tokens,
                    "macs_ratio": macs.executed / macs.dense,
                    "matching_ratio": macs.matching / macs.dense,
                    **record(one, found[name, reduction]),
                }
                records.append(line)
                shown = f"{line['right']} right, divergence {line['divergence']['mean']:.4f}"
                print(name, f"-{reduction:.0%}", method, schedule, shown, file=sys.stderr, flush=True)
    return records


def row(line: dict[str, Any]) -> list[str]:
    """One line of a table."""
    is_reference = (line["method"], line["schedule"]) == REFERENCE
    paired, difference = f"+{line['won']} -{line['lost']}", line["divergence_difference"]
    return [
        f"{1 - line['macs_ratio']:.1%}",
        f"`{line['method']}`",
        line["schedule"],
        f"{line['divergence']['mean']:.4f}",
        "" if is_reference else f"{difference['mean']:+.4f} ± {difference['error']:.4f}",
        str(line["changed"]),
        str(line["right"]),
        "" if is_reference else paired,
    ]


def tables(data: dict[str, Any]) -> dict[str, str]:
    """Name of a set of images -> its table in Markdown."""
    head = ["MACs saved", "method", "schedule", "KL", "KL against ToMe", "changed", "right", "against ToMe"]
    sets = list(dict.fromkeys(line["images"] for line in data["records"]))
    aligned = ("right", "left", "left", *["right"] * 5)
    return {
        name: tabulate(
            [row(line) for line in data["records"] if line["images"] == name],
            headers=head,
            tablefmt="github",
            disable_numparse=True,
            colalign=aligned,
        )
        for name in sets
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="weights and images")
    parser.add_argument("--tables", action="store_true", help="print the tables of an earlier run")
    parser.add_argument("--images", nargs="+", default=[CHOSEN_ON, REPORTED_ON], help="(%(default)s)")
    parser.add_argument("--reduction", type=float, nargs="+", metavar="SHARE", help="(0.26 0.42 0.5)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="(%(default)s)")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), help="(%(default)s)")
    parser.add_argument("--limit", type=int, help="images of each set (all)")
    parser.add_argument("--batch", type=int, default=25, help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    common.fill(args, {"reduction": [0.26, 0.42, 0.5], "limit": None}, {"reduction": [0.26], "limit": 50})
    if args.tables:
        data = json.loads((args.out / f"{NAME}.json").read_text(encoding="utf-8"))
        print("\n\n".join(f"{name}:\n\n{text}" for name, text in tables(data).items()))
        return 0
    if args.data is None:
        parser.error("--data is required, or --tables")
    torch.set_num_threads(args.threads)
    model = timm.create_model(MODEL).eval()
    weights = load_file(args.data / f"{MODEL}_fp16.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    data = {
        "model": MODEL,
        "environment": {**common.environment(), "timm": timm.__version__},
        "chosen_on": CHOSEN_ON,
        "reported_on": REPORTED_ON,
        "records": measure(model, args),
    }
    path = common.save(NAME, data, args.out)
    print("\n\n".join(f"{name}:\n\n{text}" for name, text in tables(data).items()))
    print(f"figures: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
