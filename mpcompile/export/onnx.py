"""ONNX files of dense weights with zeros, in which TensorRT detects 2:4 weights by itself."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from mpcompile.capture.signature import input_names, output_names
from mpcompile.config import Config
from mpcompile.errors import ConfigError, GraphError, first_line
from mpcompile.export.pt2 import call_arguments, export_lowered, finish
from mpcompile.io.ownership import write_signed
from mpcompile.kernels import ops
from mpcompile.kernels.token_merge.exported import token_merge
from mpcompile.pipeline import lower
from mpcompile.runtimes.onnxruntime import OnnxRuntime


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
    converted = _converted(gm, example, Config(engine="dense"), dynamic_batch)
    write_signed(path, lambda temporary: converted.save(temporary, include_initializers=True), suffix=".onnx")


def write_onnx(model: nn.Module, example: Any, path: Path) -> None:
    """Write an ONNX file of a model as it is, for a runtime: a dense model stays dense and computes all of its tokens.

    Args:
        model: a dense model, or one from :func:`mpcompile.transform`.
        example: as in :func:`save_onnx`.
        path: the file, which is overwritten.

    Raises:
        MPCompileError: as :func:`save_onnx`.
    """
    as_it_is = Config(pattern="dense", engine="dense", skip_dead_tokens=False)
    _converted(model, example, as_it_is, dynamic_batch=False).save(path, include_initializers=True)


def _converted(model: nn.Module, example: Any, config: Config, dynamic_batch: bool) -> torch.onnx.ONNXProgram:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs the package {' and '.join(missing)}", hint="run pip install 'mpcompile[onnx]'")
    lowered = lower(model, example, config)
    outputs = _return_tensors(lowered)
    exported = export_lowered(lowered, example, "dense", dynamic_batch, {ops.token_merge: token_merge})
    inputs = _tensor_inputs(exported)
    outputs = [f"output.{name}" if name in inputs else name for name in outputs]
    try:
        with torch.no_grad():  # attention with a bias that needs gradients has another layout
            converted = torch.onnx.export(
                exported, (), dynamo=True, verbose=False, input_names=inputs, output_names=outputs
            )
    except Exception as error:
        raise GraphError(
            f"the graph cannot be converted to ONNX: {first_line(_cause(error)):.200}", hint="export pt2 or aoti"
        ) from error
    assert converted is not None  # with dynamo=True
    return converted


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
    runtime = OnnxRuntime()
    if not runtime.installed:
        return None
    args, kwargs = call_arguments(example)
    return runtime.load(path)(*args, **kwargs)
