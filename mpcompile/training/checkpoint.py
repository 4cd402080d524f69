"""Checkpoints of a training run: one file, whole or not at all, and the random numbers that go with it."""

from __future__ import annotations

import hashlib
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import nn

from mpcompile.errors import ArtifactError

NAME = "checkpoint.pt"
FORMAT = 2


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

    Raises:
        ArtifactError: the folder can't be written or the disk is full; the last checkpoint is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    noting = None
    try:
        with open(temporary, "wb") as file:
            noting = _Noting(file)
            torch.save({"format": FORMAT, **state}, cast(IO[bytes], noting))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
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


class _Noting:
    """A file that keeps the error of a write: torch's writer makes something else of a full disk."""

    def __init__(self, file: IO[bytes]) -> None:
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
    """A checkpoint, unpickled as tensors and plain values alone.

    Raises:
        ArtifactError: the file is damaged, no checkpoint, or of a newer format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:
        found = getattr(error, "strerror", None)
        if found is None:
            found = "something else in it" if zipfile.is_zipfile(path) else "a damaged file"
        raise ArtifactError(
            f"{path} can't be read as a checkpoint",
            expected="a whole file that mpcompile.distill wrote",
            found=found,
            hint="remove it to start again",
        ) from error
    if version != FORMAT:
        raise ArtifactError(
            f"{path} has another format", expected=FORMAT, found=version, hint="resume with the version that wrote it"
        )
    return dict(state)


def check_same(path: Path, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A checkpoint is of the run that goes on.

    Args:
        path: of the checkpoint.
        kept: what the run was started with, as the checkpoint has it.
        now: what this run is started with.

    Raises:
        ArtifactError: they differ; says in what.
    """
    differing = {key: (value, now[key]) for key, value in kept.items() if value != now.get(key)}
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
            parts += [f"{k}={values[side][k]}" for k in values[side] if values[0].get(k) != values[1].get(k)]
        else:
            parts.append(f"{key} {str(values[side])[:12]}")
    return ", ".join(parts)


def left_behind(folder: Path) -> None:
    """Remove temporary files that a killed run left, of checkpoints and of what else it writes."""
    written = (NAME, "log.jsonl", "result.json", "student.stamp")
    for pattern in (*(f".{name}.*.tmp" for name in written), ".mpcompile-*.tmp", ".student.*.mpc"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
