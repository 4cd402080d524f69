"""ONNX files of dense weights with zeros, in which TensorRT detects 2:4 weights by itself."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from mpcompile.errors import ConfigError, GraphError, first_line
from mpcompile.export.pt2 import program
from mpcompile.io.ownership import write_signed


def save_onnx(gm: nn.Module, example: Tensor, path: str | os.PathLike[str], *, dynamic_batch: bool = False) -> None:
    """Write an ONNX file of dense weights with zeros; the input is ``x``, the output ``logits``.

    Args:
        gm: from :func:`mpcompile.transform` or :func:`mpcompile.load`.
        example: a batch (batch, channels, height, width).
        path: the file to write.
        dynamic_batch: leave the batch size free (1 to 4096).

    Raises:
        ConfigError: the packages onnx and onnxscript are not installed.
        ArtifactError: the file cannot be written.
        GraphError: ONNX lacks an operator of the graph.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs the package {' and '.join(missing)}", hint="pip install 'mpcompile[onnx]'")
    exported = program(gm, example, engine="dense", dynamic_batch=dynamic_batch)
    try:
        converted = torch.onnx.export(
            exported, (), dynamo=True, verbose=False, input_names=["x"], output_names=["logits"]
        )
    except Exception as error:
        raise GraphError(
            f"the graph cannot be converted to ONNX: {first_line(error):.200}", hint="export pt2 or aoti"
        ) from error
    assert converted is not None  # with dynamo=True
    write_signed(path, lambda temporary: converted.save(temporary, include_initializers=True), suffix=".onnx")


def run(path: Path, example: Tensor) -> Tensor | None:
    """Return the first output of an ONNX file; None if onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: example.numpy()})[0])
