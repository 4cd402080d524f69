"""Names of files as they stand in messages, and regular files as the images of a user."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from mpcompile import errors
from mpcompile.errors import InputError
from mpcompile.io import reading

_SHOWN = 240  # characters of a path in a message


def printable(name: object) -> str:
    """A name in one printable line: control characters are escaped, and the middle of a long one is left out."""
    return errors.printable(name, _SHOWN)


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names for a message; one with spaces around it in quotes, or they wouldn't show."""
    names = list(names)
    shown = (printable(name)[:40] if name == name.strip() else repr(printable(name)) for name in names[:most])
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def open_regular(path: Path | str, expected: str, what: str = "") -> BinaryIO:
    """As :func:`mpcompile.io.reading.open_regular`, for what a user gave as input.

    Args:
        path: the file, or a link to it.
        expected: what it should be, for the error.
        what: what it is called there, before its name, if anything.

    Raises:
        InputError: it is missing, can't be opened, or is something else than a regular file.
    """
    try:
        return reading.open_regular(path)
    except OSError as error:
        named = f"can't read {what} {printable(path)}" if what else f"can't read {printable(path)}"
        raise InputError(named, expected=expected, found=error.strerror or printable(error)) from error
