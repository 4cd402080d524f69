"""The command line, one module a command.

To add a command ``bake``, write ``mpcompile/cli/commands/bake.py`` with

- ``add(commands)``: declare it with :func:`mpcompile.cli.options.command` (help, a description and an example), add its
  options (those that several commands share are in :mod:`mpcompile.cli.options`), declare those that name a file to
  write with :func:`mpcompile.cli.destinations.declare`, and name what runs it with ``job.set_defaults(run=run)``,
- ``run(args) -> int``: do it, print what there is to read (with :func:`mpcompile.cli.options.show` where there is JSON,
  too), return the exit status; imports that take long or need an extra stand inside,

and put ``"bake"`` into :data:`COMMANDS`. Errors that the user can mend are raised as
:class:`~mpcompile.errors.MPCompileError`; :func:`main` prints them in one line and exits with status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import mpcompile
from mpcompile.cli.destinations import check_destinations
from mpcompile.errors import LONGEST, MPCompileError, printable, printable_lines

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


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a call in one printable line, whatever was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, LONGEST - len(self.prog)))


class _OneLine(logging.Formatter):
    """Log records as printable lines."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LONGEST)


def parser() -> argparse.ArgumentParser:
    """The argument parser, one sub-command for each of :data:`COMMANDS`."""
    top = _Parser(prog="mpcompile", description=mpcompile.__doc__)
    top.add_argument("--version", action="version", version=f"mpcompile {mpcompile.__version__}")
    commands = top.add_subparsers(dest="job", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name in COMMANDS:
        importlib.import_module(f"mpcompile.cli.commands.{name}").add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Exit status 0: done; 1: the command found something wrong (``verify``: a
    violation); 2: something the user can mend; 130: interrupted."""
    args = parser().parse_args(argv)
    _to_terminal()
    log = logging.getLogger("mpcompile")
    before = log.level
    log.setLevel(logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING)
    try:
        with _ended_orderly():
            check_destinations(args)
            status: int = args.run(args)
        return status
    except MPCompileError as error:
        if args.verbose:
            print(printable_lines(traceback.format_exc().rstrip()), file=sys.stderr)
        print(f"mpcompile: {printable(error, LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mpcompile: interrupted", file=sys.stderr)
        return 130
    finally:
        log.setLevel(before)  # whoever calls this from Python has levels of their own


def _to_terminal() -> None:
    """Log records are shown as single lines; what a terminal's encoding lacks is escaped."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine("%(message)s"))
        root.addHandler(handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _ended_orderly() -> Iterator[None]:
    """A request to end (SIGTERM, SIGHUP) unwinds the command, so that its temporary files are removed."""

    def end(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, end) for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
