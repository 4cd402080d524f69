"""What happens in a run, as it happens: one JSON object a line, always; TensorBoard and Weights & Biases on request.

A line holds ``event`` (what it is: ``"step"``, ``"epoch"``, ``"checkpoint"``, ...), ``time`` (seconds since 1970) and
the values given. Each line is handed to the operating system as it is written, so that a killed process loses none but
perhaps the one it was writing; that one is cut off when the log is opened again.
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
    """Where numbers go besides the file."""

    def write(self, numbers: Mapping[str, float], step: int | None) -> None:
        """Take numbers by name, ``event/key``."""

    def close(self) -> None:
        """Hand over what is still held back."""


class EventLog:
    """A log of a run in a JSON-lines file.

    Args:
        path: the file, made with its folder if absent and appended to otherwise; None writes no file (on ranks that
            aren't the first).
        resume_at: the step at which a resumed run goes on: lines of this step and later ones are taken out, so that
            the log reads like that of a run that was never interrupted. None keeps all lines.
        again: events of the step before that will be written again: their lines are taken out too.
        sinks: see :func:`tensorboard` and :func:`wandb`.

    Raises:
        ArtifactError: the file can't be written, now or, with a full disk, later.

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
            with self._explained():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _mend(self.path, resume_at, again)
                self._file = _appended(self.path)

    def write(self, event: str, *, step: int | None = None, **values: Any) -> None:
        """Add a line.

        Args:
            event: what happened.
            step: of the optimiser, for lines that belong to one.
            values: whatever JSON holds, and tensors of one value. Numbers that aren't finite, which JSON has none of,
                are written as the text ``"nan"``, ``"inf"`` or ``"-inf"``.
        """
        line = {"event": event, "time": round(time.time(), 3)}
        if step is not None:
            line["step"] = step
        line.update(_plain(values))
        if self._file is not None:
            data = (json.dumps(line, allow_nan=False) + "\n").encode()
            with self._explained():
                while data:
                    data = data[self._file.write(data) :]
        found = {f"{event}/{key}": float(v) for key, v in line.items() if key not in _FRAME and _number(v)}
        for sink in self._sinks if found else ():
            sink.write(found, step)

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
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ArtifactError(
                f"can't write the log {self.path}",
                expected="a writable folder with room",
                found=error.strerror or str(error),
            ) from error


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a log, oldest first; a last line that was cut off is left out.

    Raises:
        ArtifactError: there is no such file, or a line in its midst is no JSON object.
    """
    try:
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise ArtifactError(f"can't read the log {path}", found=error.strerror or str(error)) from error
    for number, line in enumerate(lines[:-1], 1):
        try:
            found = parse_json(line)
            check(found, _Line)
        except ValueError as error:
            wrong = f"{error.where}: {error.found}" if isinstance(error, Mismatch) else repr(line[:40])
            expected = f"{error.expected}" if isinstance(error, Mismatch) else "a JSON object"
            raise ArtifactError(f"line {number} of {path} is damaged", expected=expected, found=wrong) from error
        yield found


def _appended(path: Path) -> BinaryIO:
    """The log, open at its end; a regular file of that name, not what a link leads to."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(path, flags, 0o666), "ab", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    return file


def _mend(path: Path, resume_at: int | None, again: Collection[str]) -> None:
    """Cut off what was half-written, and the lines of steps that will be run again."""
    if not path.exists():
        return
    with open_regular(path) as file:
        data = file.read()
    kept = data[: data.rfind(b"\n") + 1]
    if resume_at is not None:
        lines = kept.splitlines(keepends=True)

        def stays(found: Mapping[str, Any]) -> bool:
            step = found.get("step")
            repeated = found.get("event") in again and step == resume_at - 1
            return step is None or (step < resume_at and not repeated)

        kept = b"".join(line for line, found in zip(lines, read(path), strict=True) if stays(found))
    if kept != data:
        with replacing(path) as file:
            file.write(kept)


def _plain(value: Any) -> Any:
    """As JSON holds it."""
    if isinstance(value, torch.Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool, int, type(None))):
        return value
    if isinstance(value, numbers.Real):  # numpy's too
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        return number if math.isfinite(number) else str(number)
    return str(value)


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def tensorboard(folder: str | os.PathLike[str], resume_at: int | None = None) -> Sink:
    """A sink that writes TensorBoard event files into ``folder``; with ``resume_at``, later steps there are void.

    Raises:
        ConfigError: the package ``tensorboard`` isn't installed.
    """
    _needed("tensorboard")
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
    """A sink that sends numbers to Weights & Biases; ``options`` go to ``wandb.init`` (``name``, ``mode``, ``id``...).

    Raises:
        ConfigError: the package ``wandb`` isn't installed.
    """
    package = _needed("wandb")

    class Run:
        def __init__(self) -> None:
            self.run = package.init(project=project, config=dict(config or {}), **options)

        def write(self, numbers: Mapping[str, float], step: int | None) -> None:
            self.run.log(dict(numbers), step=step)

        def close(self) -> None:
            self.run.finish()

    return Run()


def check_trackers(names: Sequence[str]) -> None:
    """Trackers can be had, before anything is computed.

    Raises:
        ConfigError: no such tracker, or its package isn't installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError("there is no such tracker", expected=f"one of {', '.join(TRACKERS)}", found=repr(name))
        _needed(name)


def trackers(names: Sequence[str], folder: Path | None, resume_at: int | None = None) -> tuple[Sink, ...]:
    """Sinks by name, which keep what they write in ``folder`` (None: the working folder).

    Args:
        names: of :data:`TRACKERS`.
        folder: also says which Weights & Biases run is gone on with, in ``wandb.id``.
        resume_at: the step at which a resumed run goes on.

    Raises:
        ConfigError: no such tracker, or its package isn't installed.
    """
    check_trackers(names)
    place, made = str(folder or "."), []
    for name in names:
        if name == "tensorboard":
            made.append(tensorboard(place, resume_at))
        else:
            mark = Path(place) / "wandb.id"
            known = resume_at is not None and mark.exists()
            found = _run_name(mark) if known else secrets.token_hex(8)
            made.append(wandb("mpcompile", dir=place, id=found, resume="allow"))
            if not known:
                write_atomically(mark, found)
    return tuple(made)


def _run_name(mark: Path) -> str:
    """The name of a Weights & Biases run, as this module wrote it."""
    try:
        text = read_text(mark, 1000)
    except OSError as error:
        raise ArtifactError(f"can't read {mark}", found=error.strerror or str(error)) from error
    if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", text):
        raise ArtifactError(f"{mark} names no run", expected="letters and digits", found=printable(repr(text), 60))
    return text


def _needed(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"logging to {package} needs the package {package}", hint=f"pip install 'mpcompile[{package}]'"
        ) from error
