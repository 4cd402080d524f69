"""Checkpoints: state dicts read from files of any origin, without running or importing anything that a file names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from mpcompile.errors import ArtifactError, first_line, message_lines
from mpcompile.io.reading import open_regular
from mpcompile.io.state_dicts import StateDict, explain_misfit, find_state, match_names, replacements, strip_wrappers

WEIGHTS = "model.safetensors"  # the file that is read if the path is a folder


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a safetensors file, or in a torch file of tensors (``weights_only``).

    Wrapper prefixes that all names share (``module.``, ``_orig_mod.``) are removed, and the state dict is found in the
    entries where training scripts put it; each such step is logged. If the path is a folder, its ``model.safetensors``
    is read. A file that :func:`mpcompile.save` wrote yields its dense weights, with zeros where masks remove weights.

    Raises:
        ArtifactError: the file is missing, truncated or not a checkpoint.
    """
    source = strip_wrappers(_read_state(path))
    source.log_steps(path)
    return source.state


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file into a model. Wrapper prefixes that only the file's names have are removed.

    Raises:
        ArtifactError: as :func:`read_checkpoint`, or the tensors do not fit the model.
    """
    source = match_names(_read_state(path), model)
    misfit = explain_misfit(source.state, model)
    if misfit is None:
        try:
            model.load_state_dict(source.state)
        except (RuntimeError, TypeError, AttributeError) as error:
            misfit = "the model's own tensors", " ".join(message_lines(error)[1:3]) or str(error)
        else:
            source.log_steps(path)
            return
    raise ArtifactError(f"{path} does not fit the model", expected=misfit[0], found=misfit[1])


def is_artifact(path: Path) -> bool:
    """Return True if a file's metadata says that :func:`mpcompile.save` wrote it, or if a folder holds such a file."""
    from safetensors import safe_open

    path = path / WEIGHTS if path.is_dir() else path
    try:
        with open_regular(path), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return metadata.get("format") == "mpcompile" or "modules" in metadata
    except Exception:
        return False


def _read_state(path: Path) -> StateDict:
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        problem = "something other than a regular file" if path.exists() else "none"
        expected = "a .safetensors, .pt or .pth file"
        raise ArtifactError(f"there is no checkpoint {path}", expected=expected, found=problem)
    try:
        content = _read(path)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be read as a checkpoint",
            expected="a complete safetensors file, or a torch file that holds only tensors",
            found=first_line(error),
            hint="fetch the file again, or save the state dict with safetensors",
        ) from error
    return find_state(content, path)


def _read(path: Path) -> Any:
    """Return the content of a file, read according to its format."""
    with open_regular(path) as file:
        head = file.read(9)
        if head[8:9] != b"{" and path.suffix != ".safetensors":
            return _unpickle(file, path)
    if is_artifact(path):
        from mpcompile.artifact import load
        from mpcompile.export import dense_state

        return dense_state(load(path))
    from safetensors.torch import load_file

    return load_file(path)


def _unpickle(file: BinaryIO, path: Path) -> Any:
    """Return the content of a torch file, ignoring objects other than tensors; nothing that it names is imported."""
    problem: pickle.UnpicklingError | None = None
    # Objects of dict subclasses have to be filled like dicts. Such a class is recognised by its name, or else by the
    # failure of the first attempt.
    for as_dicts in (False, True):
        file.seek(0)
        classes = replacements(file, as_dicts)
        file.seek(0)
        try:
            with torch.serialization.safe_globals(classes):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            problem = error
            if "SETITEM" not in str(error):
                break
    reason = str(problem).rpartition("WeightsUnpickler error: ")[2].strip()
    raise ArtifactError(
        f"{path} cannot be read as a checkpoint",
        expected="tensors by name, and plain values",
        found=reason.partition("\n")[0].partition(" Please use")[0],
        hint="save model.state_dict() with torch.save or safetensors",
    ) from problem
