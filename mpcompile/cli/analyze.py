"""``mpcompile analyze``: the Marchenko-Pastur law fitted to every weight of a file or of a timm model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mpcompile
from mpcompile import verify as verifier
from mpcompile.cli.common import Commands, at_least, command, create, json_option, show
from mpcompile.errors import ConfigError
from mpcompile.files import load_checkpoint


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
    job.add_argument("target", help="name of a timm model, or a .mpc, .safetensors, .pt or .pth file")
    weights = job.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights for the timm model")
    job.add_argument("--plot", type=Path, metavar="FILE", help="draw all spectra on one page: .png, .pdf or .svg")
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch")
    job.add_argument("--seed", type=at_least(0), default=0, help="seeds weights that aren't loaded (default 0)")
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the weights were fitted, whatever they follow."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    path, random = Path(args.target), False
    source: Any
    if path.suffix in (".mpc", ".safetensors", ".pt", ".pth") or path.exists():
        if args.pretrained or args.checkpoint is not None:
            raise ConfigError(
                "a file brings its own weights", expected="--pretrained and --checkpoint with a timm model"
            )
        source = verifier.read(path)
    else:
        source = create(args.target, args.pretrained)
        random = not args.pretrained and args.checkpoint is None
        if args.checkpoint is not None:
            load_checkpoint(source, args.checkpoint)
    found = mpcompile.analyze(source, progress=False if args.quiet else None)
    if args.plot is not None:
        found.plot(args.plot)
    note = "\nnote: random weights, which are noise by construction" if random else ""
    show(args, f"{args.target}\n\n{found}{note}", found.to_json(indent=1))
    return 0
