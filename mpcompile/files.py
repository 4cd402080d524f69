"""Files that commands read and write: checkpoints in, text out, never half-written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcompile.errors import ArtifactError


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it, so that nothing half-written is left.

    Raises:
        ArtifactError: the folder is missing or not writable, or the disk is full; an older file is untouched.
    """
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a temporary file beside ``path``, then put it in its place.

    Raises:
        ArtifactError: as :func:`write_atomically`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"can't write {path}", expected="a writable folder with room", found=error.strerror or str(error)
        ) from error


def make_folder(path: Path) -> None:
    """A folder and those it lies in, where they aren't there yet.

    Raises:
        ArtifactError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"can't make the folder {path}", found=error.strerror or str(error)) from error


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state dict in a safetensors file, or in a torch file that holds tensors only (weights_only).

    Raises:
        ArtifactError: the file is missing, truncated or not a checkpoint.
    """
    if not path.is_file():
        raise ArtifactError(f"there is no checkpoint {path}", expected="a .safetensors, .pt or .pth file", found="none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(
            f"{path} can't be read as a checkpoint",
            expected="a whole safetensors file, or a torch file of tensors alone",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="fetch the file again, or save the state dict with safetensors",
        ) from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ArtifactError(f"{path} holds no state dict", expected="tensors by name", found=type(state).__name__)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file into a model.

    Raises:
        ArtifactError: as :func:`read_checkpoint`, or its tensors aren't the model's.
    """
    state = read_checkpoint(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ArtifactError(
            f"{path} doesn't fit the model", expected="its own tensors", found=" ".join(lines[1:3]) or str(error)
        ) from error
