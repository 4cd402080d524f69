"""Where a command writes: checked once, before the work, for every command and every option that names a file.

Nothing that another program wrote is replaced, no input of the command is, and folders are there and can be written.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from mpcompile.artifact.container import PLAN, WEIGHTS
from mpcompile.errors import ArtifactError, ConfigError
from mpcompile.io.ownership import is_ours
from mpcompile.io.writing import check_folder_writable, check_writable

FOLDER: tuple[str, ...] = ()  # a folder in which nothing is replaced
FILE, ARTIFACT = "file", "artifact"  # one file; a file, or a folder of WEIGHTS and PLAN where a slash is behind it
Kind: TypeAlias = "str | tuple[str, ...]"
_STANDARD_OUTPUT = "-"
_TEXTS = ("target", "recipe", "data")  # options that may name an input although they aren't of type Path


def declare(job: argparse.ArgumentParser, **kinds: Kind | Callable[[argparse.Namespace], Kind]) -> None:
    """Say which options of a command name something that it writes.

    They are left as texts, since a Path has no slash behind it; a file becomes a Path once it is checked.

    Args:
        job: the command.
        kinds: by option, :data:`FILE`, :data:`ARTIFACT`, the names of the files that it writes into a folder, or what
            says one of these from the arguments.
    """
    job.set_defaults(destinations={**(job.get_default("destinations") or {}), **kinds})


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether an artifact that is written there takes the form of a folder."""
    return os.fspath(path).endswith(("/", os.sep)) or os.path.isdir(path)


def check_destinations(args: argparse.Namespace) -> None:
    """Everything that a command will write can be written, and replaces nothing but what mpcompile wrote.

    Raises:
        ArtifactError: a folder is missing or not writable, or something is in the way.
        ConfigError: a file is an input of this very command, or is to be written twice.
    """
    declared: dict[str, Any] = getattr(args, "destinations", None) or {}
    inputs = {key: path for path in _inputs(args, declared) for key in _keys(path)}
    written: dict[str, str] = {}
    for name, kind in declared.items():
        value = getattr(args, name, None)
        if value is None or str(value) == _STANDARD_OUTPUT:
            continue
        flag = f"--{name.replace('_', '-')}"
        chosen = kind(args) if callable(kind) else kind
        for path in _files(value, chosen, flag):
            _check(path, flag, inputs)
            real = os.path.realpath(path)
            if real in written:
                raise ConfigError(f"{written[real]} and {flag} name the same file", found=path)
            written[real] = flag
            if chosen == FILE:
                setattr(args, name, path)
    if getattr(args, "record", False) and getattr(args, "artifact", None) is not None:
        path = args.artifact / WEIGHTS if args.artifact.is_dir() else args.artifact
        if path.exists():
            check_writable(path)


def _files(value: str | os.PathLike[str], kind: Any, flag: str) -> list[Path]:
    """The files that an option stands for; their folder can be written."""
    path = Path(value)
    if isinstance(kind, tuple):
        check_folder_writable(path)
        return [path / name for name in kind]
    if kind == ARTIFACT and is_folder(value):
        check_folder_writable(path)
        return [path / WEIGHTS, path / PLAN]
    if is_folder(value):
        raise ArtifactError(f"{flag} names a folder", expected="a file to write", found=os.fspath(value))
    check_writable(path)
    return [path]


def _check(path: Path, flag: str, inputs: dict[Any, Path]) -> None:
    if not os.path.lexists(path):
        return
    read = next((inputs[key] for key in _keys(path) if key in inputs), None)
    if read is not None:
        raise ConfigError(f"{flag} would replace {path}, which this command reads", hint="choose another path")
    if not is_ours(path):
        raise ArtifactError(
            f"{flag} would replace {path}, which mpcompile didn't write",
            expected="a new file, or one of mpcompile's own",
            hint="choose another path, or remove that file",
        )


def _inputs(args: argparse.Namespace, outputs: Iterable[str]) -> Iterator[Path]:
    """Every path that a command was given besides those that it writes, and the files of artifacts in folders."""
    for name, value in vars(args).items():
        if name in outputs:
            continue
        items = value if isinstance(value, (list, tuple)) else [value]
        for item in items:
            if isinstance(item, Path) or (name in _TEXTS and isinstance(item, str)):
                yield Path(item)
                yield from (Path(item) / part for part in (WEIGHTS, PLAN))


def _keys(path: Path) -> list[Any]:
    """What a file is known by: its place on the disk, which links share, and its path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return []
    return [(status.st_dev, status.st_ino), os.path.realpath(path)]
