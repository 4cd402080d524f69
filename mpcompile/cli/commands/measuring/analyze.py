"""``mpcompile analyze``: the Marchenko-Pastur law fitted to every weight of a file or of a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mpcompile
from mpcompile.artifact import verify as verifier
from mpcompile.cli.destinations import FILE, declare
from mpcompile.cli.models import load_source
from mpcompile.cli.options import (
    MODEL,
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
from mpcompile.sources.loading import is_weights


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "analyze",
        help="fit the Marchenko-Pastur law to the weights of a model or a file: how much is noise",
        description="Fit the Marchenko-Pastur law to every weight: noise level, edge, spikes, goodness of fit.",
        example="mpcompile analyze vit_base_patch16_224 --pretrained --json analysis.json --plot analysis.png\n"
        "mpcompile analyze checkpoint.safetensors",
    )
    text = f"path of an artifact or checkpoint (a file or a folder), or a model: {MODEL}"
    job.add_argument("model", type=as_path_text, metavar="TARGET", help=text)
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
    if is_weights(args.model):
        if args.pretrained or args.checkpoint is not None:
            raise ConfigError(
                "a file has its own weights", expected="--pretrained or --checkpoint with the name of a model"
            )
        source = verifier.read(Path(args.model))
    else:
        loaded = load_source(args)
        source, random = loaded.model, loaded.random
    analysis = mpcompile.analyze(source, progress=False if args.quiet else None)
    if args.plot is not None:
        analysis.plot(args.plot)
    note = "\nnote: random weights, which are noise by construction" if random else ""
    show(args, f"{args.model}\n\n{analysis}{note}", analysis.to_json(indent=1))
    return 0
