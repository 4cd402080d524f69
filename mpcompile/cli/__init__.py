"""The command line, one module per command.

To add a command ``bake``, write ``mpcompile/cli/commands/bake.py`` with two functions:

- ``add(commands)`` declares the command with :func:`mpcompile.cli.options.command` (help, description, example), adds
  its options (:mod:`mpcompile.cli.options` has those that commands share, and the argument types of paths), declares
  the options that name an output with :func:`mpcompile.cli.destinations.declare`, and ends with
  ``job.set_defaults(run=run)``.
- ``run(args) -> int`` does the work, prints the result (with :func:`mpcompile.cli.options.show` if there is also JSON)
  and returns the exit status. Slow imports, and those that need an extra, go inside it. Models and checkpoints come
  from :mod:`mpcompile.cli.models`.

Then add ``"bake": "bake"`` to :data:`COMMANDS`. (Commands that only measure are in ``commands/measuring/``.) If it
writes JSON, :func:`mpcompile.io.ownership.is_ours` must recognise it, so that a second run may replace the file. Raise
errors that the user can fix as :class:`~mpcompile.errors.MPCompileError`: :func:`main` prints them in one line and
exits with status 2.
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

COMMANDS = {  # name -> module in commands/
    "analyze": "measuring.analyze",
    "optimize": "optimize",
    "compile": "compile",
    "audit": "measuring.audit",
    "verify": "measuring.verify",
    "explain": "measuring.explain",
    "visualize": "measuring.visualize",
    "certify": "measuring.certify",
    "distill": "distill",
    "export": "export",
    "report": "report",
    "demo": "demo",
    "env": "env",
}


class _Parser(argparse.ArgumentParser):
    """Reports invalid arguments in one printable line, whatever was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, LONGEST - len(self.prog)))


class _OneLine(logging.Formatter):
    """Formats a log record as one printable line."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), LONGEST)


def parser() -> argparse.ArgumentParser:
    """Return the argument parser, with one sub-command for each of :data:`COMMANDS`."""
    top = _Parser(prog="mpcompile", description=mpcompile.__doc__)
    top.add_argument("--version", action="version", version=f"mpcompile {mpcompile.__version__}")
    commands = top.add_subparsers(dest="job", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for module in COMMANDS.values():
        importlib.import_module(f"mpcompile.cli.commands.{module}").add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, as the console script does.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit status. 0: done; 1: the check that the command makes has failed (``verify``: a violation); 2: an error
        that the user can fix; 130: interrupted.

    Example:
        >>> main(["verify", "no-such-file.mpc", "--quiet"])
        2
    """
    args = parser().parse_args(argv)
    _set_up_terminal()
    log = logging.getLogger("mpcompile")
    before = log.level
    log.setLevel(logging.ERROR if args.quiet else logging.INFO if args.verbose else logging.WARNING)
    try:
        with _unwound_by_signals():
            check_destinations(args)
            status: int = args.run(args)
        return status
    except MPCompileError as error:
        if args.verbose:
            print(printable_lines(traceback.format_exc().rstrip()), file=sys.stderr)
        first, *attempts = str(error).split("\n")
        for attempt in attempts:  # before the error itself, which stays the last line
            print(f"mpcompile: {printable(attempt, LONGEST)}", file=sys.stderr)
        print(f"mpcompile: {printable(first, LONGEST)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mpcompile: interrupted", file=sys.stderr)
        return 130
    finally:
        log.setLevel(before)  # a caller from Python has its own log level


def _set_up_terminal() -> None:
    """Show log records as single lines, and escape characters that the terminal cannot encode."""
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine("%(message)s"))
        root.addHandler(handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the command, so that its temporary files are removed."""

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
