"""The formats by name, and a function that runs a file of each. A new format is a file of its own and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpcompile.errors import GraphError, first_line
from mpcompile.export import aoti, onnx, pt2

FORMATS = ("mpc", "dense-masked")  # formats of `mpcompile compile`
EXPORTS = ("pt2", "aoti", "onnx", "dense-masked")  # formats of `mpcompile export`
_RUN: dict[str, Callable[[Path, Any], Any]] = {"pt2": pt2.run, "aoti": aoti.run, "onnx": onnx.run}


def run_exported(path: Path, kind: str, example: Any) -> Any:
    """Return the outputs of an exported file, for a check; None for ONNX if onnxruntime is not installed.

    They have the structure that the model returns; of ONNX, several outputs are a dict by name.

    Args:
        path: the file.
        kind: ``"pt2"``, ``"aoti"`` or ``"onnx"``.
        example: inputs in the form that was exported, with a batch of that size, or of any size if that was left free.

    Raises:
        GraphError: the file cannot be run.
    """
    try:
        with torch.no_grad():
            return _RUN[kind](path, example)
    except Exception as error:
        raise GraphError(f"{path} is written, but does not run: {first_line(error):.200}") from error
