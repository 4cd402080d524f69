"""ONNX files of dense weights with zeros, in which TensorRT detects 2:4 weights by itself."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from mpcompile.capture.signature import input_names, output_names
from mpcompile.config import Config
from mpcompile.errors import ConfigError, GraphError, first_line
from mpcompile.export.pt2 import export_lowered, finish
from mpcompile.io.ownership import write_signed
from mpcompile.pipeline import lower


def save_onnx(gm: nn.Module, example: Any, path: str | os.PathLike[str], *, dynamic_batch: bool = False) -> None:
    """Write an ONNX file of dense weights with zeros.

    Its inputs and outputs are the tensors that the model takes and returns, in their order, and have the names of
    parameters, keys and fields (``pixel_values``; ``batch.image``; ``hidden_states.0``). The output of a model that
    returns a single tensor is called ``logits`` if it is (batch, classes), else ``output``. Inputs and outputs that are
    None or numbers are left out; numbers have the values of the example. An output with the name of an input is called
    ``output.NAME``.

    Args:
        gm: from :func:`mpcompile.transform` or :func:`mpcompile.load`.
        example: a batch (batch, channels, height, width), a tuple of inputs, or a mapping of keyword inputs.
        path: the file to write.
        dynamic_batch: leave the batch size free, as in :func:`mpcompile.export.program`.

    Raises:
        ConfigError: the packages onnx and onnxscript are not installed.
        ArtifactError: the file cannot be written.
        GraphError: ONNX lacks an operator of the graph; or see :func:`mpcompile.export.program`.
        InputError: the example lacks an input.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> save_onnx(gm, {"input": torch.randn(8, 16)}, "model.onnx", dynamic_batch=True)
        >>> mpcompile.export.run_exported("model.onnx", "onnx", {"input": torch.randn(3, 16)}).shape
        torch.Size([3, 4])
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs the package {' and '.join(missing)}", hint="pip install 'mpcompile[onnx]'")
    lowered = lower(gm, example, Config(engine="dense"))
    outputs = _return_tensors(lowered)
    exported = export_lowered(lowered, example, "dense", dynamic_batch)
    inputs = _tensor_inputs(exported)
    outputs = [f"output.{name}" if name in inputs else name for name in outputs]
    try:
        converted = torch.onnx.export(
            exported, (), dynamo=True, verbose=False, input_names=inputs, output_names=outputs
        )
    except Exception as error:
        raise GraphError(
            f"the graph cannot be converted to ONNX: {first_line(_cause(error)):.200}", hint="export pt2 or aoti"
        ) from error
    assert converted is not None  # with dynamo=True
    write_signed(path, lambda temporary: converted.save(temporary, include_initializers=True), suffix=".onnx")


def _cause(error: BaseException) -> BaseException:
    """Return the first error of a chain: torch puts a guide for bug reports around it."""
    return error if error.__cause__ is None else _cause(error.__cause__)


def _return_tensors(gm: fx.GraphModule) -> list[str]:
    """Make a graph return a tuple of its tensors; return a list that holds their names once the graph has run."""
    names = output_names(gm)
    found: list[str] = []

    def tensors(tree: Any) -> tuple[Tensor, ...]:
        leaves = dict(zip(names, pytree.tree_leaves(tree), strict=True))
        found[:] = [name for name, leaf in leaves.items() if isinstance(leaf, Tensor)]
        return tuple(leaves[name].clone() for name in found)  # ONNX gives two outputs that are one tensor one name

    finish(gm, tensors)
    return found


def _tensor_inputs(exported: torch.export.ExportedProgram) -> list[str]:
    """Return the names of the inputs that are tensors."""
    given = [spec.arg for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    names = zip(input_names(exported.module()), given, strict=True)
    return [name for name, argument in names if isinstance(argument, TensorArgument)]


def run(path: Path, example: Any) -> Any:
    """Return the output of an ONNX file, or a dict of several by name; None if onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = _feed([node.name for node in session.get_inputs()], example)
    names = [node.name for node in session.get_outputs()]
    found = dict(zip(names, map(torch.from_numpy, session.run(names, feed)), strict=True))
    return next(iter(found.values())) if len(found) == 1 else found


def _feed(names: list[str], example: Any) -> dict[str, Any]:
    """Return the arrays of an example by the names of the inputs: by keyword for a mapping, else in their order."""
    if not isinstance(example, Mapping):
        given = example if isinstance(example, (tuple, list)) else (example,)
        given = [value for value in given if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))]
        example = dict(zip(dict.fromkeys(name.partition(".")[0] for name in names), given, strict=True))
    owners = {name.partition(".")[0] for name in names}
    if len(owners) == 1 and not owners & example.keys():  # the mapping is the one input
        example = {owners.pop(): example}
    leaves = {}
    for keys, leaf in pytree.tree_leaves_with_path(_plain(example)):
        leaves[".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)] = leaf
    return {name: leaves[name].numpy() for name in names}


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
