"""Names of files in messages, and regular files that a user passes as input."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from mpcompile import errors
from mpcompile.errors import InputError
from mpcompile.io import reading

_SHOWN = 240  # maximum characters of a path in a message


def printable(name: object) -> str:
    """Return a name as one printable line: control characters are escaped, and a long name loses its middle."""
    return errors.printable(name, _SHOWN)


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return the first names for a message, those with surrounding spaces in quotes."""
    names = list(names)
    shown = (printable(name)[:40] if name == name.strip() else repr(printable(name)) for name in names[:most])
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def open_regular(path: Path | str, expected: str, what: str = "") -> BinaryIO:
    """Open a file that a user passed as input; see :func:`mpcompile.io.reading.open_regular`.

    Args:
        path: the file, or a link to it.
        expected: description of a valid file, for the error.
        what: word for the file in the error, such as "the class map".

    Raises:
        InputError: the file is missing, cannot be opened, or is not a regular file.
    """
    try:
        return reading.open_regular(path)
    except OSError as error:
        named = f"cannot read {what} {printable(path)}" if what else f"cannot read {printable(path)}"
        raise InputError(named, expected=expected, found=error.strerror or printable(error)) from error
