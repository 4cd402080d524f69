"""Checkpoints of a training run: one file, whole or not at all, and the random numbers that go with it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpcompile.errors import ArtifactError

NAME = "checkpoint.pt"
FORMAT = 1


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
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, values, *rest = state["numpy"]
    np.random.set_state((name, np.array(values, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed all generators for one epoch of one rank."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint through a temporary file, on the disk before it takes the place of the last one.

    Raises:
        ArtifactError: the folder can't be written or the disk is full; the last checkpoint is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer wraps a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = f"the last checkpoint, {path}, is whole" if path.exists() else "there was none before"
        raise ArtifactError(
            f"can't write the checkpoint {path}",
            expected="a writable folder with room",
            found=getattr(error, "strerror", None) or str(error).splitlines()[0],
            hint=f"{kept}; make room and resume",
        ) from error


def read(path: Path) -> dict[str, Any]:
    """A checkpoint, unpickled as tensors and plain values alone.

    Raises:
        ArtifactError: the file is damaged, no checkpoint, or of a newer format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:
        raise ArtifactError(
            f"{path} can't be read as a checkpoint",
            expected="a file that mpcompile.distill wrote",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="remove it to start again",
        ) from error
    if version != FORMAT:
        raise ArtifactError(
            f"{path} has another format", expected=FORMAT, found=version, hint="resume with the version that wrote it"
        )
    return dict(state)


def left_behind(folder: Path) -> None:
    """Remove temporary files that a killed run left."""
    for path in folder.glob(f".{NAME}.*.tmp"):
        path.unlink(missing_ok=True)
