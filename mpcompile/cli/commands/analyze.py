"""``mpcompile analyze``: the Marchenko-Pastur law fitted to every weight of a file or of a timm model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mpcompile
from mpcompile.artifact import verify as verifier
from mpcompile.cli.destinations import FILE, declare
from mpcompile.cli.models import create_with, names_file
from mpcompile.cli.options import (
    Commands,
    as_path_text,
    at_least,
    command,
    json_option,
    show,
    source_options,
    threads_option,
)
from mpcompile.errors import ConfigError
from mpcompile.rmt.analysis import check_plot


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "analyze",
        help="fit the Marchenko-Pastur law to the weights of a timm model or a file: how much is noise",
        description="Fit the Marchenko-Pastur law to every weight: noise level, edge, spikes, goodness of fit.",
        example="mpcompile analyze vit_base_patch16_224 --pretrained --json analysis.json --plot analysis.png\n"
        "mpcompile analyze checkpoint.safetensors",
    )
    text = "name of a timm model, or path of an artifact or checkpoint (a file or a folder)"
    job.add_argument("target", type=as_path_text, help=text)
    source_options(job)
    job.add_argument(
        "--plot", type=as_path_text, metavar="FILE", help="draw all spectra on one page: .png, .pdf or .svg"
    )
    declare(job, plot=FILE)
    threads_option(job)
    job.add_argument("--seed", type=at_least(0), default=0, help="seed of random weights (default 0)")
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the weights are fitted, whatever the fits say."""
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
                "a file has its own weights", expected="--pretrained or --checkpoint with the name of a timm model"
            )
        source = verifier.read(Path(args.target))
    else:
        source = create_with(args.target, args.pretrained, args.checkpoint, None, None)
        random = not args.pretrained and args.checkpoint is None
    analysis = mpcompile.analyze(source, progress=False if args.quiet else None)
    if args.plot is not None:
        analysis.plot(args.plot)
    note = "\nnote: random weights, which are noise by construction" if random else ""
    show(args, f"{args.target}\n\n{analysis}{note}", analysis.to_json(indent=1))
    return 0
