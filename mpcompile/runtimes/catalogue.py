"""The runtimes by name, and a function that brings a model into one of them."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.errors import ConfigError
from mpcompile.export.onnx import write_onnx
from mpcompile.runtimes.base import Arguments, Build, Runtime
from mpcompile.runtimes.onnxruntime import OnnxRuntime
from mpcompile.runtimes.openvino import OpenVino

RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (OnnxRuntime(), OpenVino())}


def named(names: str | Sequence[str]) -> list[Runtime]:
    """Return runtimes by their names.

    Raises:
        ConfigError: there is no such runtime, or it is not installed.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in names:
        if name not in RUNTIMES:
            raise ConfigError("there is no such runtime", expected=f"one of {', '.join(RUNTIMES)}", found=repr(name))
        RUNTIMES[name].check()
    return [RUNTIMES[name] for name in names]


@contextlib.contextmanager
def exported(model: nn.Module, inputs: Any) -> Iterator[Path]:
    """Yield a temporary ONNX file of a model for inputs of this size.

    Args:
        model: from :func:`fp32_copy`.
        inputs: as for :func:`mpcompile.transform`, in fp32.

    Raises:
        MPCompileError: as :func:`mpcompile.export.save_onnx`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, inputs, path)
        yield path


def fp32_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model in fp32 and in eval mode."""
    return copy.deepcopy(model).float().eval()


def in_fp32(inputs: Any) -> Any:
    """Return inputs with their floating-point tensors in fp32."""
    convert = lambda tensor: tensor.float() if tensor.is_floating_point() else tensor  # noqa: E731
    return pytree.tree_map_only(Tensor, convert, inputs)


def build(
    model: nn.Module,
    inputs: Any,
    runtime: str,
    precision: str = "fp32",
    threads: int | None = None,
    calibration: Iterable[Arguments] = (),
) -> Build:
    """Return a model in another runtime, as a callable with a name and a version.

    Args:
        model: a dense model, or one from :func:`mpcompile.transform`, whose merging and dead tokens are kept and whose
            masked weights are zeros; it does not change.
        inputs: as for :func:`mpcompile.transform`; the build takes inputs of this size, and shorter batches.
        runtime: a key of :data:`RUNTIMES`.
        precision: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        threads: of the processor; None for as many as torch uses.
        calibration: ``(args, kwargs)`` of calls from which the ranges of int8 are taken.

    Raises:
        ConfigError: the runtime is not installed, has no such precision, or int8 lacks its calibration.
        MPCompileError: as :func:`mpcompile.export.save_onnx`.
        Exception: whatever the runtime raises if it cannot take the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> found = build(model, torch.randn(2, 16), "onnxruntime")
        >>> found.name, found(torch.randn(2, 16)).shape
        ('ONNX Runtime', torch.Size([2, 4]))
    """
    (chosen,) = named(runtime)
    with exported(fp32_copy(model), in_fp32(inputs)) as path, torch.no_grad():
        return chosen.load(path, precision, threads, calibration)
