"""``mpcompile report``: one HTML page of what the other commands found."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import mpcompile
from mpcompile.artifact.container import PLAN, WEIGHTS
from mpcompile.cli.destinations import FILE, declare
from mpcompile.cli.options import Commands, command
from mpcompile.errors import ConfigError, printable
from mpcompile.page.sources import Sources, read_json

READ = ("audit", "explain", "analyze", "certify")


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "report",
        help="make one self-contained HTML page of an artifact and what other commands found",
        description="Make one HTML page: what was gained, against dense, spectra, masks, merged tokens, certificates, "
        "where time goes, environment. It fetches nothing. What wasn't given is said, with the command that gives it.",
        example="mpcompile report pruned.mpc --audit audit.json --explain explain.json --image cat.jpg "
        "--out report.html",
    )
    job.add_argument("artifact", type=Path, nargs="?", help="what mpcompile compile or mpcompile.save wrote")
    for name in READ:
        job.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"what mpcompile {name} --json FILE wrote")
    job.add_argument("--image", type=Path, nargs="*", default=[], metavar="FILE", help="show how its tokens merge")
    job.add_argument("--title", default="", help="heading of the page (default: the model's name)")
    job.add_argument("--out", default="report.html", metavar="FILE", help="(default report.html)")
    declare(job, out=FILE)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the page is written."""
    from mpcompile import page

    audit, explain, analyze, certify = (read_json(getattr(args, name), name) for name in READ)
    if args.artifact is None and not any((audit, explain, analyze, certify)):
        raise ConfigError("there is nothing to report", hint="give an artifact, or --audit FILE")
    if args.image and args.artifact is None:
        raise ConfigError("--image needs an artifact", hint="it shows how that one merges tokens")
    sources = Sources(audit, explain, analyze, certify)
    if args.artifact is not None:
        gm = mpcompile.load(args.artifact).eval()
        sources.dense_size = sum(p.numel() * p.element_size() for p in gm.parameters())
        sources.artifact = gm.float()  # a CPU is slow in half precision, or refuses
        sources.name = args.artifact.name
        files = [args.artifact / WEIGHTS, args.artifact / PLAN] if args.artifact.is_dir() else [args.artifact]
        sources.size = sum(p.stat().st_size for p in files if p.is_file())
        alike = Counter(path.name for path in args.image)
        sources.pictures = {
            str(path) if alike[path.name] > 1 else path.name: page.pictures(sources.artifact, path)
            for path in args.image
        }
    page.write(args.out, sources, args.title)
    print(printable(args.out))
    return 0
