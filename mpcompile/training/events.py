"""The log of a run: one JSON object per line and, on request, TensorBoard and Weights & Biases.

A line holds ``event`` (its kind: ``"step"``, ``"epoch"``, ``"resume"``, ``"end"``, ...), ``time`` (seconds since 1970)
and the given values. Each line is passed to the operating system when it is written, so that a killed process loses at
most the line it was writing; an incomplete line is cut off when the log is opened again.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import math
import numbers
import os
import re
import secrets
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypedDict, TypeGuard

import torch

from mpcompile.errors import ArtifactError, ConfigError, printable
from mpcompile.io.reading import open_regular, parse_json, read_text
from mpcompile.io.schema import Mismatch, Natural, check
from mpcompile.io.writing import replacing, write_atomically

TRACKERS = ("tensorboard", "wandb")
_FRAME = ("event", "time", "step")


class _Line(TypedDict, total=False):
    event: str
    time: float
    step: Natural


class Sink(Protocol):
    """A destination for numbers, besides the file."""

    def write(self, numbers: Mapping[str, float], step: int | None) -> None:
        """Receive numbers by name, ``event/key``."""

    def close(self) -> None:
        """Flush the buffered numbers."""


class EventLog:
    """The log of a run in a JSON-lines file.

    Args:
        path: the file, created with its folder if absent and appended to otherwise; None writes no file (as on
            all ranks but the first).
        resume_at: the first step of a resumed run: lines of this step and later ones are removed, so that the log
            reads like that of an uninterrupted run. None keeps all lines.
        again: kinds of event of the previous step that will be written again: their lines are removed, too.
        sinks: see :func:`tensorboard` and :func:`wandb`.

    Raises:
        ArtifactError: the file cannot be opened, or a later write fails, as on a full disk.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with EventLog(f"{folder}/events.jsonl") as log:
        ...     log.write("step", step=0, loss=2.5)
        >>> [(line["event"], line["loss"]) for line in read(f"{folder}/events.jsonl")]
        [('step', 2.5)]
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        resume_at: int | None = None,
        again: Collection[str] = (),
        sinks: tuple[Sink, ...] = (),
    ) -> None:
        self.path = None if path is None else Path(path)
        self._sinks = sinks
        self._file = None
        if self.path is not None:
            with self._named_errors():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _truncate(self.path, resume_at, again)
                self._file = _open_for_appending(self.path)

    def write(self, event: str, *, step: int | None = None, **values: Any) -> None:
        """Add a line.

        Args:
            event: kind of the line.
            step: optimiser step, for lines that belong to one.
            values: JSON values and tensors. JSON has neither NaN nor infinity: they are written as the text
                ``"nan"``, ``"inf"`` or ``"-inf"``.
        """
        line = {"event": event, "time": round(time.time(), 3)}
        if step is not None:
            line["step"] = step
        line.update(_plain(values))
        if self._file is not None:
            data = (json.dumps(line, allow_nan=False) + "\n").encode()
            with self._named_errors():
                while data:
                    data = data[self._file.write(data) :]
        values = {f"{event}/{key}": float(v) for key, v in line.items() if key not in _FRAME and _number(v)}
        for sink in self._sinks if values else ():
            sink.write(values, step)

    def close(self) -> None:
        """Close the file and the sinks; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for sink in self._sinks:
            sink.close()
        self._sinks = ()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"cannot write the log {self.path}",
                expected="a writable folder with room",
                found=error.strerror or str(error),
            ) from error


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log, oldest first, without an incomplete last line.

    Raises:
        ArtifactError: the file does not exist, or a complete line is not a JSON object.
    """
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise ArtifactError(f"cannot read the log {path}", found=error.strerror or str(error)) from error
    for number, line in enumerate(lines[:-1], 1):
        try:
            entry = parse_json(line)
            check(entry, _Line)
        except ValueError as error:
            wrong = f"{error.where}: {error.found}" if isinstance(error, Mismatch) else repr(line[:40])
            expected = f"{error.expected}" if isinstance(error, Mismatch) else "a JSON object"
            raise ArtifactError(f"line {number} of {path} is damaged", expected=expected, found=wrong) from error
        yield entry


