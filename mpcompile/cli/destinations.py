"""Destinations of a command's output. One check, before the work, covers every option that names an output.

It refuses to replace an input of the command or a file that another program wrote, and reports missing or read-only
folders.
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
from mpcompile.sources.folders import CONFIG
from mpcompile.sources.functions import names_function

FOLDER: tuple[str, ...] = ()  # a folder in which nothing is replaced
FILE, ARTIFACT = "file", "artifact"  # one file; a file or, with a trailing slash, a folder of WEIGHTS and PLAN
Kind: TypeAlias = "str | tuple[str, ...]"
_STANDARD_OUTPUT = "-"
_TEXTS = ("model", "recipe", "data")  # options that may name an input although their type is not Path


def declare(job: argparse.ArgumentParser, **kinds: Kind | Callable[[argparse.Namespace], Kind]) -> None:
    """Declare the options of a command that name its outputs.

    Their values are strings, since a Path loses its trailing slash; :func:`check_destinations` turns the value of an
    option of kind :data:`FILE` into a Path.

    Args:
        job: the command.
        kinds: option -> :data:`FILE`, :data:`ARTIFACT`, the names of the files that it writes into a folder, or a
            function that returns one of these from the parsed arguments.
    """
    job.set_defaults(destinations={**(job.get_default("destinations") or {}), **kinds})


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return True if an artifact written to ``path`` becomes a folder: a trailing slash, or an existing folder."""
    return os.fspath(path).endswith(("/", os.sep)) or os.path.isdir(path)


def check_destinations(args: argparse.Namespace) -> None:
    """Check that a command can write all of its outputs, and that they replace only files that mpcompile wrote.

    Raises:
        ArtifactError: a folder is missing or not writable, or the path is taken by something else.
        ConfigError: an output is also an input of the command, or two outputs are the same file.
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
            real_path = os.path.realpath(path)
            if real_path in written:
                raise ConfigError(f"{written[real_path]} and {flag} name the same file", found=path)
            written[real_path] = flag
            if chosen == FILE:
                setattr(args, name, path)
    if getattr(args, "record", False) and getattr(args, "artifact", None) is not None:
        path = args.artifact / WEIGHTS if args.artifact.is_dir() else args.artifact
        if path.exists():
            check_writable(path)


def check_ending(path: str | os.PathLike[str], *endings: str) -> None:
    """Check that the name of an output has the ending of its format.

    Args:
        path: the output.
        endings: the allowed suffixes, such as ``".png"``.

    Raises:
        ArtifactError: the name has another suffix, or none.
    """
    ending = Path(path).suffix
    if ending.lower() not in endings:
        expected, found = f"a name that ends in {' or '.join(endings)}", ending or "a name without a suffix"
        raise ArtifactError(f"cannot write {path}", expected=expected, found=found)


def _files(value: str | os.PathLike[str], kind: Any, flag: str) -> list[Path]:
    """Return the files that an option writes, after checking that their folder is writable."""
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
    """Check that an output replaces no input of the command and no file of another program."""
    if not os.path.lexists(path):
        return
    read = next((inputs[key] for key in _keys(path) if key in inputs), None)
    if read is not None:
        raise ConfigError(f"{flag} would replace {path}, which this command reads", hint="choose another path")
    if not is_ours(path):
        raise ArtifactError(
            f"{flag} would replace {path}, which mpcompile did not write",
            expected="a new file, or one that mpcompile wrote",
            hint="choose another path, or remove that file",
        )


def _inputs(args: argparse.Namespace, outputs: Iterable[str]) -> Iterator[Path]:
    """Yield every path among the arguments that is not an output, and the files of artifacts in folders."""
    for name, value in vars(args).items():
        if name in outputs:
            continue
        for path in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(path, Path) or (name in _TEXTS and isinstance(path, str)):
                yield Path(path)
                yield from (Path(path) / part for part in (WEIGHTS, PLAN, CONFIG))
                if isinstance(path, str) and names_function(path):
                    yield Path(path.rpartition(":")[0])


def _keys(path: Path) -> list[Any]:
    """Return the keys that identify a file: device and inode, which hard links share, and its real path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return []
    return [(status.st_dev, status.st_ino), os.path.realpath(path)]
