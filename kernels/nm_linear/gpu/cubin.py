"""Runs kernels that were compiled elsewhere: cubins, launched through the CUDA driver, without Triton.

``MPCOMPILE_CUBINS`` names a folder that ``python -m bench.gpu.kernel_matrix --arch 90 --keep FOLDER`` has filled
with ``records.json`` files and, beside them, the cubins. Where the installed Triton cannot compile the kernels,
gpu/launch.py takes them from there. A :class:`Kernel` is called like a Triton kernel; its arguments go to the driver in
the order and with the types that the compiled entry point declares.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.nm_linear.gpu.build import EPILOGUES, Build, digest
from mpcompile.kernels.nm_linear.gpu.tiles import tiles_for
from mpcompile.kernels.nm_linear.packed import activate

VARIABLE = "MPCOMPILE_CUBINS"
MAP_BYTES = 128  # size of a tensor map (CUtensorMap)
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_SMALL_SHARED = 48 << 10  # bytes of shared memory that a launch may use without setting an attribute
# Enumerators of cuda.h.
_MAX_DYNAMIC_SHARED, _SWIZZLE_128B, _PROMOTE_128B = 8, 3, 2
_ELEMENTS = {torch.float16: 6, torch.bfloat16: 9}


@dataclass
class Box:
    """A matrix of 16-bit elements that a tensor map describes, read in boxes with the 128-byte swizzle.

    Attributes:
        base: the matrix, (rows, columns), with a column stride of 1.
        block_shape: rows and columns of a box.
    """

    base: Tensor
    block_shape: Sequence[int]


class Driver:
    """The few libcuda calls that a launch needs. The CUDA context is the one that torch has created."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self.cuda, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self.cuda.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'error %d' % code).decode()}")

    def function(self, cubin: bytes, name: str, shared: int) -> Any:
        """A kernel of a cubin, ready for launches with ``shared`` bytes of shared memory."""
        module, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), cubin)
        self._call("cuModuleGetFunction", ctypes.byref(kernel), module, name.encode())
        if shared > _SMALL_SHARED:
            self._call("cuFuncSetAttribute", kernel, _MAX_DYNAMIC_SHARED, ctypes.c_int(shared))
        return kernel

    def tensor_map(self, box: Box) -> Any:
        """The tensor map that describes a matrix to the tensor memory accelerator: 128 bytes, aligned to 64."""
        room = ctypes.create_string_buffer(MAP_BYTES + 64)
        encoded = (ctypes.c_char * MAP_BYTES).from_buffer(room, -ctypes.addressof(room) % 64)
        rows, columns = box.base.shape
        self._call(
            "cuTensorMapEncodeTiled",
            ctypes.byref(encoded),
            ctypes.c_int(_ELEMENTS[box.base.dtype]),
            ctypes.c_uint32(2),
            ctypes.c_void_p(box.base.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(box.base.stride(0) * box.base.element_size()),
            (ctypes.c_uint32 * 2)(*reversed(box.block_shape)),
            (ctypes.c_uint32 * 2)(1, 1),
            *map(ctypes.c_int, (0, _SWIZZLE_128B, _PROMOTE_128B, 0)),
        )
        return encoded

    def launch(self, function: Any, blocks: int, threads: int, shared: int, stream: int, values: list[Any]) -> None:
        """One launch of ``blocks`` blocks; ``values``: ctypes objects, one per parameter."""
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        sizes = [*map(ctypes.c_uint, (blocks, 1, 1, threads, 1, 1, shared))]
        self._call("cuLaunchKernel", function, *sizes, ctypes.c_void_p(stream), pointers, None)


@functools.cache
def driver() -> Any:
    return Driver()


def _records(path: Path) -> list[dict[str, Any]]:
    """The records in a ``records.json`` file.

    Raises:
        InputError: the file is not in the form that gpu/build.py writes.
    """
    kinds = {field.name: {"str": str, "int": int, "bool": bool}[str(field.type)] for field in fields(Build)}
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if all(type(record[name]) is kind for record in records for name, kind in kinds.items()):
            return list(records)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # reported below
    raise InputError(
        f"{path} is damaged",
        expected="a file from python -m bench.gpu.kernel_matrix --keep",
        hint="compile the kernels again",
    )


@dataclass
class Cubins:
    """The builds in a folder.

    Attributes:
        records: the record of each build, from ``record_of`` in gpu/build.py, plus ``cubin``, the path of its cubin.
    """

    folder: Path
    records: dict[Build, dict[str, Any]] = field(default_factory=dict)
    _loaded: dict[tuple[int, Build], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, folder: Path) -> Cubins:
        """Read every ``records.json`` in a folder and its subfolders.

        Raises:
            InputError: there is no usable build, a file is damaged, or a kernel's source has changed since.
        """
        cubins = cls(folder)
        names = [f.name for f in fields(Build)]
        for path in sorted(folder.rglob("records.json")):
            for record in _records(path):
                build = Build(**{name: record[name] for name in names})
                if "error" in record or record.get("scratch_bytes"):
                    continue
                if record.get("source") != digest(build.kernel):
                    raise InputError(
                        f"cubins in {folder} were compiled from another version of {build.kernel}",
                        expected=digest(build.kernel),
                        found=record.get("source"),
                        hint="compile them again: python -m bench.gpu.kernel_matrix --keep FOLDER",
                    )
                cubins.records[build] = {**record, "cubin": path.parent / f"{build.name}.cubin"}
        if not cubins.records:
            raise InputError(
                f"no compiled kernels in {folder}",
                expected="records.json and cubins",
                hint=f"python -m bench.gpu.kernel_matrix --keep {folder}",
            )
        return cubins

    def lacks(self, kernel: str, arch: int) -> str | None:
        """A message naming the first cubin that a kernel lacks here for an architecture, or None if it has all."""
        for tile in tiles_for(kernel, arch):
            for dtype in _DTYPES.values():
                for epilogue in EPILOGUES:
                    build = Build(kernel, tile.name, dtype, epilogue, arch)
                    if build not in self.records:
                        return f"{self.folder} holds no cubin {build.name}"
        return None

    def function(self, build: Build, device: int) -> Any:
        """The kernel of a build on a device; loaded once."""
        key = device, build
        if key not in self._loaded:
            record = self.records[build]
            code = record["cubin"].read_bytes()
            self._loaded[key] = driver().function(code, record["function"], record["smem_bytes"])
        return self._loaded[key]


@functools.cache
def given() -> Cubins | None:
    """The builds in the folder that :data:`VARIABLE` names, or None if it is not set."""
    folder = os.environ.get(VARIABLE)
    return Cubins.of(Path(folder)) if folder else None


def epilogue_of(act: str, bias: bool, scale: bool, residual: bool) -> str | None:
    """The one of :data:`EPILOGUES` that does this (with a bias of zeros if there is none), or None if none does."""
    if act != "none":
        return None if scale or residual else act
    if scale:
        return "scale_res" if residual else None
    return "res" if residual else "bias" if bias else "none"


def values_of(kinds: Sequence[str], args: Sequence[Any]) -> list[Any]:
    """Convert the arguments of a launch to those of the compiled entry point.

    Args:
        kinds: ``"map"``, ``"u32"`` or ``"u64"``, one per parameter.
        args: tensors, numbers and boxes; None for an operand that the kernel was compiled without. A box becomes its
            tensor map, shape and strides. The last two parameters are Triton's scratch pointers, which are null.

    Raises:
        InputError: the arguments do not match the entry point's parameters.
    """
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, Box):
            flat += [arg, *arg.base.shape, *arg.base.stride()]
        elif arg is not None:
            flat.append(arg)
    flat += [0] * 2
    fits = len(flat) == len(kinds) and all(isinstance(a, Box) == (k == "map") for a, k in zip(flat, kinds, strict=True))
    if not fits or any(isinstance(a, Tensor) and k != "u64" for a, k in zip(flat, kinds, strict=True)):
        raise InputError(
            "the arguments do not match the parameters of a cubin",
            expected=", ".join(kinds),
            found=f"{len(flat)} arguments",
        )
    made: list[Any] = []
    for arg, kind in zip(flat, kinds, strict=True):
        if isinstance(arg, Box):
            made.append(driver().tensor_map(arg))
        else:
            number = arg.data_ptr() if isinstance(arg, Tensor) else arg
            made.append(ctypes.c_uint64(number) if kind == "u64" else ctypes.c_int32(number))
    return made


