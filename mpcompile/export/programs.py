"""Ways out: a state dict for timm, a torch.export program, an AOTInductor package, an ONNX file; written whole."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile._version import __version__
from mpcompile.config import Config
from mpcompile.errors import ArtifactError, ConfigError, GraphError
from mpcompile.export.package_guard import guarded
from mpcompile.io.ownership import sign
from mpcompile.io.writing import temporary_path
from mpcompile.ir.module import IRModule, masked
from mpcompile.ir.spec import family_of
from mpcompile.kernels import ops
from mpcompile.pipeline import lower

FORMATS = ("mpc", "dense-masked")  # of `compile`
EXPORTS = ("pt2", "aoti", "onnx", "dense-masked")  # of `export`
MAX_BATCH = 4096  # of a program with a free batch size

log = logging.getLogger(__name__)


@contextlib.contextmanager
def _written(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place in the end; an older file is untouched by a failure.

    Raises:
        ArtifactError: the folder is missing or not writable, or the disk is full.
    """
    target = Path(path)
    try:
        with temporary_path(target, suffix) as temporary:
            yield temporary
            sign(temporary)
    except OSError as error:
        found = error.strerror or str(error)
        raise ArtifactError(f"can't write {target}", expected="a writable folder with room", found=found) from error


def dense_state(gm: IRModule) -> dict[str, Tensor]:
    """The state dict of the model that ``gm`` was made from, with zeros where masks remove and without masks.

    It has the names of the model's own, no others: also of parts that the graph doesn't use.

    Permuted channels stay permuted: the model computes the same. Token merging is no part of a state dict.

    Raises:
        GraphError: ``gm`` is lowered: its weights are packed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = transform(model, torch.randn(2, 16), Config(pattern="2:4"))
        >>> model.load_state_dict(dense_state(gm))
        <All keys matched successfully>
    """
    if any(family_of(node) in ("packed", "native") for node in gm.graph.nodes):
        raise GraphError("a lowered module has no dense weights", hint="take what mpcompile.transform returned")
    removing: dict[int, Tensor] = {}
    masks: set[int] = set()
    for weight, mask, _ in masked(gm):
        removing[id(weight)] = mask
        masks.add(id(mask))
    state = {}
    for name, tensor in gm.state_dict(keep_vars=True).items():
        if id(tensor) not in masks:
            removed = removing.get(id(tensor))
            value = tensor.detach()
            state[name] = (value.clone() if removed is None else value.masked_fill(~removed, 0)).cpu().contiguous()
    return state


def save_dense(gm: IRModule, path: str | os.PathLike[str]) -> None:
    """Write :func:`dense_state` to a safetensors file, which timm and any other reader load as they load any weights.

    Raises:
        GraphError: see :func:`dense_state`.
        ArtifactError: the file can't be written.
    """
    from safetensors.torch import save_file

    if any(family_of(node) == "merging" for node in gm.graph.nodes):
        log.warning("a state dict holds no token merging: %s computes with all tokens", path)
    with _written(path) as temporary:
        save_file(dense_state(gm), temporary, metadata={"format": "pt", "mpcompile": __version__})


def program(
    gm: nn.Module, example: Tensor, *, engine: str = "auto", dynamic_batch: bool = False
) -> torch.export.ExportedProgram:
    """Lower and export: packed weights on the engines that are fastest here, BatchNorm folded.

    Args:
        gm: from :func:`mpcompile.transform` or :func:`mpcompile.load`.
        example: a batch (batch, channels, height, width); engines are timed for its size.
        engine: see :class:`mpcompile.Config`. ``"dense"`` keeps dense weights with zeros and operators of torch alone,
            so that the program runs without mpcompile; others need ``import mpcompile`` before they are loaded.
        dynamic_batch: leave the batch size free (1 to 4096).

    Raises:
        GraphError: torch.export refuses the graph.
        MPCompileError: as :func:`mpcompile.lower`.
    """
    lowered = lower(gm, example, Config(engine=engine))
    shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},) if dynamic_batch else None
    inputs = (example.expand(max(2, len(example)), *example.shape[1:]).contiguous() if dynamic_batch else example,)
    try:
        with torch.no_grad():
            found = torch.export.export(lowered, inputs, dynamic_shapes=shapes)
            return found.run_decompositions(_own_decompositions()) if engine == "dense" else found
    except Exception as error:
        raise GraphError(
            f"torch.export refuses the graph: {_first_line(error)}",
            hint="leave the batch size fixed" if dynamic_batch else "run it through torch.compile instead",
        ) from error


