"""Compilation of the CPU kernels, and of the operators that call them, on the machine that runs them.

Libraries are kept in the cache folder. A library's name holds a checksum of sources, compiler, flags and instruction
set, so that any change gives another file. A library is written under a temporary name and then renamed, so that
processes may build at the same time. A checksum follows the library's bytes, because loading a truncated library can
kill the process (SIGBUS).

Loading a library runs its code. Libraries are loaded and stored only where nobody but this user and root can
write: the file, its folder and every folder above it are checked (:func:`mpcompile.io.trust.others_can_write`).
"""

from __future__ import annotations

import _ctypes
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from mpcompile.io.messages import warn_once
from mpcompile.io.trust import others_can_write
from mpcompile.io.writing import replacing
from mpcompile.kernels import machine
from mpcompile.kernels.cpu import abi
from mpcompile.kernels.store import cache_folder, temporary_folder

log = logging.getLogger(__name__)

NATIVE = Path(__file__).with_name("native")  # the folder of the C++ sources
SOURCES = (
    "cpu.cpp",
    "abi.h",
    "attention.h",
    "conv.h",
    "dense.h",
    "gemm.h",
    "layouts.h",
    "merge.h",
    "mlp.h",
    "sweep.h",
    "tiles.h",
    "vec.h",
)
ISAS = {
    "avx512_bf16": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mprefer-vector-width=512",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
    "portable": "",
}
# No -ffast-math: it reorders sums and ignores NaN.
FLAGS = "-std=c++17 -O3 -fPIC -shared -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
OPERATOR_SOURCES = ("operators/ops.cpp", "operators/dispatch.h", "operators/tokens.h", "abi.h", "layouts.h")
OPERATOR_FLAGS = "-std=c++20 -O2 -fPIC -shared"
SANITIZE = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
_SECONDS = 300
_CHECKSUM = hashlib.sha256().digest_size


class Kernels(ctypes.CDLL):
    """The library of kernels (``cpu.cpp``); ``isa`` is the key of :data:`ISAS` that it was built for."""

    functions = ("nm_linear", "nm_mlp", "nm_conv", "nm_attention", "nm_token_merge", "nm_pairs")
    isa: str


class Operators(ctypes.CDLL):
    """The library of operators that torch calls (``ops.cpp``), which call the kernels."""

    functions = ("nm_use",)

    def use(self, kernels: Kernels | None) -> None:
        """Make the operators call these kernels; with None, they call the operators in Python."""
        if kernels is None:
            self.nm_use(*[None] * 5, 0)
            return
        functions = (kernels.nm_linear, kernels.nm_mlp, kernels.nm_conv, kernels.nm_attention, kernels.nm_token_merge)
        self.nm_use(*(ctypes.cast(f, ctypes.c_void_p) for f in functions), kernels.nm_pairs())


_Library = TypeVar("_Library", Kernels, Operators)


class Unavailable(Exception):
    """No library is available; the message says why."""


class _Rejected(Unavailable):
    """The compiler ran and failed."""


def detect_isa() -> str:
    """Return the widest of :data:`ISAS` that this processor runs, or the one that ``MPCOMPILE_CPU_ISA`` names.

    Raises:
        Unavailable: ``MPCOMPILE_CPU_ISA`` names one that it does not run.
    """
    runs = _processor_isas()
    forced = os.environ.get("MPCOMPILE_CPU_ISA")
    if forced is None:
        return runs[0]
    if forced not in runs:
        raise Unavailable(f"MPCOMPILE_CPU_ISA={forced}: this processor runs {', '.join(runs)}")
    return forced


