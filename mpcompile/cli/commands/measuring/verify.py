"""``mpcompile verify``: check which weights of a file or a model are legal N:M."""

from __future__ import annotations

import argparse
import fnmatch
from pathlib import Path
from typing import Any

from mpcompile.artifact import verify as verifier
from mpcompile.cli.models import load_source
from mpcompile.cli.options import MODEL, Commands, as_path_text, command, json_option, show, source_options
from mpcompile.errors import ConfigError
from mpcompile.sources.loading import is_weights


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "verify",
        help="check which weights of a file or a model are legal N:M",
        description="Check which weights of a file or a model are legal N:M, and show where the others break it.",
        example="mpcompile verify pruned.mpc\nmpcompile verify checkpoint.safetensors --pattern 2:4",
    )
    text = f"path of an artifact or checkpoint (a file or a folder), or a model: {MODEL}"
    job.add_argument("model", type=as_path_text, metavar="TARGET", help=text)
    job.add_argument("--pattern", help="N:M to check all weights against (default: masked layers against their own)")
    job.add_argument(
        "--only", nargs="*", default=["*"], metavar="GLOB", help="check only weights whose name matches (default all)"
    )
    source_options(job)
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 if every weight meets its pattern, else 1."""
    source: Any
    if is_weights(args.model):
        source = verifier.read(Path(args.model))
    else:
        source = load_source(args).model
    verification = verifier.verify(source, args.pattern)
    chosen = {k: v for k, v in verification.verdicts.items() if any(fnmatch.fnmatch(k, glob) for glob in args.only)}
    if not chosen:
        raise ConfigError(
            "--only matches no weight", expected=", ".join(list(verification.verdicts)[:8]), found=args.only
        )
    verification = verifier.Verification(chosen)
    show(args, verification, verification.to_json(indent=1))
    return 0 if verification.ok else 1