@dataclass
class Kernel:
    """Replaces a kernel's module: ``gemm[grid](...)`` launches a cubin, with the arguments of the Triton kernel."""

    name: str
    arch: int
    cubins: Cubins

    @property
    def gemm(self) -> Kernel:
        return self

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self._run, grid[0])

    def _run(self, blocks: int, *args: Any, **options: Any) -> None:
        """Launch a cubin.

        Args:
            args: those of the Triton kernel: values, metadata and input in its order, bias, scale, residual, result,
                numbers.
        """
        *operands, bias, scale, residual, y = args[:7]
        act, numbers = options["ACT"], args[7:]
        epilogue = epilogue_of(act, bias is not None, scale is not None, residual is not None)
        separate_pass: tuple[str, Any, Any] | None = None
        if epilogue is None:  # not a compiled combination: all that follows the bias runs as a separate pass
            epilogue, separate_pass, scale, residual = "bias", (act, scale, residual), None, None
        out = int(y.shape[-1])
        if epilogue != "none" and bias is None:
            bias = _zeros(out, y.dtype, y.device)
        build = self._build(operands, epilogue, y, out, options)
        record = self.cubins.records.get(build)
        if record is None:
            raise InputError(
                f"no cubin {build.name} in {self.cubins.folder}",
                hint="compile it: python -m bench.gpu.kernel_matrix --keep FOLDER",
            )
        values = values_of(record["parameters"], [*operands, bias, scale, residual, y, *numbers])
        stream = _stream(y.device)
        function = self.cubins.function(build, y.device.index or 0)
        driver().launch(function, blocks, record["threads"], record["smem_bytes"], stream, values)
        if separate_pass is not None:
            y.copy_(_finish(y, *separate_pass))

    def _build(self, operands: list[Any], epilogue: str, y: Tensor, out: int, options: dict[str, Any]) -> Build:
        if "BN" in options:
            n, m, k = options["BN"], options["BM"], options["BK"]
        else:
            n, m, k = operands[0].block_shape[0], operands[1].block_shape[0], 128
        tile = f"{n}x{m}x{k}s{options['STAGES']}"
        return Build(self.name, tile, _DTYPES[y.dtype], epilogue, self.arch, aligned=out % 16 == 0)


@functools.lru_cache(maxsize=64)
def _zeros(out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(out, dtype=dtype, device=device)


def _finish(y: Tensor, act: str, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    y = activate(y, act)
    y = y if scale is None else y * scale
    return y if residual is None else y + residual


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
