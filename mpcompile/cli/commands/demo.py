"""``mpcompile demo``: run the whole job on real data."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpcompile.cli.destinations import declare
from mpcompile.cli.options import Commands, as_path, at_least, command, threads_option
from mpcompile.errors import printable_lines

_ARTIFACT = ("digits.mpc", "digits.runner.json", "digits.onnx")
_TABLES = ("report.html", "report.json", "frontier.json", "plan.json", "analysis.json", "analysis.png")


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "demo",
        help="train a small vision transformer on real digits, and find its fastest build",
        description="Train a small vision transformer on scanned digits, search for the fastest build that keeps its "
        "accuracy, audit that on scans that nothing has seen, and write an HTML report. Ends with a summary; --verbose "
        "prints the tables, too.",
        example="mpcompile demo --quick --out digits",
    )
    job.add_argument("--quick", action="store_true", help="a smaller model and fewer epochs, for a first look")
    job.add_argument("--seed", type=at_least(0), default=0, help="seed of split, weights and batches (default 0)")
    job.add_argument(
        "--out", type=as_path, default=Path("mpcompile-demo"), help="folder for the results (default mpcompile-demo)"
    )
    declare(job, out=_ARTIFACT + _TABLES)
    threads_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the job is done, whatever it measured."""
    from mpcompile.cli import demo_job

    demo = demo_job.Demo(args.quick, args.seed, args.out, args.threads, not args.quiet, args.verbose)
    print(printable_lines(demo_job.run(demo)))
    return 0