def _open_for_appending(path: Path) -> BinaryIO:
    """Open the log at its end; a link is not followed, and only a regular file is opened."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def _truncate(path: Path, resume_at: int | None, again: Collection[str]) -> None:
    """Remove an incomplete last line, and the lines of steps that will be run again."""
    if not path.exists():
        return
    with open_regular(path) as file:
        data = file.read()
    remaining = data[: data.rfind(b"\n") + 1]
    if resume_at is not None:
        lines = remaining.splitlines(keepends=True)

        def remains(entry: Mapping[str, Any]) -> bool:
            step = entry.get("step")
            repeated = entry.get("event") in again and step == resume_at - 1
            return step is None or (step < resume_at and not repeated)

        remaining = b"".join(line for line, entry in zip(lines, read(path), strict=True) if remains(entry))
    if remaining != data:
        with replacing(path) as file:
            file.write(remaining)


def _plain(value: Any) -> Any:
    """Convert a value to plain JSON values."""
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (str, bool, int, type(None))):
        return value
    if isinstance(value, numbers.Real):  # including NumPy's
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        return number if math.isfinite(number) else str(number)
    return str(value)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def tensorboard(folder: str | os.PathLike[str], resume_at: int | None = None) -> Sink:
    """Return a sink that writes TensorBoard event files into ``folder``; steps from ``resume_at`` on are purged there.

    Raises:
        ConfigError: the package ``tensorboard`` is not installed.
    """
    _required("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    class Writer:
        def __init__(self) -> None:
            self.writer = SummaryWriter(os.fspath(folder), purge_step=resume_at)

        def write(self, numbers: Mapping[str, float], step: int | None) -> None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)

        def close(self) -> None:
            self.writer.close()

    return Writer()


def wandb(project: str, *, config: Mapping[str, Any] | None = None, **options: Any) -> Sink:
    """Return a sink that sends numbers to Weights & Biases.

    Args:
        project: name of the project.
        config: configuration of the run.
        options: passed to ``wandb.init`` (``name``, ``mode``, ``id``, ...).

    Raises:
        ConfigError: the package ``wandb`` is not installed.
    """
    package = _required("wandb")

    class Uploader:
        def __init__(self) -> None:
            self.run = package.init(project=project, config=dict(config or {}), **options)

        def write(self, numbers: Mapping[str, float], step: int | None) -> None:
            self.run.log(dict(numbers), step=step)

        def close(self) -> None:
            self.run.finish()

    return Uploader()


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are available, before anything is computed.

    Raises:
        ConfigError: a tracker does not exist, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError("unknown tracker", expected=f"one of {', '.join(TRACKERS)}", found=repr(name))
        _required(name)


def trackers(names: Sequence[str], folder: Path | None, resume_at: int | None = None) -> tuple[Sink, ...]:
    """Return sinks by name.

    Args:
        names: some of :data:`TRACKERS`.
        folder: folder for their files (None: the working folder). Its file ``wandb.id`` names the Weights & Biases run
            that a resumed run continues.
        resume_at: the first step of a resumed run.

    Raises:
        ConfigError: a tracker does not exist, or its package is not installed.
        ArtifactError: ``wandb.id`` is damaged.
    """
    check_trackers(names)
    place, sinks = str(folder or "."), []
    for name in names:
        if name == "tensorboard":
            sinks.append(tensorboard(place, resume_at))
        else:
            mark = Path(place) / "wandb.id"
            known = resume_at is not None and mark.exists()
            run = _run_name(mark) if known else secrets.token_hex(8)
            sinks.append(wandb("mpcompile", dir=place, id=run, resume="allow"))
            if not known:
                write_atomically(mark, run)
    return tuple(sinks)


def _run_name(mark: Path) -> str:
    """Read the name of a Weights & Biases run from a file that this module wrote."""
    try:
        text = read_text(mark, 1000)
    except OSError as error:
        raise ArtifactError(f"cannot read {mark}", found=error.strerror or str(error)) from error
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", text):
        found = printable(repr(text), 60)
        raise ArtifactError(f"{mark} does not name a run", expected="letters and digits", found=found)
    return text


def _required(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"logging to {package} needs the package {package}", hint=f"run pip install 'mpcompile[{package}]'"
        ) from error
