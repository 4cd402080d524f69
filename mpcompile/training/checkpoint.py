"""Checkpoint files of a training run: written whole or not at all, and checked field by field when read."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, TypedDict, cast

import torch
from torch import Tensor, nn

from mpcompile._moved import renamed
from mpcompile.errors import ArtifactError, printable
from mpcompile.io.reading import open_regular
from mpcompile.io.schema import Between, Mismatch, Natural, check
from mpcompile.io.writing import TEMPORARY, replacing

__getattr__ = renamed(
    __name__,
    {
        "check_alike": "training.checkpoint.check_structure",
        "check_same": "training.checkpoint.check_same_run",
        "digest": "training.checkpoint.weights_digest",
        "in_the_way": "training.checkpoint.earlier_run",
        "left_behind": "training.checkpoint.remove_temporary_files",
        "random_state": "data.seeding.random_state",
        "set_random_state": "data.seeding.set_random_state",
        "seed_everything": "data.seeding.seed_everything",
    },
)
NAME = "checkpoint.pt"
FORMAT = 3
_MARK = b"mpcompile sha256 "  # starts the comment of the ZIP archive; the digest of all bytes before it follows
_COMMENT = len(_MARK) + 64
_CHUNK = 1 << 22


class _Result(TypedDict):
    losses: list[float]
    accuracy: list[Annotated[float, Between(0, 1)]]
    steps: Natural
    images: Natural
    resumed: Natural


class _Optimizer(TypedDict):
    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class _Identity(TypedDict):
    options: dict[str, Any]
    masks: str
    teacher: str
    images: str
    batches: Natural
    world: Natural


class State(TypedDict):
    """Fields of a checkpoint."""

    identity: _Identity
    step: Natural
    evaluated: bool
    loss_sum: Annotated[float, Between(-1e300, 1e300)]
    result: _Result
    student: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    ema: dict[str, Any] | None
    random: list[dict[str, Any]]


def weights_digest(module: nn.Module) -> str:
    """Return a SHA-256 checksum of a module's weights and buffers, with their names."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def last_good(folder: Path | None) -> str:
    """Return a hint for error messages that says where the last checkpoint of a run is."""
    path = None if folder is None else folder / NAME
    return f"The last good checkpoint is {path}" if path is not None and path.exists() else "No checkpoint yet"


def earlier_run(path: Path) -> ArtifactError:
    """Return the error for a new run in a folder that holds the checkpoint of an earlier one."""
    return ArtifactError(
        f"{path.parent} holds the checkpoint of an earlier run",
        expected="a new folder, or resume='auto'",
        found=path,
        hint="remove the checkpoint to start again",
    )


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint to a temporary file, which replaces the previous checkpoint once it is on disk.

    The format is that of ``torch.save``, a ZIP archive, with a checksum of all its bytes in the archive's comment.

    Raises:
        ArtifactError: the folder cannot be written or the disk is full; the previous checkpoint is untouched.
    """
    recorder = None
    try:
        with replacing(path) as file:
            recorder = _ErrorRecorder(file)
            torch.save({"format": FORMAT, **state}, cast(IO[bytes], recorder))
            _sign(file)
    except (OSError, RuntimeError) as error:
        cause = recorder.error if recorder is not None and recorder.error is not None else error
        if not isinstance(cause, OSError):
            raise
        previous = f"the last checkpoint, {path}, is intact" if path.exists() else "there is no earlier one"
        raise ArtifactError(
            f"cannot write the checkpoint {path}",
            expected="a writable folder with room",
            found=cause.strerror or str(cause),
            hint=f"{previous}; make room and resume",
        ) from error


def _sign(file: BinaryIO) -> None:
    """Append an archive's digest to the archive, as its comment."""
    file.seek(-2, os.SEEK_END)  # an archive without a comment ends with the length of the comment
    file.write(struct.pack("<H", _COMMENT))
    end = file.tell()
    checksum = _checksum(file, end)
    file.seek(end)
    file.write(_MARK + checksum.encode())


def _checksum(file: BinaryIO, end: int) -> str:
    """Return the SHA-256 digest of the first ``end`` bytes of a file."""
    sha = hashlib.sha256()
    file.seek(0)
    while end > 0:
        part = file.read(min(_CHUNK, end))
        if not part:
            break
        sha.update(part)
        end -= len(part)
    return sha.hexdigest()


class _ErrorRecorder:
    """A file that records the error of a failed write, which torch's writer replaces with one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Its checksum is verified first; only tensors and plain values are unpickled.

    Raises:
        ArtifactError: the file is damaged, is not a checkpoint, or has another format.
    """
    try:
        with open_regular(path) as file:
            problem = _damage(file)
            if problem is None:
                file.seek(0)
                state = torch.load(file, map_location="cpu", weights_only=True)
                version = state["format"]
    except Exception as error:
        found = getattr(error, "strerror", None)
        if found is None:
            found = "an archive of something else" if zipfile.is_zipfile(path) else "a damaged file"
        raise _unreadable(path, found) from error
    if problem is not None:
        raise _unreadable(path, problem)
    if type(version) is not int or version != FORMAT:
        raise ArtifactError(
            f"{path} has another format", expected=FORMAT, found=version, hint="resume with the version that wrote it"
        )
    return dict(state)


def _unreadable(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"{path} cannot be read as a checkpoint",
        expected="a complete file that mpcompile.distill wrote",
        found=found,
        hint="remove it to start again",
    )


def _damage(file: BinaryIO) -> str | None:
    """Return a description of the damage to a checkpoint's bytes, or None if they are intact."""
    end = file.seek(0, os.SEEK_END) - _COMMENT
    file.seek(max(0, end))
    comment = file.read()
    if end < 0 or not comment.startswith(_MARK):
        return "a damaged file, or one from an older version: it ends without a checksum"
    if comment[len(_MARK) :] != _checksum(file, end).encode():
        return "a damaged file: its content has changed since it was written"
    return None


