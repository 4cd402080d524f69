"""The command line, one module a command.

To add a command ``bake``, write ``mpcompile/cli/bake.py`` with

- ``add(commands)``: declare it with :func:`mpcompile.cli.common.command` (help, a description and an example), add its
  options (those that several commands share are in :mod:`mpcompile.cli.common`), and name what runs it with
  ``job.set_defaults(run=run)``,
- ``run(args) -> int``: do it, print what there is to read (with :func:`mpcompile.cli.common.show` where there is JSON,
  too), return the exit status; imports that take long or need an extra stand inside,

and put ``"bake"`` into :data:`COMMANDS`. Errors that the user can mend are raised as
:class:`~mpcompile.errors.MPCompileError`; :func:`main` prints them in one line and exits with status 2.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import traceback
from collections.abc import Sequence

import mpcompile
from mpcompile.errors import MPCompileError

COMMANDS = (
    "analyze",
    "compile",
    "audit",
    "verify",
    "explain",
    "visualize",
    "certify",
    "distill",
    "export",
    "report",
    "demo",
)


def parser() -> argparse.ArgumentParser:
    """The argument parser, one sub-command for each of :data:`COMMANDS`."""
    top = argparse.ArgumentParser(prog="mpcompile", description=mpcompile.__doc__)
    top.add_argument("--version", action="version", version=f"mpcompile {mpcompile.__version__}")
    commands = top.add_subparsers(dest="job", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name in COMMANDS:
        importlib.import_module(f"mpcompile.cli.{name}").add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Exit status 0: done; 1: the command found something wrong (``verify``: a
    violation); 2: something the user can mend; 130: interrupted."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    log = logging.getLogger("mpcompile")
    before = log.level
    log.setLevel(logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING)
    try:
        status: int = args.run(args)
        return status
    except MPCompileError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"mpcompile: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mpcompile: interrupted", file=sys.stderr)
        return 130
    finally:
        log.setLevel(before)  # whoever calls this from Python has levels of their own
