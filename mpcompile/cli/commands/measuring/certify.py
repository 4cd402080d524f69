"""``mpcompile certify``: prove, image by image, which labels of a model survive pruning."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import mpcompile
from mpcompile.cli.models import class_names, load_source
from mpcompile.cli.options import (
    Commands,
    as_path,
    at_least,
    command,
    json_option,
    model_arguments,
    show,
    threads_option,
    weights_options,
)
from mpcompile.cli.streams import seen_before
from mpcompile.data.images import images_at
from mpcompile.errors import ArtifactError, InputError
from mpcompile.ir.module import IRModule
from mpcompile.sources.loading import kind_of, load_model


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "certify",
        help="prove, image by image, which labels a pruned model shares with the dense one",
        description="Compare a pruned model with the dense one and certify labels, image by image.",
        example="mpcompile certify vit_tiny_patch16_224 --checkpoint dense.safetensors --artifact pruned.mpc "
        "--images photos --samples 50",
    )
    weights_options(job)
    job.add_argument(
        "--artifact",
        type=as_path,
        required=True,
        metavar="FILE",
        help="the pruned model: an artifact of mpcompile, or a checkpoint of the same model",
    )
    job.add_argument(
        "--images",
        type=as_path,
        required=True,
        metavar="PATH",
        help="a folder of images (labelled if there is one folder per class, in the order of the classes), or an .npz "
        "file with uint8 'images' (N, H, W, 3) and, optionally, 'labels' (N)",
    )
    job.add_argument("--samples", type=at_least(1), default=100, help="images drawn at random (default 100)")
    job.add_argument(
        "--tiers",
        type=int,
        nargs="*",
        metavar="T",
        help="tiers of proof: 0 measured, 1 enclosure, 2 Jacobian (default all)",
    )
    job.add_argument(
        "--l1", type=float, default=0.0, help="lambda_1, the factor of |W|_1 in the training objective (default 0)"
    )
    job.add_argument("--l2", type=float, default=0.0, help="lambda_2, the factor of |W|_F^2 there (default 0)")
    job.add_argument(
        "--splits", type=at_least(1), default=4, help="pieces per segment; more pieces give tighter bounds (default 4)"
    )
    job.add_argument(
        "--confidence", type=float, default=0.95, help="confidence of statements about unseen images (default 0.95)"
    )
    threads_option(job)
    job.add_argument("--seed", type=at_least(0), default=0, help="seed of the drawn images (default 0)")
    json_option(job)
    job.set_defaults(run=run)


def _pruned(args: argparse.Namespace) -> nn.Module:
    """Return the pruned model: an artifact, or the dense model with the weights of a checkpoint."""
    path = args.artifact
    if path.suffix not in (".pt", ".pth"):
        try:
            return mpcompile.load(path).eval()
        except ArtifactError:
            if path.suffix != ".safetensors" or not path.is_file():
                raise
    options = {"input_size": args.input_size, "num_classes": args.num_classes, **model_arguments(args)}
    return load_model(args.model, checkpoint=path, **options).model


def run(args: argparse.Namespace) -> int:
    """Return 0 once the certificates are computed, whatever they say."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if kind_of(args.model) == "timm" and args.checkpoint is None and not args.pretrained:
        raise InputError("the dense weights are missing", expected="--checkpoint FILE or --pretrained", found="neither")
    sparse = _pruned(args)
    origin = sparse.plan.provenance if isinstance(sparse, IRModule) else {}
    loaded = load_source(args, origin)
    how: dict[str, Any] = {"samples": args.samples, "classes": loaded.num_classes, "seed": args.seed}
    images = images_at(args.images, loaded.data, names=class_names(origin, loaded), **how)
    options = {name: getattr(args, name) for name in ("tiers", "l1", "l2", "splits", "confidence")}
    report = mpcompile.certify(loaded.model, sparse, loaded.batches(images), progress=not args.quiet, **options)
    notes = "".join(f"\nnote: {note}" for note in filter(None, (*images.notes, seen_before(images, origin))))
    show(args, f"{args.model}, {images.count} images of {args.images}\n\n{report}{notes}", report.to_json(indent=1))
    return 0