def _own_decompositions() -> dict[Any, Any]:
    """What our composite operators stand for, in torch's own; its operators stay as they are."""
    table = torch.export.default_decompositions().items()
    return {target: rule for target, rule in table if target.namespace == ops.NAMESPACE}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def save_pt2(gm: nn.Module, example: Tensor, path: str | os.PathLike[str], **options: Any) -> None:
    """Write :func:`program` for ``torch.export.load``.

    Raises:
        ArtifactError: the file can't be written.
        GraphError: see :func:`program`.
    """
    found = program(gm, example, **options)
    with _written(path, ".pt2") as temporary:
        torch.export.save(found, temporary)


def save_aoti(gm: nn.Module, example: Tensor, path: str | os.PathLike[str], **options: Any) -> None:
    """Compile :func:`program` with AOTInductor into a package: native code for this kind of machine.

    Python loads it with ``torch._inductor.aoti_load_package``, C++ with ``AOTIModelPackageLoader``. Either way the
    package refuses inputs of another size, dtype or device than those it was compiled for, and copies those of other
    strides.

    Raises:
        ArtifactError: the file can't be written.
        GraphError: see :func:`program`; or Inductor can't compile it.
    """
    found = program(gm, example, **options)
    with _written(path, ".pt2") as temporary:
        try:
            with guarded(temporary, 1, MAX_BATCH):
                torch._inductor.aoti_compile_and_package(found, package_path=str(temporary))
        except (OSError, GraphError):
            raise
        except Exception as error:
            hint = "check that a C++ compiler is there, or export pt2"
            raise GraphError(f"AOTInductor can't compile the graph: {_first_line(error)}", hint=hint) from error


def save_onnx(gm: nn.Module, example: Tensor, path: str | os.PathLike[str], *, dynamic_batch: bool = False) -> None:
    """Write an ONNX file with dense weights and zeros, whose 2:4 weights TensorRT finds by itself.

    Raises:
        ConfigError: the packages onnx and onnxscript aren't installed.
        ArtifactError: the file can't be written.
        GraphError: an operator that ONNX lacks.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ONNX needs the package {' and '.join(missing)}", hint="pip install 'mpcompile[onnx]'")
    found = program(gm, example, engine="dense", dynamic_batch=dynamic_batch)
    try:
        converted = torch.onnx.export(found, (), dynamo=True, verbose=False, input_names=["x"], output_names=["logits"])
    except Exception as error:
        raise GraphError(f"ONNX can't hold the graph: {_first_line(error)}", hint="export pt2 or aoti") from error
    assert converted is not None  # with dynamo=True
    with _written(path, ".onnx") as temporary:
        converted.save(temporary, include_initializers=True)


def run_exported(path: Path, kind: str, example: Tensor) -> Tensor | None:
    """The outputs of an exported file, for a check; None where what runs it (onnxruntime) isn't installed.

    Raises:
        GraphError: it can't be run.
    """
    if kind == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        return None
    try:
        with torch.no_grad():
            return _run(path, kind, example)
    except Exception as error:
        raise GraphError(f"{path} is written, but does not run: {_first_line(error)}") from error


def _run(path: Path, kind: str, example: Tensor) -> Tensor:
    if kind == "pt2":
        return torch.export.load(path).module()(example)
    if kind == "aoti":
        result = torch._inductor.aoti_load_package(str(path))(example)
        return result[0] if isinstance(result, (tuple, list)) else result
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: example.numpy()})[0])
