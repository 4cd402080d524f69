"""``mpcompile visualize``: which patches of an image become one token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mpcompile
from mpcompile.cli.common import Commands, at_least, command, create, merging, merging_options, weights_options
from mpcompile.config import Config
from mpcompile.errors import InputError
from mpcompile.files import load_checkpoint


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "visualize",
        help="draw which patches of an image a timm model merges into one token",
        description="Merge tokens in a timm model and draw an image with its merged tokens outlined, block by block.",
        example="mpcompile visualize vit_small_patch16_224 --pretrained --image cat.jpg --out merged.png",
    )
    weights_options(job)
    merging_options(job, default=8)
    job.add_argument("--image", type=Path, required=True, metavar="FILE", help="any format that Pillow reads")
    job.add_argument("--out", type=Path, default=Path("merged.png"), metavar="FILE", help="(default merged.png)")
    job.add_argument("--seed", type=at_least(0), default=0, help="seeds weights that aren't loaded (default 0)")
    job.set_defaults(run=run)


def _open_image(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise InputError(
            f"can't read {path}", expected="an image file", found=error.strerror or str(error).split(" '")[0]
        ) from error


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the picture is written."""
    import numpy as np
    from timm.data import create_transform, resolve_model_data_config

    picture = _open_image(args.image)
    torch.manual_seed(args.seed)
    model = create(args.model, args.pretrained).eval()
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    data = resolve_model_data_config(model)
    image = create_transform(**data, is_training=False)(picture)
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    shown = (255 * (image * std + mean)).clamp(0, 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    config = Config(pattern="dense", **merging(args))
    tokens = mpcompile.visualize_merging(model, image, args.out, config, display=shown)
    counts = " -> ".join(str(len(np.unique(block))) for block in [np.arange(tokens[0].size), *tokens])
    print(f"{args.model}: {counts} patches and merged patches\n{args.out}")
    if not args.pretrained and args.checkpoint is None:
        print("note: random weights, so what merges means nothing")
    return 0
