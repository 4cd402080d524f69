"""The container: a safetensors file with a checksum over every byte, or a folder with that file and its plan.json.

The header's string metadata holds the texts that describe the model (``graph``, ``modules``, ``tensors``, ``plan``),
versions, and ``sha256``: the checksum of the header, with that field set to zeros, and of all data after it. Any
safetensors reader opens the file. It is framed here, not by the library, so that files are reproducible, the checksum
covers every byte, and the bytes that are checked are the bytes that are used (the file is read once).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mpcompile._version import __version__
from mpcompile.artifact.opset import Refusal, module_path, shown
from mpcompile.errors import ArtifactError
from mpcompile.io.reading import open_regular
from mpcompile.io.writing import replacing

KIND, VERSION = "mpcompile", 3
WEIGHTS, PLAN = "model.safetensors", "plan.json"  # names in the folder form of an artifact
TEXTS = ("graph", "modules", "tensors", "plan")
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_ZEROS = "0" * 64  # placeholder for the checksum while it is computed
_CHUNK = 1 << 22  # bytes read, written and hashed at a time
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


# --- Paths ---


def resolve(path: object) -> str:
    """Return the absolute path, links followed, as text.

    Raises:
        ArtifactError: ``path`` is not a path.
    """
    try:
        return os.path.realpath(os.fsdecode(os.fspath(path)))  # type: ignore[call-overload]
    except (TypeError, ValueError, OSError) as error:
        raise ArtifactError("this is not a path", expected="str or os.PathLike", found=shown(path)) from error


@contextlib.contextmanager
def naming(path: str, verb: str) -> Iterator[None]:
    """Turn a refusal or an OS error into an ArtifactError that names the file, with a hint about the cause."""
    try:
        yield
    except Refusal as error:
        text = f"{path} {verb}: {error.message}"
        raise ArtifactError(text, expected=error.expected, found=error.found, hint=error.hint) from error
    except OSError as error:
        folder = os.path.dirname(path)
        expected, hint = "a file that can be opened", "check the path"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            expected, hint = "room for the file", f"free space on the file system of {folder}, or use another folder"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            expected, hint = "permission", f"change the permissions in {folder}, or use another folder"
        elif not os.path.isdir(folder):
            expected, hint = f"the folder {folder}", "create it first, or correct the path"
        reason = error.strerror or str(error)
        raise ArtifactError(f"{path} {verb}", expected=expected, found=reason, hint=hint) from error


# --- JSON ---


def dump(value: Any) -> str:
    """Return the canonical JSON text of a value: no spaces, ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parse(text: str | bytes, what: str = "header") -> Any:
    """Return the value of a JSON text.

    Raises:
        Refusal: the text is not JSON, or has a key twice; the message calls it ``what``.
    """
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        hint = "the file is damaged: copy it again"
        raise Refusal(f"its {what} is not JSON: {str(error)[:80]}", hint=hint) from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):  # a reader that takes the first of them would see another file
        twice = next(key for key in table if sum(key == other for other, _ in pairs) > 1)
        raise Refusal(f"its header has the key {twice[:80]!r} twice")
    return table


