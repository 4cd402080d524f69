"""``mpcompile certify``: what pruning a timm model can't have changed, image by image."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpcompile
from mpcompile.cli.options import (
    Commands,
    at_least,
    class_names,
    command,
    create_with,
    json_option,
    load_model,
    show,
    weights_options,
)
from mpcompile.cli.streams import seen_before
from mpcompile.data.images import data_config, images_at
from mpcompile.errors import ArtifactError, InputError
from mpcompile.ir.module import IRModule


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "certify",
        help="prove for single images what a pruned timm model leaves as the dense one had it",
        description="Compare a pruned with the dense timm model and certify labels, image by image.",
        example="mpcompile certify vit_tiny_patch16_224 --checkpoint dense.safetensors --artifact pruned.mpc "
        "--images photos --samples 50",
    )
    weights_options(job)
    job.add_argument(
        "--artifact",
        type=Path,
        required=True,
        metavar="FILE",
        help="the pruned model: what mpcompile.save wrote, or a checkpoint of the same timm model",
    )
    job.add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="PATH",
        help="a folder of images (one folder a class, in the order of the classes, gives labels), or an .npz file with "
        "uint8 'images' (N, H, W, 3) and, if known, 'labels' (N)",
    )
    job.add_argument("--samples", type=at_least(1), default=100, help="images drawn at random (default 100)")
    job.add_argument(
        "--tiers", type=int, nargs="*", metavar="T", help="0 measured, 1 enclosure, 2 Jacobian (default all)"
    )
    job.add_argument("--l1", type=float, default=0.0, help="lambda_1 of the training objective (default 0)")
    job.add_argument("--l2", type=float, default=0.0, help="lambda_2, the factor of |W|_F^2 (default 0)")
    job.add_argument(
        "--splits", type=at_least(1), default=4, help="parts of each segment: more are tighter (default 4)"
    )
    job.add_argument("--confidence", type=float, default=0.95, help="of statements about unseen images (default 0.95)")
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch")
    job.add_argument("--seed", type=at_least(0), default=0, help="seeds which images are drawn (default 0)")
    json_option(job)
    job.set_defaults(run=run)


def _pruned(path: Path, name: str, classes: int | None) -> nn.Module:
    """What mpcompile.save wrote, or the timm model with weights of a checkpoint."""
    if path.suffix not in (".pt", ".pth"):
        try:
            return mpcompile.load(path).eval()
        except ArtifactError:
            if path.suffix != ".safetensors" or not path.is_file():
                raise
    return create_with(name, False, path, None, classes)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the certificates were computed, whatever they say."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.checkpoint is None and not args.pretrained:
        raise InputError("the dense weights are missing", expected="--checkpoint FILE or --pretrained", found="neither")
    sparse = _pruned(args.artifact, args.model, args.num_classes)
    made = sparse.plan.provenance if isinstance(sparse, IRModule) else {}
    dense = load_model(args, made)
    classes = getattr(dense, "num_classes", 0)
    how: dict[str, Any] = {"samples": args.samples, "classes": classes, "names": class_names(made), "seed": args.seed}
    found = images_at(args.images, data_config(dense), **how)
    options = {name: getattr(args, name) for name in ("tiers", "l1", "l2", "splits", "confidence")}
    report = mpcompile.certify(dense, sparse, found, progress=not args.quiet, **options)
    notes = "".join(f"\nnote: {note}" for note in filter(None, (*found.notes, seen_before(found, made))))
    show(args, f"{args.model}, {found.count} images of {args.images}\n\n{report}{notes}", report.to_json(indent=1))
    return 0
