"""``mpcompile verify``: which weights of a file or of a timm model are legally N:M."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path
from typing import Any

from mpcompile.artifact import verify as verifier
from mpcompile.cli.options import Commands, command, create, json_option, names_file, show
from mpcompile.errors import ConfigError


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "verify",
        help="check which weights of a file or a timm model are legally N:M",
        description="Check stored weights, of a file or a timm model: which are legally N:M, which break it where.",
        example="mpcompile verify pruned.mpc\nmpcompile verify checkpoint.safetensors --pattern 2:4",
    )
    job.add_argument("target", help="an artifact or checkpoint (a file or a folder), or the name of a timm model")
    job.add_argument("--pattern", help="N:M that all weights are held to (default: masked layers to their own)")
    job.add_argument("--only", nargs="*", default=["*"], metavar="GLOB", help="names of weights (default all)")
    job.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when every weight meets the pattern that it is held to, else 1."""
    source: Any
    if names_file(args.target):
        source = verifier.read(Path(args.target))
    else:
        source = create(args.target, args.pretrained)
    found = verifier.verify(source, args.pattern)
    chosen = {k: v for k, v in found.verdicts.items() if any(fnmatch.fnmatch(k, glob) for glob in args.only)}
    if not chosen:
        raise ConfigError("--only names no weight", expected=", ".join(list(found.verdicts)[:8]), found=args.only)
    found = verifier.Verification(chosen)
    show(args, found, found.to_json(indent=1))
    return 0 if found.ok else 1
