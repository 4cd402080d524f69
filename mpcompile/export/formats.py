"""The formats by name, and a function that runs a file of each. A new format is a file of its own and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mpcompile.errors import GraphError, first_line
from mpcompile.export import aoti, onnx, pt2

FORMATS = ("mpc", "dense-masked")  # formats of `mpcompile compile`
EXPORTS = ("pt2", "aoti", "onnx", "dense-masked")  # formats of `mpcompile export`
_RUN: dict[str, Callable[[Path, Tensor], Tensor | None]] = {"pt2": pt2.run, "aoti": aoti.run, "onnx": onnx.run}


def run_exported(path: Path, kind: str, example: Tensor) -> Tensor | None:
    """Return the output of an exported file, for a check; None for ONNX if onnxruntime is not installed.

    Args:
        path: the file.
        kind: ``"pt2"``, ``"aoti"`` or ``"onnx"``.
        example: a batch of the size that was exported, or of any size if that was left free.

    Raises:
        GraphError: the file cannot be run.
    """
    try:
        with torch.no_grad():
            return _RUN[kind](path, example)
    except Exception as error:
        raise GraphError(f"{path} is written, but does not run: {first_line(error):.200}") from error