@functools.cache
def _processor_isas() -> tuple[str, ...]:
    flags: frozenset[str] = frozenset()
    if machine.is_x86_64():
        listed = machine.cpu_flags()
        if listed is not None:
            flags = listed
        elif torch.backends.cpu.get_cpu_capability() == "AVX2":
            flags = frozenset({"avx2", "fma"})
    runs = ["portable"]
    if {"avx2", "fma"} <= flags:
        runs.insert(0, "avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= flags:
        runs.insert(0, "avx512")
        if "avx512_bf16" in flags:
            runs.insert(0, "avx512_bf16")
    return tuple(runs)


def compiler() -> list[str]:
    """Return the command of the C++ compiler: ``CXX`` if set, else g++, clang++ or c++.

    Raises:
        Unavailable: there is none.
    """
    named = os.environ.get("CXX")
    for command in [named] if named else ["g++", "clang++", "c++"]:
        try:
            words = shlex.split(command)
        except ValueError:  # an unclosed quote
            words = []
        if words and shutil.which(words[0]):
            return words
    raise Unavailable(f"no C++ compiler ({named or 'g++, clang++'}): install one, or name it in CXX")


@functools.cache
def compiler_version(command: tuple[str, ...]) -> str:
    """Return what a compiler prints for ``--version``, or "" if it cannot be asked."""
    try:
        return subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _folders() -> list[Path]:
    """Folders for libraries, in order of preference: the cache, then this user's folder for temporary files."""
    return [cache_folder() / "kernels", temporary_folder()]


def _usable(folder: Path) -> bool:
    """Return True if this user, and nobody else, can create files in a folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _own(folder):
            return False
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _own(folder: Path) -> bool:
    """Return True if nobody else can put files into a folder; warn once if someone can."""
    reason = others_can_write(folder, stat.S_ISDIR)
    if reason is not None:
        warn_once(log, f"mpcompile: libraries in {folder} are not used: {reason}")
    return reason is None


def _whole(path: Path) -> bool:
    """Return True if a library's bytes match the checksum that follows them."""
    data = path.read_bytes()
    return hashlib.sha256(data[:-_CHECKSUM]).digest() == data[-_CHECKSUM:]


def _find(name: str, folders: list[Path]) -> Path | None:
    for folder in folders:
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode) or not _own(folder):
                continue
            reason = others_can_write(path, stat.S_ISREG)
            if reason is not None:
                warn_once(log, f"mpcompile: {path} is built again: {reason}")
            elif _whole(path):
                return path
            else:
                warn_once(log, f"mpcompile: {path} is damaged and is built again")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            warn_once(log, f"mpcompile: {path} cannot be read and is built again: {error}")
    return None


def build(isa: str, sanitize: bool = False, *, again: bool = False) -> Path:
    """Return the path of the kernel library for an instruction set; build it unless it exists.

    Args:
        sanitize: build with AddressSanitizer and UndefinedBehaviorSanitizer.
        again: build even if it exists.

    Raises:
        Unavailable: no compiler, no writable folder, or a failed build.
    """
    flags = [*shlex.split(FLAGS), *shlex.split(ISAS[isa]), *(shlex.split(SANITIZE) if sanitize else [])]
    return _built(f"nm-{isa}", SOURCES, flags, [], again)


def _built(stem: str, sources: tuple[str, ...], flags: list[str], libraries: list[str], again: bool) -> Path:
    """Return the path of a library; the first of ``sources`` is compiled and includes the others."""
    command = compiler()
    here = NATIVE
    digest = hashlib.sha256()
    command_line = " ".join([*command, *flags, *libraries])
    for part in [*(here.joinpath(name).read_bytes() for name in sources), command_line.encode()]:
        digest.update(part)
    digest.update(compiler_version(tuple(command)).encode())
    name = f"{stem}-{digest.hexdigest()[:20]}.so"
    folders = _folders()
    existing = None if again else _find(name, folders)
    if existing is not None:
        return existing
    folder = next((f for f in folders if _usable(f)), None)
    if folder is None:
        raise Unavailable(f"no folder for the CPU kernels can be written: tried {', '.join(map(str, folders))}")
    if folder != folders[0]:
        warn_once(log, f"mpcompile: {folders[0]} cannot be written safely; the CPU kernels are kept in {folder}")
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(dir=folder) as private:
            made = Path(private) / name
            subprocess.run(
                [*command, *flags, str(here / sources[0]), "-o", str(made), *libraries],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=True,
            )
            data = made.read_bytes()
        # Renamed, not overwritten: other processes may have the library mapped.
        with replacing(folder / name, mode=0o700, durable=False, follow=False) as file:
            file.write(data + hashlib.sha256(data).digest())  # the loader ignores bytes after the last section
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        causes = [line for line in lines if "error" in line] or lines  # notes and warnings surround them
        output = "\n".join(causes)[-400:] or f"exit status {error.returncode}"
        raise _Rejected(f"{command[0]} cannot build the CPU kernels: {output}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot build the CPU kernels: {error}") from error
    log.info("built %s in %.1f s", name, time.perf_counter() - start)
    return folder / name