def check_state(path: Path, state: Mapping[str, Any]) -> None:
    """Check that a checkpoint holds every field that a run needs to resume, each of the right type.

    Raises:
        ArtifactError: a field is missing or has the wrong type; the message names it.
    """
    try:
        check(state, State)
        for part in ("student", "ema"):
            for name, value in (state[part] or {}).items():
                if not isinstance(value, Tensor) and not str(name).endswith("_extra_state"):
                    raise Mismatch(f"{part}.{printable(name, 60)}", "a tensor", f"a {type(value).__name__}")
    except Mismatch as error:
        raise malformed(path, error.where, error.expected, error.found) from error


def malformed(path: Path, where: str, expected: object, found: object) -> ArtifactError:
    """Return the error for a field of a checkpoint that a run cannot resume from."""
    return ArtifactError(
        f"{path} cannot be resumed from: its field {where} is not in the form that mpcompile.distill writes",
        expected=expected,
        found=found,
        hint="remove it to start again",
    )


def check_structure(saved: Any, own: Any, where: str = "") -> None:
    """Check that a plain value has the structure of another: the same names, lengths and types (any
    number matches any other).

    Args:
        saved: the value from a checkpoint.
        own: the value of this run.
        where: path of the value, for errors.

    Raises:
        Mismatch: the structures differ.
    """
    if isinstance(own, Mapping):
        check(saved, dict[str, Any], where)
        if saved.keys() != own.keys():
            raise Mismatch(where, f"the names {', '.join(own)}", ", ".join(map(str, saved)))
        for name in own:
            check_structure(saved[name], own[name], f"{where}.{name}".lstrip("."))
    elif isinstance(own, (list, tuple)):
        check(saved, list[Any], where)
        if len(saved) != len(own):
            raise Mismatch(where, f"a list of {len(own)}", f"one of {len(saved)}")
        for place, value in enumerate(own):
            check_structure(saved[place], value, f"{where}.{place}")
    elif isinstance(own, (bool, str, type(None))):
        check(saved, type(own), where)
    elif isinstance(own, (int, float)):
        check(saved, Annotated[float, Between(-1e300, 1e300)], where)


def check_settings(saved: Mapping[str, Any], own: Mapping[str, Any], vary: str, where: str = "") -> None:
    """Check that settings fixed at the start of a run, such as its learning rate schedule, match those of this run.

    Args:
        saved: the settings from a checkpoint.
        own: the settings of this run.
        vary: the field that changes during a run.
        where: path of the settings, for errors.

    Raises:
        Mismatch: a setting differs.
    """
    check_structure(saved, own, where)
    for name, value in own.items():
        if name not in (vary, "params") and saved[name] != value:
            raise Mismatch(f"{where}.{name}".lstrip("."), printable(value, 60), printable(saved[name], 60))


def check_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Check that a saved optimiser state fits: the same parameter groups, and tensors of the parameters' shapes.

    Args:
        saved: the state from a checkpoint.
        optimizer: the optimiser of this run.
        steps: number of steps that the run had done; after the first one, a state cannot be empty.

    Raises:
        Mismatch: it does not fit.
    """
    check(saved, _Optimizer)
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(saved["param_groups"]):
        raise Mismatch("param_groups", f"{len(own)} of them", str(len(saved["param_groups"])))
    for mine, group in zip(own, saved["param_groups"], strict=True):
        if mine["params"] != group.get("params") or mine.keys() != group.keys():
            raise Mismatch("param_groups", "the groups of this run", "others")
        check_settings(group, mine, "lr", "param_groups")
    if steps and not saved["state"]:
        raise Mismatch("state", f"that of {steps} steps", "none")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = [place for group in own for place in group["params"]]
    shapes = {place: p.shape for place, p in zip(places, parameters, strict=True)}
    for place, entry in saved["state"].items():
        for name, value in entry.items():
            if place not in shapes or not (
                value is None
                or isinstance(value, (int, float))
                or (isinstance(value, Tensor) and (value.dim() == 0 or value.shape == shapes[place]))
            ):
                raise Mismatch(f"state.{place}.{name}", "a number, or a tensor of its parameter's shape", "another")


@contextlib.contextmanager
def loading(path: Path, where: str) -> Iterator[None]:
    """Turn any error in loading a field of a checkpoint into one that names the field."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        lines = " ".join(str(error).split())[:160] or type(error).__name__
        raise malformed(path, where, "the content that this run would write", lines) from error


def check_same_run(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a checkpoint belongs to the run that resumes from it.

    Args:
        path: path of the checkpoint.
        saved: identity of the run that wrote the checkpoint.
        current: identity of this run.

    Raises:
        ArtifactError: they differ; the message names the differences.
    """
    differing = {key: (value, current.get(key)) for key, value in saved.items() if value != current.get(key)}
    if differing:
        raise ArtifactError(
            f"{path} belongs to another run",
            expected=_described(differing, 0),
            found=_described(differing, 1),
            hint="resume that run as it was started, or choose a new folder",
        )


def _described(differing: dict[str, tuple[Any, Any]], side: int) -> str:
    """Return the differing values of one side as text, with options listed one by one."""
    parts = []
    for key, values in differing.items():
        if key == "options":
            names = [k for k in values[side] if values[0].get(k) != values[1].get(k)]
            parts += [f"{k}={values[side][k]}" for k in names]
        else:
            parts.append(f"{key} {str(values[side])[:12]}")
    return ", ".join(parts)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that a killed run left in its folder: those of checkpoints and any others."""
    for path in folder.glob(f"{TEMPORARY}*.tmp*"):
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)
