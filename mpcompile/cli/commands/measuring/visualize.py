"""``mpcompile visualize``: draw which patches of an image become one token."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
import torch

import mpcompile
from mpcompile.cli.destinations import FILE, check_ending, declare
from mpcompile.cli.models import load_source
from mpcompile.cli.options import (
    Commands,
    as_path,
    as_path_text,
    command,
    config_of,
    config_options,
    seed_option,
    weights_options,
)
from mpcompile.data.images import open_image, preprocess, shown
from mpcompile.errors import printable, printable_lines


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "visualize",
        help="draw which patches of an image a model merges into one token",
        description="Merge tokens in a model and draw an image with its merged tokens outlined, block by block.",
        example="mpcompile visualize vit_small_patch16_224 --pretrained --image cat.jpg --out merged.png",
    )
    weights_options(job)
    job.add_argument(
        "--image", type=as_path, required=True, metavar="FILE", help="image in any format that Pillow reads"
    )
    job.add_argument(
        "--out", type=as_path_text, default="merged.png", metavar="FILE", help="PNG file (default merged.png)"
    )
    declare(job, out=FILE)
    merging = ("tome_r", "tome_method", "tome_schedule", "tome_reduction", "tome_proportional", "prefix_tokens")
    seed_option(job)
    config_options(job, *merging, tome_r=8)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the picture is written."""
    check_ending(args.out, ".png")
    config = dataclasses.replace(config_of(args), pattern="dense")
    picture = open_image(args.image)
    torch.manual_seed(args.seed)
    loaded = load_source(args)
    loaded.check_takes_images()
    image = preprocess(loaded.data)(picture)
    tokens = mpcompile.visualize_merging(loaded.model, image, args.out, config, display=shown(image, loaded.data))
    counts = " -> ".join(str(len(np.unique(block))) for block in [np.arange(tokens[0].size), *tokens])
    print(printable_lines(f"{args.model}: {counts} patches and merged patches"), printable(args.out), sep="\n")
    if loaded.random:
        print("note: random weights, so the merging means nothing")
    return 0
