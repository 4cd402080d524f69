"""Reading: only regular files are opened, and JSON is bounded in size and nesting.

Every file that mpcompile reads for a user goes through :func:`open_regular`, so that a FIFO or a device cannot make it
wait.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from mpcompile.errors import ArtifactError

LARGEST_TEXT = 1 << 28  # bytes of the largest text or JSON file that is read
_MAX_NESTING = 64  # levels of nesting in JSON
_MAX_DIGITS = 20  # characters of an integer in JSON
_CHUNK = 1 << 20  # bytes hashed at a time
_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def kind_of(mode: int) -> str:
    """Describe a file for a message, given the ``st_mode`` of its status.

    Example:
        >>> kind_of(os.stat("/dev/null").st_mode)
        'a device'
    """
    return "a folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """Open a regular file for reading. Never waits for, or opens, a FIFO, socket, device or folder.

    Args:
        path: the file; links are followed.
        most: the largest size to accept, in bytes.

    Raises:
        OSError: the file cannot be opened, is not regular, or is larger than ``most``.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check_regular(os.stat(path), path)  # opening a device may have side effects
        descriptor = os.open(path, flags)
    except ValueError as error:  # a null character in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        status = os.fstat(descriptor)
        _check_regular(status, path)  # the file may have been replaced since
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, more than {most}", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, kind_of(status.st_mode), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, kind_of(status.st_mode), str(path))


def read_bytes(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with open_regular(path, most) as file:
        return file.read()


def read_text(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> str:
    """Return the UTF-8 text of a regular file of at most ``most`` bytes.

    Raises:
        OSError: as :func:`open_regular`, or the content is not UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, "it is not UTF-8 text", str(path)) from error


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text with integers of at most 20 characters and at most 64 levels of nesting.

    Raises:
        ValueError: the text is not JSON, or exceeds these limits.

    Example:
        >>> parse_json('{"a": [1, 2.5, null]}')
        {'a': [1, 2.5, None]}
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    level = [value]
    for _ in range(_MAX_NESTING):
        containers = [part for part in level if isinstance(part, (dict, list))]
        level = [part for outer in containers for part in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return value
    raise ValueError("too deeply nested")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file, within the limits of :func:`parse_json`.

    Raises:
        ArtifactError: the file is missing, cannot be read, or is not JSON.
    """
    try:
        return parse_json(read_bytes(path))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}", found=error.strerror or str(error)) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON", found=str(error)[:80]) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 checksum of a file, in hexadecimal.

    Raises:
        OSError: as :func:`open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()
