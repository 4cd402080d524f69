"""Compilation of the kernels for a named architecture, without a GPU, and statistics of the result.

    python -m mpcompile.kernels.nm_linear.gpu.build BUILDS.json FOLDER

BUILDS.json is a list of objects with the fields of :class:`Build`. A cubin and a PTX file per build, and
``records.json``, are written to FOLDER. Triton 3.9 must be importable; if torch installed an older one, put the folder
of a newer one first in ``PYTHONPATH``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpcompile.errors import InputError
from mpcompile.kernels.nm_linear.gpu.tiles import MODULES, Tile, tiles_of
from mpcompile.kernels.nm_linear.gpu.triton_support import old_triton

_SPARSE = {"mma": r"\bHMMA\.SP\.16832\.F32", "wgmma": r"\bHGMMA\.SP\.64x\d+x32\.F32"}
_TYPED = {"fp16": r"(?!\.BF16)\b", "bf16": r"\.BF16\b"}
DTYPES = {"fp16": "fp16", "bf16": "bf16"}
EPILOGUES = ("none", "bias", "relu", "gelu", "gelu_tanh", "silu", "res", "scale_res")
_BATCH = 12  # builds per process: importing torch takes as long as compiling three
_DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    Attributes:
        kernel, tile: names in :data:`mpcompile.kernels.nm_linear.gpu.tiles.TILES`.
        dtype: ``"fp16"`` or ``"bf16"``.
        epilogue: one of :data:`EPILOGUES`: none, bias, bias and activation, bias and residual, or bias, scale and
            residual.
        arch: 80 for compute capability 8.0, and so on.
        aligned: True if the number of output features is a multiple of 16.
    """

    kernel: str
    tile: str
    dtype: str
    epilogue: str
    arch: int
    aligned: bool = True

    @property
    def name(self) -> str:
        ending = "" if self.aligned else "-unaligned"
        return f"{self.kernel}-{self.tile}-{self.dtype}-{self.epilogue}-sm{self.arch}{ending}"

    @property
    def cut(self) -> Tile:
        return next(tile for tile in tiles_of(self.kernel) if tile.name == self.tile)


@functools.cache
def digest(kernel: str) -> str:
    """Return a digest of the files that a kernel is compiled from; a record with another digest is outdated."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in kernel_files(kernel))).hexdigest()[:12]


def kernel_files(kernel: str) -> list[Path]:
    """Return the files that a kernel is compiled from."""
    folder = Path(__file__).parent.parent / "gluon"
    own = {"gluon_mma_conv": ("mma_conv", "mma_sp")}.get(kernel, (kernel.removeprefix("gluon_"),))
    return [folder / f"{name}.py" for name in (*own, "parts")]


def parts_of(epilogue: str) -> tuple[str, bool, bool, bool]:
    """Return the activation of an epilogue, and flags for bias, scale and residual."""
    act = epilogue if epilogue in ("relu", "gelu", "gelu_tanh", "silu") else "none"
    return act, epilogue != "none", epilogue == "scale_res", epilogue in ("res", "scale_res")


def source_of(build: Build) -> Any:
    """Return the kernel with its argument types, as input for Triton's compiler."""
    from triton.experimental.gluon._runtime import GluonASTSource

    tile, dtype = build.cut, DTYPES[build.dtype]
    act, bias, scale, res = parts_of(build.epilogue)
    pointers = {"bias_ptr": bias, "scale_ptr": scale, "res_ptr": res}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    kernel = importlib.import_module(MODULES[build.kernel]).gemm
    if build.kernel != "gluon_wgmma_sp":
        signature |= {"A_ptr": "*i32", "E_ptr": "*i32", "X_ptr": "*i32"}
        constants |= {"BN": tile.n, "BM": tile.m, "BK": tile.k, "WN": tile.warps_n, "WM": tile.warps_m}
        numbers = tuple(name for name in kernel.arg_names if not name.endswith("_ptr"))
    else:
        from triton.experimental.gluon import language as gl

        shared = gl.NVMMASharedLayout(128, 16, 2)
        signature |= {
            key: f"tensordesc<{dtype}[{rows},64],{shared!r}>" for key, rows in (("wd", tile.n), ("xd", tile.m))
        }
        signature["E_ptr"] = "*i32"
        constants["GROUPS"] = tile.warps // 4
        numbers = ("M", "N", "steps", "ldy", "ldr")
    for name, present in pointers.items():
        signature[name] = f"*{dtype}" if present else "constexpr"
        if not present:
            constants[name] = None
    signature["Y_ptr"] = f"*{dtype}"
    signature |= dict.fromkeys(numbers, "i32")
    numbers = tuple(name for name in numbers if name not in constants and name not in ("STAGES", "ACT", "DT"))
    constants |= {"STAGES": tile.stages, "ACT": act, "DT": {"fp16": "f16"}.get(dtype, dtype)}
    order = kernel.arg_names
    signature = {name: signature.get(name, "constexpr") for name in order}
    rows = ("K", "ldx", "C", "N", "ldy", "ldr") if build.aligned else ("K", "ldx", "C")
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or name in rows]
    return GluonASTSource(
        kernel,
        signature,
        constexprs={(order.index(name),): value for name, value in constants.items()},
        attrs={(order.index(name),): _DIVISIBLE for name in aligned},
    )


