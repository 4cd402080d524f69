"""The environment of a run: versions, processor, compiler, caches, and the conditions of a measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcompile._version import __version__
from mpcompile.errors import InputError
from mpcompile.kernels import machine, store, timing
from mpcompile.kernels.cpu import build

_PACKAGES = ("timm", "triton", "numpy", "onnxruntime", "openvino")
_VARIABLES = ("MPCOMPILE_CPU_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # each forces an instruction set
_LIBRARIES = (".so", ".dll", ".dylib")


def environment() -> dict[str, Any]:
    """Return the details of this machine that a bug report needs, as plain JSON values.

    Nothing is compiled, timed or written. Values that are unknown or do not exist are None.

    Returns:
        ``mpcompile``, ``python`` and the packages ``torch``, ``timm``, ``triton``, ``numpy``, ``onnxruntime`` and
        ``openvino``: versions. ``system``: operating system and architecture. ``processor``: model name. ``isa``: the
        instruction set of the CPU kernels, or why there is none; ``torch_isa``: that of torch; ``isa_forced``:
        environment variables that narrow either. ``cores``: logical cores that this process may use; ``threads``:
        threads of torch; ``memory_bytes``: memory of the machine. ``compiler``, ``compiler_version``: the C++ compiler.
        ``cuda``, ``cuda_driver``: versions; ``cuda_devices``: names. ``cache``: the cache folder; ``cache_bytes``: its
        size; ``kernel_libraries``: CPU kernel libraries built there; ``timings``: the file of this machine's timings,
        or None if nothing has been timed.

    Example:
        >>> environment()["mpcompile"] == __version__
        True
    """
    return {
        "mpcompile": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # with the build, such as +cu130
        **{name: _version(name) for name in _PACKAGES},
        "system": platform.platform(),
        **_processor(),
        **_compiler(),
        **_cuda(),
        **_cache(),
    }


def conditions(batch: Any) -> dict[str, Any]:
    """Return the conditions of a latency: ``device``, ``threads``, ``torch``, ``dtype`` and size of the ``batch``.

    Raises:
        InputError: the batch holds no tensor.
    """
    tensor = first_tensor(batch)
    device = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else machine.cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "batch": tensor.shape[0],
    }


def first_tensor(batch: Any) -> Tensor:
    """Return the first tensor of a batch: a tensor, or a mapping or sequence that holds one.

    Raises:
        InputError: there is none.
    """
    tensor = next(_tensors(batch), None)
    if tensor is not None:
        return tensor
    raise InputError("inputs hold no tensor", expected="batches of tensors", found=type(batch).__name__)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> dict[str, Any]:
    try:
        isa = build.detect_isa()
    except build.Unavailable as error:
        isa = str(error)
    return {
        "processor": machine.cpu_name(),
        "isa": isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "isa_forced": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "cores": machine.core_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not on this system
        return None


def _compiler() -> dict[str, Any]:
    try:
        command = build.compiler()
    except build.Unavailable:
        return {"compiler": None, "compiler_version": None}
    version = build.compiler_version(tuple(command))
    return {"compiler": " ".join(command), "compiler_version": next(iter(version.splitlines()), None)}


def _cuda() -> dict[str, Any]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cuda": torch.version.cuda,
        "cuda_driver": _driver(),
        "cuda_devices": [torch.cuda.get_device_name(index) for index in range(count)],
    }


def _driver() -> str | None:
    """Return the version of NVIDIA's kernel module on Linux."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    version = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return None if version is None else version.group()


def _cache() -> dict[str, Any]:
    folder, timings = store.cache_folder(), timing.cache_file()
    files = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    return {
        "cache": str(folder),
        "cache_bytes": sum(_size(path) for path in files),
        "kernel_libraries": sorted(path.name for path in files if path.suffix in _LIBRARIES),
        "timings": str(timings) if timings.exists() else None,
    }


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # removed by another process meanwhile
        return 0
