"""Locks that allow one run at a time in a folder. The system frees a lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import io
import json
import logging
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

from mpcompile.errors import ArtifactError
from mpcompile.io.reading import parse_json

NAME = ".mpcompile.lock"
_HELD: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("held", default=frozenset())
_FILES: weakref.WeakSet[io.FileIO] = weakref.WeakSet()
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
log = logging.getLogger(__name__)


def _release_in_child() -> None:
    """Close inherited lock files, so that a forked child does not hold its parent's lock.

    A loader's worker, for example, may outlive its parent.
    """
    for file in list(_FILES):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes, and other threads of this one, from running in ``folder``. A nested call has no effect.

    On a file system without locks, a warning is logged and the run continues.

    Raises:
        ArtifactError: another run holds the lock (the message names its process), or the folder cannot be written.
    """
    place = os.path.realpath(folder)
    if place in _HELD.get():
        yield
        return
    file = _acquire(folder)
    token = _HELD.set(_HELD.get() | {place})
    try:
        yield
    finally:
        _HELD.reset(token)
        if file is not None and not file.closed:
            with contextlib.suppress(OSError):
                os.unlink(folder / NAME)  # still locked: a process that has opened the file will find its name gone
            _FILES.discard(file)
            file.close()


def _acquire(folder: Path) -> io.FileIO | None:
    """Create and lock the lock file; return None where locks are not supported."""
    try:
        import fcntl
    except ImportError:  # not available on this system
        log.warning("this system has no file locks: make sure that no other run writes into the same folder")
        return None
    path = folder / NAME
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = io.FileIO(os.open(path, flags, 0o666), "r+")
        except OSError as error:
            reason = error.strerror or str(error)
            raise ArtifactError(f"cannot lock {folder}", expected="a writable folder", found=reason) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner(file)
            file.close()
            if error.errno in _NO_LOCKS:
                log.warning(
                    "the file system of the run's folder has no locks: make sure that no other run writes into it"
                )
                return None
            raise ArtifactError(
                f"another run is writing into {folder}",
                expected="one run in a folder at a time",
                found=owner,
                hint="wait for it or stop it, or choose another folder",
            ) from error
        if _is(file, path):
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            _FILES.add(file)
            return file
        file.close()  # its previous owner has just removed it: try again


def _is(file: io.FileIO, path: Path) -> bool:
    """Return True if ``path`` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _owner(file: io.FileIO) -> str:
    """Describe the process that holds the lock."""
    try:
        owner = parse_json(os.pread(file.fileno(), 4096, 0))
        return f"process {int(owner['pid'])} on {owner['host']!s:.100}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not recorded its id yet"
