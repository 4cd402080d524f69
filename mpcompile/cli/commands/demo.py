"""``mpcompile demo``: the whole job on real data."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpcompile.cli.destinations import declare
from mpcompile.cli.options import Commands, as_path, at_least, command
from mpcompile.errors import printable_lines


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "demo",
        help="train, prune, merge, distil and compile a small vision transformer on real digits",
        description="Train a small vision transformer on scanned digits, then transform, distil, compile and audit it.",
        example="mpcompile demo --quick --out digits",
    )
    job.add_argument("--quick", action="store_true", help="a smaller model and fewer epochs, for a first look")
    job.add_argument("--seed", type=at_least(0), default=0, help="seeds split, weights and batches (default 0)")
    job.add_argument("--out", type=as_path, default=Path("mpcompile-demo"), help="folder for the results as files")
    declare(job, out=("digits.mpc", "report.json", "plan.json", "analysis.json", "analysis.png"))
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch (default: its own choice)")
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when it went through, whatever it measured."""
    from mpcompile.cli import demo_job as demo

    print(printable_lines(demo.run(demo.Demo(args.quick, args.seed, args.out, args.threads, not args.quiet))))
    return 0
