"""Trust in files that are executed: who, besides this user and root, could have written them."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path


def others_can_write(path: Path, kind: Callable[[int], bool]) -> str | None:
    """Return how others could have placed or changed a file or folder, or None if only this user and root could.

    The file or folder itself, every folder above it, and the targets of links among these folders are checked.

    Args:
        path: the file or folder.
        kind: a test that the path's mode must pass, such as ``stat.S_ISREG``. A link is neither file nor folder.

    Raises:
        OSError: the path does not exist.
    """
    if not hasattr(os, "getuid"):
        return None
    place = Path(os.path.abspath(path))
    if not kind(place.lstat().st_mode):
        return f"{place} is a link, or of another kind"
    for last, part in [(True, place), *((False, parent) for parent in place.parents)]:
        status = part.lstat()
        if stat.S_ISLNK(status.st_mode):
            target = Path(os.path.realpath(part, strict=True))
            reason = _other_owner(part, status, last) or others_can_write(target, stat.S_ISDIR)
        else:
            reason = _other_owner(part, status, last) or _other_writer(part, status, last)
        if reason is not None:
            return reason
    return None


def _other_owner(path: Path, status: os.stat_result, last: bool) -> str | None:
    # In a container, all folders of users from outside appear to belong to the overflow user.
    unknown = () if last else (_overflow_user(),)
    return None if status.st_uid in (os.getuid(), 0, *unknown) else f"{path} belongs to user {status.st_uid}"


def _other_writer(path: Path, status: os.stat_result, last: bool) -> str | None:
    shared = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _private_group(status.st_gid))
    if not shared or (not last and status.st_mode & stat.S_ISVTX):  # sticky, like /tmp: only owners can rename files
        return None
    return f"others can write to {path} (mode {stat.S_IMODE(status.st_mode):o})"


@functools.cache
def _overflow_user() -> int:
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return 0


@functools.cache
def _private_group(number: int) -> bool:
    """Return True if only this user and root are in a group, as on systems where every user has their own group."""
    import grp
    import pwd

    try:
        name, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(number)
    except KeyError:
        return False
    return number in (0, os.getgid()) and group.gr_name in (name, "root") and set(group.gr_mem) <= {name, "root"}