def _opened(kind: type[_Library], built: Callable[[bool], Path]) -> _Library:
    """Load a library. If that fails (it is of another system, or lacks functions), build it again."""
    path = built(False)
    try:
        return _loaded(kind, path)
    except (OSError, AttributeError):
        warn_once(log, f"mpcompile: {path} cannot be loaded and is built again")
    try:
        return _loaded(kind, built(True))
    except (OSError, AttributeError) as error:
        raise Unavailable(f"the CPU kernels cannot be loaded: {error}") from error


def _loaded(kind: type[_Library], path: Path) -> _Library:
    """Load a library that has every function in ``kind.functions``; raise AttributeError if one is missing."""
    library = kind(str(path))
    try:
        for name in kind.functions:
            getattr(library, name)
    except AttributeError:
        _ctypes.dlclose(library._handle)  # while it is open, its path loads it again, even if the file is replaced
        raise
    return library


def _binary(path: Path) -> str:
    """Return a string that differs between builds of the same version of a library: its size and modification time."""
    try:
        status = path.stat()
    except OSError:
        return "unknown"
    return f"{status.st_size:x}{status.st_mtime_ns:x}"


@functools.cache
def operators() -> Operators | None:
    """Return the operators in C++ (``ops.cpp``), or None if this machine cannot build them.

    The operators in Python give the same results with more overhead per call. The C++ operators are built against the
    headers of the installed torch and belong to its version. Once loaded, torch calls them until the process ends.
    """
    folder = Path(torch.__file__).parent
    flags = [*shlex.split(OPERATOR_FLAGS), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    flags += ["-isystem", str(folder / "include")]
    libraries = ["-L", str(folder / "lib"), "-ltorch_cpu", "-lc10"]
    stem = f"ops-{torch.__version__}-{_binary(folder / 'lib' / 'libtorch_cpu.so')}"
    try:
        loaded = _opened(Operators, lambda again: _built(stem, OPERATOR_SOURCES, flags, libraries, again))
    except Unavailable as error:
        log.info("mpcompile: the CPU operators stay in Python: %s", error)
        return None
    loaded.nm_use.argtypes = [*[ctypes.c_void_p] * 5, ctypes.c_int]
    loaded.nm_use.restype = None
    return loaded


def library() -> Kernels:
    """Return this process's kernel library, for the widest instruction set that processor and compiler support.

    ``MPCOMPILE_CPU_ISA`` selects an instruction set. ``MPCOMPILE_SANITIZE=1`` selects a build with AddressSanitizer and
    UndefinedBehaviorSanitizer.

    Raises:
        Unavailable: it cannot be built or loaded.
    """
    isa, sanitize = detect_isa(), os.environ.get("MPCOMPILE_SANITIZE") == "1"
    if "MPCOMPILE_CPU_ISA" in os.environ:
        return load(isa, sanitize)
    refusal: _Rejected | None = None
    for candidate in _processor_isas():
        try:
            loaded = load(candidate, sanitize)
        except _Rejected as error:
            refusal = refusal or error
            continue
        if refusal is not None:
            warn_once(
                log, f"mpcompile: the kernels for {isa} cannot be built, those for {candidate} are used: {refusal}"
            )
        return loaded
    assert refusal is not None  # there is at least one candidate
    raise refusal


@functools.cache
def load(isa: str, sanitize: bool = False) -> Kernels:
    """Load the kernel library for an instruction set and set its functions' signatures.

    Raises:
        Unavailable: it cannot be built or loaded.
    """
    # torch is imported already, and its OpenMP runtime serves this library too.
    loaded = _opened(Kernels, lambda again: build(isa, sanitize, again=again))
    loaded.nm_linear.argtypes = [ctypes.POINTER(abi.Linear)]
    loaded.nm_mlp.argtypes = [ctypes.POINTER(abi.Mlp)]
    loaded.nm_conv.argtypes = [ctypes.POINTER(abi.Conv)]
    loaded.nm_attention.argtypes = [ctypes.POINTER(abi.Attention)]
    loaded.nm_token_merge.argtypes = [ctypes.POINTER(abi.Merge)]
    loaded.isa = isa
    return loaded


@functools.cache
def unavailable() -> str | None:
    """Return why there is no kernel library, or None if there is one. Warns the first time."""
    try:
        library()
    except Unavailable as error:
        log.warning("mpcompile: no CPU kernels, masked layers stay dense: %s", error)
        return str(error)
    return None
