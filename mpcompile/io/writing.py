"""Writing: a file is replaced as a whole, or left as it was.

Everything that mpcompile writes goes through this module. The new content is written to a temporary file in the same
folder, flushed to the disk, and renamed. All writers share these guarantees:

* only a regular file, or nothing, is replaced: never a folder, a FIFO or a device;
* the new file has the permissions of any new file (those that the umask leaves), unless ``mode`` is given;
* if anything fails, or SIGTERM ends the process, the old file is untouched and no temporary file is left.

:func:`write_atomically` serves most callers: it takes text, bytes, or a function that writes to a path, and reports
failures as :class:`~mpcompile.errors.ArtifactError`. The context managers below it, :func:`replacing` for a stream and
:func:`temporary_path` for a path, raise :class:`OSError` for callers that explain failures themselves.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mpcompile import _moved
from mpcompile.errors import ArtifactError, first_line, printable

TEMPORARY = ".mpcompile-"  # prefix of every temporary file; a random part follows
_NEW_FILE = 0o666  # permissions of a new file, before the umask
_FULL_DISK = ("PytorchStreamWriter", "inline_container", "iostream error")  # how torch reports a failed write


def write_atomically(
    path: str | os.PathLike[str], content: str | bytes | Callable[[Path], object], *, suffix: str = ""
) -> None:
    """Replace a file by ``content``, as a whole or not at all.

    Args:
        path: a link is followed: the file that it leads to is replaced.
        content: text (written as UTF-8), bytes, or a function that writes the file at the temporary path it is given.
        suffix: suffix of that temporary path, for a writer that depends on it; by default that of ``path``.

    Raises:
        ArtifactError: the folder is missing or not writable, or the disk is full; an older file is untouched.

    Example:
        >>> write_atomically("plan.json", mpcompile.Plan().to_json())
    """
    try:
        if callable(content):
            with temporary_path(path, suffix) as temporary:
                content(temporary)
        else:
            with replacing(path) as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {os.fspath(path)}",
            expected="a writable folder with room",
            found=error.strerror or str(error),
        ) from error


__getattr__ = _moved.renamed(__name__, {"replace_atomically": "io.writing.write_atomically"})


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], *, mode: int | None = None, durable: bool = True, follow: bool = True
) -> Iterator[BinaryIO]:
    """Yield a new file, open for reading and writing, that replaces ``path`` when the block ends without an error.

    Until then it has no name where the system allows that, so that nothing is left even if the process is killed.

    Args:
        path: the file to replace.
        mode: exact permissions of the new file; None: those that the umask leaves of 0o666.
        durable: flush file and folder to the disk, which caches do not need.
        follow: replace the file that a link at ``path`` leads to; False replaces the link itself. Caches that may be
            in a folder of other users do not follow links, which could lead to any file of this user.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or ``path`` is something other than a file.
    """
    target = _target(path, follow)
    temporary = _temporary_name(target)
    with contextlib.ExitStack() as named:
        descriptor = _unnamed(target.parent, mode)
        unnamed = descriptor is not None
        if descriptor is None:
            descriptor = _created(temporary, mode)
            named.enter_context(_discarded(temporary))
        with os.fdopen(descriptor, "w+b") as file:
            if mode is not None and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), mode)  # regardless of the umask
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            if unnamed:
                _link(file.fileno(), temporary)
                named.enter_context(_discarded(temporary))
        os.replace(temporary, target)
    if durable:
        _flush_folder(target.parent)


@contextlib.contextmanager
def temporary_path(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """Yield the path of a new, empty file that replaces ``path`` when the block ends without an error.

    For writers that need a path; one that takes an open file uses :func:`replacing`. The name cannot be predicted and
    the file is created exclusively, so that a link planted at that name is never followed. A link at ``path`` is
    followed.

    Args:
        path: the file to replace.
        suffix: suffix of the temporary name, for writers that depend on it; by default that of ``path``.

    Raises:
        OSError: as :func:`replacing`; errors by which safetensors and torch report a full disk are converted to it.
    """
    target = _target(path)
    temporary = _temporary_name(target, suffix or target.suffix)
    os.close(_created(temporary))
    with _discarded(temporary):
        try:
            yield temporary
            _flush_file(temporary)
            os.replace(temporary, target)
        except Exception as error:
            if type(error).__name__ == "SafetensorError" or any(words in str(error) for words in _FULL_DISK):
                raise OSError(errno.EIO, printable(first_line(error), 100), str(path)) from error
            raise
    _flush_folder(target.parent)


# --- Temporary files ---


def _target(path: str | os.PathLike[str], follow: bool = True) -> Path:
    """Return the file to replace: ``path``, or, if links are followed, the target of a link there.

    It is absent or a regular file, or a link that is not followed.
    """
    target = Path(os.path.realpath(path) if follow else os.path.abspath(path))
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(target).st_mode
        if not stat.S_ISREG(mode) and (follow or not stat.S_ISLNK(mode)):
            raise OSError(errno.EEXIST, "something other than a file is there", str(path))
    return target


def _temporary_name(target: Path, suffix: str = "") -> Path:
    return target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp{suffix}")


def _created(path: Path, mode: int | None = None) -> int:
    """Create a file, open for writing. Fails if the name exists, even as a link."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, _NEW_FILE if mode is None else mode)


