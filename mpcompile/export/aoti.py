"""AOTInductor packages: native code for machines like this one, which checks its inputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcompile.errors import GraphError, first_line
from mpcompile.export.package_guard import guarded
from mpcompile.export.pt2 import MAX_BATCH, call_arguments, program, registered
from mpcompile.io.ownership import write_signed


def save_aoti(gm: nn.Module, example: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Compile :func:`mpcompile.export.program` with AOTInductor into a package; ``options`` go to that function.

    Python loads the package with ``torch._inductor.aoti_load_package``, C++ with ``AOTIModelPackageLoader``. In both,
    it refuses inputs whose size, dtype or device it was not compiled for, and copies inputs of other strides. Messages
    number the inputs from 0.

    In Python, the package is called as ``example`` is given and returns what the model returns, with tensors in place
    of numbers; the entries of a nested dict must have the order of the example. C++ passes and receives flat lists of
    tensors: the inputs in the order of the model's parameters, and of keys and items within one, as
    :func:`mpcompile.export.save_onnx` names them.

    Args:
        gm: from :func:`mpcompile.transform` or :func:`mpcompile.load`.
        example: a batch (batch, channels, height, width), a tuple of inputs, or a mapping of keyword inputs.
        path: the file to write; it ends in ``.pt2``.
        options: ``engine`` and ``dynamic_batch``.

    Raises:
        ArtifactError: the file cannot be written.
        GraphError: see :func:`mpcompile.export.program`; or Inductor cannot compile it.
    """
    exported = registered(program(gm, example, **options))

    def write(package: Path) -> None:
        try:
            with guarded(package, 1, MAX_BATCH):
                torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
        except (OSError, GraphError):
            raise
        except Exception as error:
            hint = "check that a C++ compiler is installed, or export pt2"
            raise GraphError(f"AOTInductor cannot compile the graph: {first_line(error):.200}", hint=hint) from error

    write_signed(path, write, suffix=".pt2")


def run(path: Path, example: Any) -> Any:
    """Return the output of a package."""
    args, kwargs = call_arguments(example)
    return torch._inductor.aoti_load_package(str(path))(*args, **kwargs)
