"""Exported programs: ``.pt2`` files of ``torch.export.save``. Reading one can run code, since torch unpickles parts."""

from __future__ import annotations

import contextlib
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpcompile.data.images import data_config
from mpcompile.errors import ArtifactError, InputError, first_line, printable
from mpcompile.io.reading import LARGEST_TEXT, open_regular, parse_json, sha256
from mpcompile.sources.loaded import LoadedModel


def load_program(name: str, path: Path) -> LoadedModel:
    """Return the module of an exported program.

    Args:
        name: the model's name, for messages.
        path: the file.

    Raises:
        ArtifactError: it is missing, damaged, or from a version of torch that this one cannot read.
    """
    program = _read(path)
    try:
        model = program.module()
    except Exception as error:
        raise ArtifactError(f"{path} has no module that can be called: {first_line(error)}") from error
    arguments, keywords = program.example_inputs or ((), {})
    example: Any = _one(arguments, keywords)
    keyword, size, batch = _images(program, arguments, keywords)
    data = data_config(model)
    if size is not None:
        data["input_size"] = list(size)
    notes = [] if batch is None else [f"it takes batches of {batch} alone"]
    return LoadedModel(
        model,
        name,
        "program",
        f"torch.export (torch {torch.__version__})",
        {"file": path.name, "sha256": sha256(path)},
        data,
        input_name=keyword,
        example=example,
        fixed_batch=batch,
        notes=[*notes, "preprocessing is not known: timm's default is assumed"],
    )


def _read(path: Path) -> Any:
    """Return the exported program in a file.

    Raises:
        ArtifactError: there is none.
    """
    try:
        with open_regular(path):
            pass
    except OSError as error:
        raise ArtifactError(f"cannot read {path}", found=error.strerror or str(error)) from error
    with _quiet() as heard:
        try:
            return torch.export.load(path)
        except Exception as error:
            told = (heard[0] if heard else first_line(error)).rstrip(".")
            writer = _written_by(path)
            raise ArtifactError(
                f"{path} cannot be read as an exported program",
                expected=f"a file of torch.export.save that torch {torch.__version__} reads",
                found=told if writer is None else f"one of torch {printable(writer, 40)}: {told}",
                hint="export the model again with this version of torch; AOTInductor packages hold no graph",
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collect torch's log records, which the error repeats, instead of showing them."""
    heard: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        cause = record.exc_info[1] if record.exc_info else None
        heard.append(first_line(cause) if cause is not None else record.getMessage())
        return False

    log = logging.getLogger("torch.export")
    log.addFilter(hear)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield heard
    finally:
        log.removeFilter(hear)


def _written_by(path: Path) -> str | None:
    """Return the version of torch that a file says it was written by; None if it does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(e for e in archive.infolist() if e.filename.endswith("models/model.json"))
            content = parse_json(archive.read(entry)) if entry.file_size < LARGEST_TEXT else None
    except (OSError, ValueError, StopIteration, RuntimeError, zipfile.BadZipFile):
        return None
    version = content.get("torch_version") if isinstance(content, dict) else None
    return version if isinstance(version, str) else None


def _one(arguments: Any, keywords: Mapping[str, Any]) -> Any:
    """Return example inputs as one value: a tensor, a tuple or a dict; None if there are none.

    Raises:
        InputError: there are positional and keyword inputs.
    """
    if arguments and keywords:
        hint = "export it with all inputs by keyword"
        raise InputError("the exported program takes positional and keyword inputs", hint=hint)
    if keywords:
        return dict(keywords)
    return arguments[0] if len(arguments) == 1 else tuple(arguments) or None


def _images(
    program: Any, arguments: Any, keywords: Mapping[str, Any]
) -> tuple[str | None, tuple[int, ...] | None, int | None]:
    """Return the keyword of the images (None: positional), their size (C, H, W), and the batch if it is fixed."""
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"]
    signature = program.graph_signature
    given = [v for v, spec in zip(values, signature.input_specs, strict=True) if spec.kind.name == "USER_INPUT"]
    keyword = next(iter(keywords)) if len(keywords) == 1 and not arguments else None
    if len(given) != 1 or len(pytree.tree_leaves((arguments, keywords))) > 1:
        return None, None, None
    (value,) = given
    if not isinstance(value, Tensor) or value.dim() != 4:
        return keyword, None, None
    batch, *size = value.shape
    fixed = batch if isinstance(batch, int) else None
    return keyword, (tuple(size) if all(isinstance(n, int) for n in size) else None), fixed