def readable(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of plan.json: the metadata that a person or another program can use."""
    versions: dict[str, Any] = {key: value for key, value in metadata.items() if key not in TEXTS}
    return {**versions, "plan": parse(metadata["plan"], "plan")}


# --- Writing ---


def write(
    path: str, texts: Mapping[str, str], tensors: Mapping[str, Tensor], stale: str | None = None
) -> dict[str, str]:
    """Write a file to ``path``, as a whole or not at all.

    Args:
        path: a path at which there is nothing or a regular file.
        texts: every text of :data:`TEXTS`, by name.
        tensors: the tensors by name, on any device.
        stale: a file that describes the old content of ``path``, removed just before ``path`` is replaced.

    Returns:
        The metadata of the file.

    Raises:
        Refusal: a tensor of a dtype that a file cannot hold, a header that is too large, or ``path`` is not a file.
        OSError: the file cannot be written.
    """
    metadata = {"sha256": _ZEROS, "format": KIND, "format_version": str(VERSION), "mpcompile": __version__}
    metadata |= {"torch": torch.__version__, **texts}
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refusal(
                "something other than a file is at this path",
                expected="a regular file, or nothing",
                hint="choose another path",
            )
    with replacing(path) as file:
        _fill(file, metadata, tensors)
        if stale is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stale)
    return metadata


def _fill(file: BinaryIO, metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write header and tensors; then put the checksum into the header."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)):  # large items first: all stay aligned
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise Refusal(f"tensor {name} has a dtype that a file cannot hold", found=tensor.dtype)
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    frame = _frame(header)
    if len(frame) > MAX_HEADER:
        raise Refusal("its graph and plan are too large", expected=f"at most {MAX_HEADER} bytes", found=len(frame))
    digest = hashlib.sha256(frame)
    file.write(frame)
    for name in list(header)[1:]:
        data = _bytes(tensors[name].detach().cpu().contiguous())
        for start in range(0, len(data), _CHUNK):
            digest.update(data[start : start + _CHUNK])
            file.write(data[start : start + _CHUNK])
    metadata["sha256"] = digest.hexdigest()
    file.seek(0)
    file.write(_frame(header))


def _frame(header: Mapping[str, Any]) -> bytes:
    """Return the start of a safetensors file with this header: length, JSON, and spaces up to a multiple of 8 bytes."""
    text = dump(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# --- Reading ---


def read(path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors, with every check that needs no knowledge of graphs: version, layout, checksum.

    Raises:
        Refusal: the file is of another kind or version, truncated or damaged.
        OSError: the file cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Refusal("it is not a file", expected="a file that mpcompile.save wrote", hint="check the path")
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = _read_header(file, size)
        available = size - 8 - len(raw)
        header = parse(raw)
        metadata = _metadata(header)
        claimed, metadata["sha256"] = metadata["sha256"], _ZEROS
        try:
            frame = _frame(header)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"its header is not as mpcompile.save writes it: {error}") from error
        digest = hashlib.sha256(frame)
        tensors: dict[str, Tensor] = {}
        end = 0
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = _allocate(name, entry, end, available)
                _read_tensor(file, digest, name, tensors[name])
                end += tensors[name].nbytes
        metadata["sha256"] = claimed
        if end != available or digest.hexdigest() != claimed or _frame(header)[8:] != raw:
            raise Refusal(
                "its content differs from what was written",
                expected=f"{8 + len(raw) + end} bytes with sha256 {shown(claimed)}",
                found=f"{size} bytes with {digest.hexdigest()}",
                hint="the file is damaged: copy it again, or save the module again",
            )
    return metadata, tensors


def _read_header(file: BinaryIO, size: int) -> bytes:
    """Return the JSON text at the start of a file of ``size`` bytes."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER or length > size - 8:
        raise Refusal(
            "it is not a safetensors file, or only the beginning of one",
            expected="a file that mpcompile.save wrote",
            found=f"{size} bytes",
            hint="copy it again; a file from torch.save is loaded with torch.load",
        )
    return file.read(length)


def _metadata(header: Any) -> dict[str, str]:
    """Return the string metadata of a header, if it is of our kind and version."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != KIND:
        raise Refusal(
            "it is a safetensors file of another kind",
            expected="a file that mpcompile.save wrote",
            hint="weights alone are loaded with safetensors.torch.load_file and model.load_state_dict",
        )
    if metadata.get("format_version") != str(VERSION):
        raise Refusal(
            "its format is not known to this version",
            expected=f"format version {VERSION} (this is mpcompile {__version__})",
            found=f"{shown(metadata.get('format_version'))}, of mpcompile {shown(metadata.get('mpcompile'))}",
            hint="load it with the version of mpcompile that wrote it, or a newer one",
        )
    keys = {"sha256", "format", "format_version", "mpcompile", "torch", *TEXTS}
    if metadata.keys() != keys or not all(isinstance(v, str) for v in metadata.values()):
        raise Refusal("its metadata is malformed", expected=sorted(keys), found=shown(sorted(metadata)))
    return metadata


def _allocate(name: str, entry: Any, begin: int, available: int) -> Tensor:
    """Return an empty tensor for a header entry. Its data must begin at byte ``begin`` of the ``available`` bytes."""
    module_path(name)
    try:
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        natural = all(type(i) is int and i >= 0 for i in [start, end, *shape])
        if natural and start == begin and end - start == math.prod(shape) * dtype.itemsize and end <= available:
            return torch.empty(shape, dtype=dtype, device="cpu")
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
        raise Refusal(f"the header's entry for tensor {name} is malformed", found=shown(entry)) from error
    raise Refusal(
        f"tensor {name} is not where the header says",
        expected=f"shape and data_offsets that agree, between {begin} and {available}",
        found=shown(entry),
        hint="the file is truncated or damaged: copy it again",
    )


def _read_tensor(file: BinaryIO, digest: Any, name: str, tensor: Tensor) -> None:
    """Fill a tensor with its data from the file, and hash the data."""
    data = _bytes(tensor)
    for start in range(0, len(data), _CHUNK):
        part = data[start : start + _CHUNK]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise Refusal(f"it ends inside tensor {name}", hint="the file is truncated: copy it again")
        digest.update(part)
    if tensor.dtype is torch.bool and len(data) and int(tensor.view(torch.uint8).max()) > 1:
        raise Refusal(f"tensor {name} holds booleans that are neither 0 nor 1")
