"""Runners: the fastest build of a model in the runtime where it is fastest, saved beside its artifact."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.artifact import load
from mpcompile.backend import mpsparse
from mpcompile.errors import ArtifactError, ConfigError
from mpcompile.io.ownership import is_ours, write_signed
from mpcompile.io.reading import read_json, sha256
from mpcompile.io.schema import Mismatch, check
from mpcompile.io.writing import check_writable, write_atomically
from mpcompile.measure.builds import Frozen, InRuntime
from mpcompile.optimization.goal import TORCH
from mpcompile.runtimes.catalogue import RUNTIMES

# Before a call, dynamo checks the inputs alone: a runner's module does not change any more.
SERVED = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
_KEY = "mpcompile_runner"
BACKENDS = ("mpsparse", "inductor")


class _Record(TypedDict):
    runtime: str
    backend: str
    precision: str
    batch: int
    artifact_sha256: str
    onnx_sha256: str


class Runner:
    """A callable build of a model. It is called as the model is, and returns what the model returns.

    Attributes:
        module: the transformed graph.
        runtime: ``"torch"``, ``"onnxruntime"`` or ``"openvino"``.
        precision: ``"fp32"`` or ``"bf16"``; inputs and outputs stay fp32.
        backend: with torch, ``"mpsparse"`` (our engine) or ``"inductor"``.
        batch: samples per call that it was built for. Runtimes take shorter batches too, not longer ones.
        onnx: with another runtime, its ONNX file.
        threads: of the processor; None for as many as torch uses.
        build: what it calls, if that is made already.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="dense"))
        >>> Runner(gm, "torch", "fp32", batch=2)(torch.randn(2, 16)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        module: nn.Module,
        runtime: str = TORCH,
        precision: str = "fp32",
        *,
        backend: str = "mpsparse",
        batch: int = 1,
        onnx: Path | None = None,
        threads: int | None = None,
        build: Callable[..., Any] | None = None,
    ) -> None:
        self.module, self.runtime, self.precision, self.batch = module, runtime, precision, batch
        self.backend = backend if runtime == TORCH else ""
        self.onnx, self.threads = onnx, threads
        self._orig_mod = module  # the name that torch.compile uses
        self._build = build
        self._bytes: bytes | None = None  # of the ONNX file

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output for a batch; the first call builds it."""
        if self._build is None:
            self._build = self._made()
        with torch.no_grad():
            return self._build(*args, **kwargs)

    def hold_file(self) -> None:
        """Read the ONNX file into memory, so that the runner can be saved after the file is gone."""
        if self.onnx is not None:
            self._bytes = self.onnx.read_bytes()

    def _made(self) -> Callable[..., Any]:
        if self.runtime != TORCH:
            assert self.onnx is not None  # search and load_runner() give it
            return InRuntime(self.module, RUNTIMES[self.runtime].load(self.onnx, self.precision, self.threads))
        module = self.module.eval()
        if self.precision == "bf16":
            module = copy.deepcopy(module).bfloat16()
        compiled = compiled_with(module, self.backend)
        return compiled if self.precision == "fp32" else _cast(compiled)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the runner beside an artifact ``path``: a JSON file, and the ONNX file of another runtime.

        Raises:
            ArtifactError: the artifact does not exist, or a file cannot be written.
        """
        check_files(path)
        artifact = Path(path)
        onnx = ""
        if self.onnx is not None:
            onnx_path = artifact.with_suffix(".onnx")
            content = self.onnx.read_bytes() if self._bytes is None else self._bytes
            write_signed(onnx_path, lambda temporary: temporary.write_bytes(content), suffix=".onnx")
            onnx = sha256(onnx_path)
        values = {
            "runtime": self.runtime,
            "backend": self.backend,
            "precision": self.precision,
            "batch": self.batch,
            "artifact_sha256": sha256(artifact),
            "onnx_sha256": onnx,
        }
        write_atomically(runner_file(artifact), json.dumps({_KEY: values}, indent=1) + "\n")


