"""``mpcompile analyze``: the Marchenko-Pastur law fitted to every weight of a file or of a timm model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mpcompile
from mpcompile.artifact import verify as verifier
from mpcompile.cli.destinations import FILE, declare
from mpcompile.cli.options import (
    Commands,
    at_least,
    command,
    create_with,
    json_option,
    names_file,
    show,
    source_options,
)
from mpcompile.errors import ConfigError
from mpcompile.rmt.analysis import check_plot


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "analyze",
        help="how much of each weight is noise: the Marchenko-Pastur law fitted to a timm model or a file",
        description="Fit the Marchenko-Pastur law to every weight: noise level, edge, spikes, goodness of fit.",
        example="mpcompile analyze vit_base_patch16_224 --pretrained --json analysis.json --plot analysis.png\n"
        "mpcompile analyze checkpoint.safetensors",
    )
    job.add_argument("target", help="name of a timm model, or an artifact or checkpoint: a file or a folder")
    source_options(job)
    job.add_argument("--plot", metavar="FILE", help="draw all spectra on one page: .png, .pdf or .svg")
    declare(job, plot=FILE)
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch")
    job.add_argument("--seed", type=at_least(0), default=0, help="seeds weights that aren't loaded (default 0)")
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the weights were fitted, whatever they follow."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.plot is not None:
        check_plot(args.plot)
    random = False
    source: Any
    if names_file(args.target):
        if args.pretrained or args.checkpoint is not None:
            raise ConfigError(
                "a file brings its own weights", expected="--pretrained and --checkpoint with a timm model"
            )
        source = verifier.read(Path(args.target))
    else:
        source = create_with(args.target, args.pretrained, args.checkpoint, None, None)
        random = not args.pretrained and args.checkpoint is None
    found = mpcompile.analyze(source, progress=False if args.quiet else None)
    if args.plot is not None:
        found.plot(args.plot)
    note = "\nnote: random weights, which are noise by construction" if random else ""
    show(args, f"{args.target}\n\n{found}{note}", found.to_json(indent=1))
    return 0
