"""Checkpoints of a training run: one file, whole or not at all, and the random numbers that go with it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO, TypedDict, cast

import numpy as np
import torch
from torch import Tensor, nn

from mpcompile.errors import ArtifactError, printable
from mpcompile.io.reading import open_regular
from mpcompile.io.schema import Between, Mismatch, Natural, check
from mpcompile.io.writing import TEMPORARY, replacing

NAME = "checkpoint.pt"
FORMAT = 3
_MARK = b"mpcompile sha256 "  # begins the comment of the ZIP archive; the digest of all bytes before it follows
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
    """What a checkpoint of a run holds."""

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


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators, as plain values and tensors."""
    version, keys, gauss = random.getstate()
    name, state, *rest = np.random.get_state(legacy=True)
    found: dict[str, Any] = {
        "python": [version, list(keys), gauss],
        "numpy": [name, np.asarray(state).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    return found


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, values, *rest = state["numpy"]
    np.random.set_state((name, np.array(values, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed all generators for one epoch of one rank."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def digest(module: nn.Module) -> str:
    """A checksum of a module's weights and buffers, by name."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def in_the_way(path: Path) -> ArtifactError:
    """What to say where a new run finds the checkpoint of an earlier one."""
    return ArtifactError(
        f"{path.parent} holds the checkpoint of an earlier run",
        expected="a new folder, or resume='auto'",
        found=path,
        hint="remove the checkpoint to start again",
    )


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint through a temporary file, on the disk before it takes the place of the last one.

    It is a file of ``torch.save``, a ZIP archive, with a checksum of all its bytes in the archive's comment.

    Raises:
        ArtifactError: the folder can't be written or the disk is full; the last checkpoint is untouched.
    """
    noting = None
    try:
        with replacing(path) as file:
            noting = _Noting(file)
            torch.save({"format": FORMAT, **state}, cast(IO[bytes], noting))
            _sign(file)
    except (OSError, RuntimeError) as error:
        cause = noting.error if noting is not None and noting.error is not None else error
        if not isinstance(cause, OSError):
            raise
        kept = f"the last checkpoint, {path}, is whole" if path.exists() else "there was none before"
        raise ArtifactError(
            f"can't write the checkpoint {path}",
            expected="a writable folder with room",
            found=cause.strerror or str(cause),
            hint=f"{kept}; make room and resume",
        ) from error


def _sign(file: BinaryIO) -> None:
    """Put the digest of an archive behind it."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, which ends an archive without one
    file.write(struct.pack("<H", _COMMENT))
    end = file.tell()
    digest = _digest(file, end)
    file.seek(end)
    file.write(_MARK + digest.encode())


def _digest(file: BinaryIO, end: int) -> str:
    """SHA-256 of the first ``end`` bytes of a file."""
    sha = hashlib.sha256()
    file.seek(0)
    while end > 0:
        part = file.read(min(_CHUNK, end))
        if not part:
            break
        sha.update(part)
        end -= len(part)
    return sha.hexdigest()


class _Noting:
    """A file that keeps the error of a write: torch's writer makes something else of a full disk."""

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
    """A checkpoint, unpickled as tensors and plain values alone, once its checksum is right.

    Raises:
        ArtifactError: the file is damaged, no checkpoint, or of a newer format.
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
            found = "something else in it" if zipfile.is_zipfile(path) else "a damaged file"
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
        f"{path} can't be read as a checkpoint",
        expected="a whole file that mpcompile.distill wrote",
        found=found,
        hint="remove it to start again",
    )


def _damage(file: BinaryIO) -> str | None:
    """What is wrong with the bytes of a checkpoint, or None."""
    end = file.seek(0, os.SEEK_END) - _COMMENT
    file.seek(max(0, end))
    comment = file.read()
    if end < 0 or not comment.startswith(_MARK):
        return "a damaged file, or one of an older version: it ends without a checksum"
    if comment[len(_MARK) :] != _digest(file, end).encode():
        return "a damaged file: its content is not what was written"
    return None


def check_state(path: Path, state: Mapping[str, Any]) -> None:
    """A checkpoint holds what a run needs to go on: every field is there, and of its type.

    Raises:
        ArtifactError: it doesn't; names the field.
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
    """A field of a checkpoint that a run can't go on with."""
    return ArtifactError(
        f"{path} can't be gone on with: its field {where} is not what mpcompile.distill writes",
        expected=expected,
        found=found,
        hint="remove it to start again",
    )


def check_alike(found: Any, own: Any, where: str = "") -> None:
    """A plain value has the structure of another: the same names and lengths, numbers where there are numbers.

    Raises:
        Mismatch: it hasn't.
    """
    if isinstance(own, Mapping):
        check(found, dict[str, Any], where)
        if found.keys() != own.keys():
            raise Mismatch(where, f"the names {', '.join(own)}", ", ".join(map(str, found)))
        for name in own:
            check_alike(found[name], own[name], f"{where}.{name}".lstrip("."))
    elif isinstance(own, (list, tuple)):
        check(found, list[Any], where)
        if len(found) != len(own):
            raise Mismatch(where, f"a list of {len(own)}", f"one of {len(found)}")
        for place, item in enumerate(own):
            check_alike(found[place], item, f"{where}.{place}")
    elif isinstance(own, (bool, str, type(None))):
        check(found, type(own), where)
    elif isinstance(own, (int, float)):
        check(found, Annotated[float, Between(-1e300, 1e300)], where)


def check_settings(found: Mapping[str, Any], own: Mapping[str, Any], vary: str, where: str = "") -> None:
    """What was set when a run began, such as the decay of its learning rate, is what this run sets.

    Args:
        vary: the field that changes in the course of a run.

    Raises:
        Mismatch: it isn't.
    """
    check_alike(found, own, where)
    for name, value in own.items():
        if name not in (vary, "params") and found[name] != value:
            raise Mismatch(f"{where}.{name}".lstrip("."), printable(value, 60), printable(found[name], 60))


def check_optimizer(found: Mapping[str, Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The state of an optimiser is one that it could have after ``steps``: of these parameters, and of their shapes.

    Raises:
        Mismatch: it isn't.
    """
    check(found, _Optimizer)
    own = optimizer.state_dict()["param_groups"]
    if len(own) != len(found["param_groups"]):
        raise Mismatch("param_groups", f"{len(own)} of them", str(len(found["param_groups"])))
    for mine, group in zip(own, found["param_groups"], strict=True):
        if mine["params"] != group.get("params") or mine.keys() != group.keys():
            raise Mismatch("param_groups", "the groups of this run", "others")
        check_settings(group, mine, "lr", "param_groups")
    if steps and not found["state"]:
        raise Mismatch("state", f"that of {steps} steps", "none")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    places = [place for group in own for place in group["params"]]
    shapes = {place: p.shape for place, p in zip(places, parameters, strict=True)}
    for place, entry in found["state"].items():
        for name, value in entry.items():
            if place not in shapes or not (
                value is None
                or isinstance(value, (int, float))
                or (isinstance(value, Tensor) and (value.dim() == 0 or value.shape == shapes[place]))
            ):
                raise Mismatch(f"state.{place}.{name}", "a number, or a tensor of its parameter's shape", "another")


@contextlib.contextmanager
def loading(path: Path, where: str) -> Iterator[None]:
    """Turns whatever goes wrong when a field of a checkpoint is taken up into an error that names it."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        lines = " ".join(str(error).split())[:160] or type(error).__name__
        raise malformed(path, where, "what this run would write there", lines) from error


def check_same(path: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A checkpoint is of the run that goes on.

    Args:
        path: of the checkpoint.
        kept: what the run was started with, as the checkpoint has it.
        now: what this run is started with.

    Raises:
        ArtifactError: they differ; says in what.
    """
    differing = {key: (value, now.get(key)) for key, value in kept.items() if value != now.get(key)}
    if differing:
        raise ArtifactError(
            f"{path} belongs to another run",
            expected=_told(differing, 0),
            found=_told(differing, 1),
            hint="take up that run as it was started, or choose a new folder",
        )


def _told(differing: dict[str, tuple[Any, Any]], side: int) -> str:
    """The values of one side that differ, options one by one."""
    parts = []
    for key, values in differing.items():
        if key == "options":
            told = [k for k in values[side] if values[0].get(k) != values[1].get(k)]
            parts += [f"{k}={values[side][k]}" for k in told]
        else:
            parts.append(f"{key} {str(values[side])[:12]}")
    return ", ".join(parts)


def left_behind(folder: Path) -> None:
    """Remove temporary files that a killed run left, of checkpoints and of what else it writes."""
    for path in folder.glob(f"{TEMPORARY}*.tmp*"):
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)