def _unnamed(folder: Path, mode: int | None = None) -> int | None:
    """Create a file without a name, which vanishes with the process; return None where the system cannot."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, _NEW_FILE if mode is None else mode)
    except OSError:
        return None  # unsupported by the file system; any other problem will hit the named file as well


def _link(descriptor: int, path: Path) -> None:
    """Give a name to a file of :func:`_unnamed`."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:  # given folder descriptors, os.link follows the link in /proc, which is needed here
        os.link(f"/proc/self/fd/{descriptor}", path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


_NAMED: set[tuple[int, Path]] = set()  # (process, temporary file) pairs that exist under a name


@contextlib.contextmanager
def _discarded(temporary: Path) -> Iterator[None]:
    """Remove a temporary file if the block fails, or if SIGTERM ends the process during it."""
    entry = (os.getpid(), temporary)
    _NAMED.add(entry)
    try:
        with _terminating_cleanly():
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        _NAMED.discard(entry)


@contextlib.contextmanager
def _terminating_cleanly() -> Iterator[None]:
    """If the program has no handler for SIGTERM, remove temporary files before the signal ends the process.

    A program that handles the signal itself (as the command line does, by unwinding) keeps its handler, and only the
    main thread may set one.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(number: int, _frame: Any) -> None:
    for process, path in list(_NAMED):
        if process == os.getpid():  # a forked child has inherited its parent's entries
            with contextlib.suppress(OSError):
                os.unlink(path)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """Make a new name survive a power failure."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


# --- Folders, and checks before long work ---


def make_folder(path: Path) -> None:
    """Create a folder, and its parents, if they are missing.

    Raises:
        ArtifactError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make the folder {path}", found=error.strerror or str(error)) from error


def check_writable(path: Path) -> None:
    """Check that a file can be written at ``path``, before the work that produces its content.

    Raises:
        ArtifactError: the folder is missing or not writable, or ``path`` is something other than a file.
    """
    try:
        target = _target(path)
        if not target.name or target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = target.parent
        if not folder.is_dir():
            problem = f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}"
            raise ArtifactError(f"cannot write {path}", expected="a file in an existing folder", found=problem)
        _try_folder(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"cannot write {path}", expected="a file in a writable folder", found=reason) from error


def check_folder_writable(path: Path) -> None:
    """Check that files can be written in the folder ``path``, which exists or can be created.

    Raises:
        ArtifactError: files cannot be written there.
    """
    try:
        existing = Path(os.path.realpath(path))
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a folder")
        _try_folder(existing)
    except OSError as error:
        reason = error.strerror or str(error)
        problem = f"cannot make the folder {path}, or write into it"
        raise ArtifactError(problem, expected="a writable folder", found=reason) from error


def _try_folder(folder: Path) -> None:
    """Create and remove a file; raises OSError if that is impossible."""
    temporary = _temporary_name(folder / "check")
    os.close(_created(temporary))
    os.unlink(temporary)
