"""``mpcompile report``: put the results of the other commands on one HTML page."""

from __future__ import annotations

import argparse

from mpcompile.cli.destinations import FILE, check_ending, declare
from mpcompile.cli.options import Commands, as_path, as_path_text, command
from mpcompile.errors import ConfigError, printable
from mpcompile.page.sources import Sources, read_json

READ = ("audit", "explain", "analyze", "certify", "optimize")


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "report",
        help="make one self-contained HTML page from an artifact and the results of other commands",
        description="Make one HTML page: frontier, gains, comparison with dense, spectra, masks, merged tokens, "
        "certificates, time per layer, environment. It fetches nothing. A section without data names the command that "
        "produces it.",
        example="mpcompile report pruned.mpc --audit audit.json --explain explain.json --image cat.jpg "
        "--out report.html",
    )
    text = "file or folder from mpcompile compile or mpcompile.save"
    job.add_argument("artifact", type=as_path, nargs="?", help=text)
    for name in READ:
        job.add_argument(f"--{name}", type=as_path, metavar="FILE", help=f"output of mpcompile {name} --json FILE")
    text = "images in which merged tokens are drawn"
    job.add_argument("--image", type=as_path, nargs="*", default=[], metavar="FILE", help=text)
    job.add_argument("--title", default="", help="heading of the page (default: the model's name)")
    text = "HTML file (default report.html)"
    job.add_argument("--out", type=as_path_text, default="report.html", metavar="FILE", help=text)
    declare(job, out=FILE)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the page is written."""
    from mpcompile import page

    check_ending(args.out, ".html", ".htm")
    found = {name: read_json(getattr(args, name), name) for name in READ}
    if args.artifact is None and not any(found.values()):
        raise ConfigError("there is nothing to report", hint="give an artifact, or --audit FILE")
    if args.image and args.artifact is None:
        raise ConfigError("--image needs an artifact", hint="the page shows how the artifact merges tokens")
    sources = Sources(found["audit"], found["explain"], found["analyze"], found["certify"], optimize=found["optimize"])
    if args.artifact is not None:
        page.add_artifact(sources, args.artifact, args.image)
    page.write(args.out, sources, args.title)
    print(printable(args.out))
    return 0