def compile_build(build: Build) -> Any:
    """Compile a build; the ``asm`` of the result holds ``"ptx"`` and ``"cubin"``."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": build.cut.warps, "enable_fp_fusion": True}
    return triton.compile(source_of(build), target=GPUTarget("cuda", build.arch, 32), options=options)


def _tool(name: str, *arguments: str) -> str:
    from triton.backends import nvidia

    program = str(Path(str(nvidia.__file__)).parent / "bin" / name)
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def entry_parameters(ptx: str) -> list[str]:
    """Return the parameter types of the entry of a PTX module: ``"map"`` (a tensor map), ``"u64"`` or ``"u32"``."""
    signature = ptx[ptx.index(".entry") :].split(")", 1)[0]
    return ["map" if bits == "b8" else f"u{bits[1:]}" for bits in re.findall(r"\.param .*?\.([ub]\d+)\b", signature)]


def record_of(build: Build, folder: Path) -> dict[str, Any]:
    """Compile a build into ``folder`` and return its record.

    Returns:
        The fields of the build, ``source`` (see :func:`digest`), ``triton``, ``registers``, ``spill_bytes`` (stack per
        thread), ``smem_bytes``, ``sparse_instructions``, counts of other ``instructions``, ``threads``, ``seconds``,
        and ``function``, ``parameters``, ``scratch_bytes`` for a launch; or ``error`` instead.
    """
    import triton

    record: dict[str, Any] = {**dataclasses.asdict(build), "source": digest(build.kernel), "triton": triton.__version__}
    start = time.perf_counter()
    try:
        made = compile_build(build)
    except Exception as error:  # recorded, so that the other builds continue
        return record | {"error": f"{type(error).__name__}: {str(error).strip()[-400:]}"}
    record["seconds"] = round(time.perf_counter() - start, 2)
    cubin, ptx = folder / f"{build.name}.cubin", folder / f"{build.name}.ptx"
    cubin.write_bytes(made.asm["cubin"])
    ptx.write_text(made.asm["ptx"])
    sass = _tool("cuobjdump", "-sass", str(cubin))
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", str(cubin))))
    opcodes = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w+)", sass, re.M))
    record |= {
        "function": made.metadata.name,
        "parameters": entry_parameters(made.asm["ptx"]),
        "scratch_bytes": made.metadata.global_scratch_size + made.metadata.profile_scratch_size,
        "threads": int(re.search(r"\.reqntid (\d+)", made.asm["ptx"])[1]),  # type: ignore[index]
        "registers": int(usage["REG"]),
        "spill_bytes": int(usage["STACK"]) + int(usage["LOCAL"]),
        "smem_bytes": int(made.metadata.shared),
        "sparse_instructions": len(re.findall(_SPARSE[build.kernel.split("_")[1]] + _TYPED[build.dtype], sass)),
        "instructions": {name: opcodes[name] for name in ("LDSM", "LDGSTS", "UTMALDG", "STG", "LDL", "STL", "BAR")},
    }
    return record


def environment(folder: Path | None = None) -> dict[str, str]:
    """Return environment variables for a process that imports a Triton with ``gl.inline_asm``.

    Args:
        folder: where a newer Triton was installed with ``pip install --no-deps --target``; by default the folder that
            ``MPCOMPILE_TRITON`` names. Ignored if the installed Triton is new enough.

    Raises:
        InputError: no such Triton is found.
    """
    reason = old_triton()
    if reason is None:
        return dict(os.environ)
    target = folder or Path(os.environ.get("MPCOMPILE_TRITON") or ".triton")
    if not (target / "triton" / "__init__.py").is_file():
        raise InputError(
            f"{reason}, and there is no newer one in {target}",
            hint=f"run pip install --no-deps --target {target} 'triton>=3.9', or name its folder in MPCOMPILE_TRITON",
        )
    path = [str(target.resolve()), *sys.path[1:], os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in path if part)}


def compile_all(
    builds: Sequence[Build], folder: Path, triton: Path | None = None, jobs: int = 2
) -> Iterator[tuple[Build, dict[str, Any]]]:
    """Compile in subprocesses, which may use a newer Triton than this one; cubins and PTX are written to ``folder``.

    Yields:
        Each build with its record (see :func:`record_of`), in no particular order.

    Raises:
        InputError: no Triton can compile the kernels, or a process failed.
    """
    env, waiting = environment(triton), [builds[i : i + _BATCH] for i in range(0, len(builds), _BATCH)]
    running: list[tuple[Sequence[Build], Path, subprocess.Popen[bytes], Any]] = []
    folder.mkdir(parents=True, exist_ok=True)
    batches = iter(enumerate(waiting))
    while True:
        while len(running) < jobs and (following := next(batches, None)) is not None:
            number, part = following
            out, file = folder / f"{number:03d}", folder / f"{number:03d}.json"
            file.write_text(json.dumps([dataclasses.asdict(build) for build in part]))
            command = [sys.executable, "-m", "mpcompile.kernels.nm_linear.gpu.build", str(file), str(out)]
            log = (folder / f"{number:03d}.log").open("w+")
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
            running.append((part, out, process, log))
        if not running:
            return
        part, out, process, log = running.pop(0)
        process.wait()
        with log:
            if process.returncode:
                log.seek(0)
                raise InputError("compiling GPU kernels failed", found=log.read()[-2000:])
        for build, record in zip(part, json.loads((out / "records.json").read_text()), strict=True):
            paths = {kind: str(out / f"{build.name}.{kind}") for kind in ("ptx", "cubin")}
            yield build, record if "error" in record else record | paths


def main(argv: list[str]) -> int:
    builds, folder = [Build(**entry) for entry in json.loads(Path(argv[0]).read_text())], Path(argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "records.json").write_text(json.dumps([record_of(build, folder) for build in builds], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