def runner_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of the file that describes the runner of an artifact."""
    return Path(path).with_suffix(".runner.json")


def check_files(path: str | os.PathLike[str]) -> None:
    """Check that a runner may be written beside an artifact.

    Raises:
        ArtifactError: the path is that of a folder, its folder is missing, or another program wrote a file that a
            runner would replace.
    """
    if os.fspath(path).endswith(("/", os.sep)) or os.path.isdir(path):
        raise ArtifactError(
            f"{os.fspath(path)} is a folder: a runner is written beside a file", expected="a file, such as fast.mpc"
        )
    for file in (Path(path), runner_file(path), Path(path).with_suffix(".onnx")):
        check_writable(file)
        if os.path.lexists(file) and not is_ours(file):
            raise ArtifactError(
                f"{file} would be replaced, and mpcompile did not write it",
                hint="choose another name, or move that file",
            )


def load_runner(path: str | os.PathLike[str], *, threads: int | None = None) -> Runner:
    """Load the runner beside an artifact that :meth:`Runner.save` or ``mpcompile optimize`` wrote.

    Args:
        path: the artifact.
        threads: of the processor; None for as many as torch uses.

    Raises:
        ArtifactError: there is none, a file belongs to another artifact or is damaged.
        ConfigError: its runtime is not installed, or does not run its precision here.

    Example:
        >>> load_runner("no-such-file.mpc")
        Traceback (most recent call last):
        mpcompile.errors.ArtifactError: no-such-file.mpc has no runner; ...
    """
    artifact, file = Path(path), runner_file(path)
    if not file.is_file():
        raise ArtifactError(
            f"{path} has no runner",
            expected=f"the file {file.name} beside it, as mpcompile optimize writes it",
            hint="mpcompile.load() loads the module alone",
        )
    values = read_json(file)
    record = values.get(_KEY) if isinstance(values, dict) else None
    try:
        check(record, _Record, _KEY)
    except Mismatch as error:
        raise ArtifactError(f"{file} is not a runner: {error}", hint="run mpcompile optimize again") from error
    assert record is not None  # it is a mapping
    for name, valid in (("runtime", (TORCH, *RUNTIMES)), ("backend", (*BACKENDS, "")), ("precision", ("fp32", "bf16"))):
        if record[name] not in valid:
            raise ArtifactError(f"{file} names an unknown {name}", expected=" or ".join(valid), found=record[name])
    onnx = artifact.with_suffix(".onnx") if record["onnx_sha256"] else None
    for part, wanted in ((artifact, record["artifact_sha256"]), (onnx, record["onnx_sha256"])):
        if part is not None and (not part.is_file() or sha256(part) != wanted):
            raise ArtifactError(
                f"{part} is not the file that its runner was saved with",
                expected=f"SHA-256 {wanted:.16}...",
                found="no such file" if not part.is_file() else f"{sha256(part):.16}...",
                hint="run mpcompile optimize again, or restore the files together",
            )
    if record["runtime"] != TORCH:
        RUNTIMES[record["runtime"]].check(record["precision"])
    module = load(artifact).eval()
    return Runner(
        module,
        record["runtime"],
        record["precision"],
        backend=record["backend"] or "mpsparse",
        batch=record["batch"],
        onnx=onnx,
        threads=threads,
    )


def compiled_with(module: nn.Module, backend: str) -> Callable[..., Any]:
    """Return a module compiled for weights that do not change.

    Raises:
        ConfigError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise ConfigError("there is no such backend", expected=" or ".join(BACKENDS), found=repr(backend))
    if backend == "inductor":
        return Frozen(module, SERVED)
    return torch.compile(module, backend=mpsparse, options={"frozen": True, **SERVED}, dynamic=False)


def _cast(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bf16 build that takes and returns fp32."""

    def cast(tree: Any, dtype: torch.dtype) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

    return lambda *args, **kwargs: cast(run(*cast(args, torch.bfloat16), **cast(kwargs, torch.bfloat16)), torch.float32)
