"""Regular files only, and names of files as they can be printed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from mpcompile.errors import InputError

_SHOWN = 240  # characters of a path in a message
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def printable(name: object) -> str:
    """A name in one printable line: control characters are escaped, and the middle of a long one is left out."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    return text if len(text) <= _SHOWN else f"{text[:40]}...{text[43 - _SHOWN :]}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of some names for a message; one with spaces around it in quotes, or they wouldn't show."""
    names = list(names)
    shown = (printable(name)[:40] if name == name.strip() else repr(printable(name)) for name in names[:most])
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def kind_of(mode: int) -> str:
    """What a file is, for a message, from the mode that ``stat`` gives."""
    return "a folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(path: Path | str, expected: str, what: str = "") -> BinaryIO:
    """Open a regular file for reading. Nothing else is opened: a FIFO would be waited for, a device may do anything.

    Args:
        path: the file, or a link to it.
        expected: what it should be, for the error.
        what: what it is called there, before its name, if anything.

    Raises:
        InputError: it is missing, can't be opened, or is something else.
    """
    named = f"can't read {what} {printable(path)}" if what else f"can't read {printable(path)}"
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            # What stands there may be another file by now, so that the check is repeated on what was opened.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
            descriptor = os.open(path, flags)
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISREG(mode):
                return open(descriptor, "rb")
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or printable(error)
        raise InputError(named, expected=expected, found=reason) from error
    raise InputError(named, expected=expected, found=kind_of(mode))
