"""Save and load the IR: one safetensors file, no pickle, nothing in it that is executed or imported by name.

Masked weights stand in the file as their kept values and one bit a weight (packing.py), all other tensors as they are,
tied ones once. The header's string metadata holds ``modules`` (the tree of layers: class, constructor arguments,
training flags, which tensor goes where), ``graph`` (the nodes), ``tensors`` (which are parameters, unusual memory
orders, and what is packed), ``plan`` (with config, provenance and measured figures), versions, and ``sha256``: over the
header, with that field at zeros, and every byte behind it. Any safetensors reader opens the file. Framing is done here,
not by the library, so that files are reproducible, every byte is covered by the checksum, and what was checked is what
is used (one read). An artifact that is a folder holds this file and, for people and other programs, its plan.json.

Not stored: node metadata and type annotations (shapes are recomputed), hooks, and the input guards of exported
programs (a call of ``GuardsFn`` whose result nobody uses is left out). opset.py and leaves.py list what can be stored.
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
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, fx, nn

from mpcompile._version import __version__
from mpcompile.artifact.codec import decode_nodes, decode_signature, encode_nodes, encode_signature, is_guard
from mpcompile.artifact.leaves import Tree, compare, restore_modules, restore_tensors
from mpcompile.artifact.native_nodes import check_packed
from mpcompile.artifact.opset import Refusal, identifier, module_path, shown
from mpcompile.artifact.packing import pack_tensors, unpack_tensors
from mpcompile.errors import ArtifactError, GraphError
from mpcompile.io.ownership import is_ours
from mpcompile.io.reading import open_regular, read_bytes
from mpcompile.io.writing import replacing, write_atomically
from mpcompile.ir import spec
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import with_ordinary_tensors
from mpcompile.plan import Plan

KIND, VERSION = "mpcompile", 3
WEIGHTS, PLAN = "model.safetensors", "plan.json"  # of an artifact that is a folder
_TEXTS = ("graph", "modules", "tensors", "plan")
_BLANK = "0" * 64  # where the checksum will stand
_CHUNK = 1 << 22  # bytes read, written and hashed at a time
_MAX_HEADER = 100_000_000  # the limit of the safetensors format
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


def save(gm: IRModule, path: str | os.PathLike[str]) -> None:
    """Write the IR to a safetensors file, or to a folder with that file and a readable plan.json, whole or not at all.

    The file is written beside ``path`` under another name, flushed to disk, and renamed: if anything fails, a file
    that was there before is untouched. Its permissions are those of a new file.

    Args:
        gm: what :func:`mpcompile.transform` returned. Tensors may be on any device. What masks
            remove is not kept: it comes back as zero (weights under a mask that aren't zero are stored whole).
        path: the file; conventionally ``*.mpc`` or ``*.safetensors``. Its folder must exist. A path that ends in a
            slash, or an existing folder, means the folder form; it is made if absent. Files in it that mpcompile
            didn't write, such as the weights of another program, are not replaced.

    Raises:
        ArtifactError: an operator or layer that a file can't hold (the node is named), a path that can't be written,
            a folder whose files of these names are another's, or a full disk.

    Example:
        >>> save(gm, "model.safetensors")
        >>> torch.equal(load("model.safetensors")(x), gm(x))
        True
    """
    target = _resolved(path)
    with _explained(target, "can't be saved"):
        texts, tensors = describe(gm)
        metadata = {"sha256": _BLANK, "format": KIND, "format_version": str(VERSION), "mpcompile": __version__}
        metadata |= {"torch": torch.__version__, **texts}
        folder = os.path.isdir(target) or os.fsdecode(os.fspath(path)).endswith(os.sep)
        if not folder:
            _write(target, metadata, tensors)
            return
        check_folder(target)
        os.makedirs(target, exist_ok=True)
        _write(os.path.join(target, WEIGHTS), metadata, tensors, stale=os.path.join(target, PLAN))
        write_atomically(Path(target, PLAN), json.dumps(_readable(metadata), indent=1) + "\n")


def check_folder(folder: str) -> None:
    """What an artifact in the folder form would replace there is ours.

    Raises:
        Refusal: it is another's.
    """
    for name in (WEIGHTS, PLAN):
        path = Path(folder, name)
        if os.path.lexists(path) and not is_ours(path):
            raise Refusal(
                f"the folder holds a {name} that mpcompile didn't write",
                hint="choose another folder, or move that file",
            )


@with_ordinary_tensors
def load(path: str | os.PathLike[str]) -> IRModule:
    """Read what :func:`save` wrote, a file or a folder: the same graph, weights, plan and training flags, on the CPU.

    Checksum, format version and structure are checked before anything is returned. Safe on files from strangers: a
    graph can call nothing but the operators listed in opset.py and the layers listed in leaves.py. The checksum finds
    damage, not forgery: it says nothing about who made the file.

    Raises:
        ArtifactError: no file, not a file of :func:`save`, a newer format, a damaged or truncated file, or one that
            names an operator or layer that isn't allowed.

    Example:
        >>> load("model.safetensors").plan.masked[0]
        'blocks.0.attn.qkv'
    """
    target = _resolved(path)
    with _explained(target, "can't be loaded"):
        if not os.path.isdir(target):
            return assemble(*_read(target))
        if not os.path.exists(os.path.join(target, WEIGHTS)):
            raise Refusal(
                f"it is a folder without {WEIGHTS}", expected="what mpcompile.save wrote", hint="check the path"
            )
        metadata, tensors = _read(os.path.join(target, WEIGHTS))
        _compare_plan(os.path.join(target, PLAN), metadata)
        return assemble(metadata, tensors)


def _readable(metadata: Mapping[str, str]) -> dict[str, Any]:
    """plan.json: the metadata that a person or another program has a use for."""
    found: dict[str, Any] = {key: value for key, value in metadata.items() if key not in _TEXTS}
    return {**found, "plan": json.loads(metadata["plan"])}


def _compare_plan(path: str, metadata: Mapping[str, str]) -> None:
    """The plan.json of a folder, if there is one, has to be that of its weights."""
    if not os.path.exists(path):
        return
    try:
        text = read_bytes(path, _MAX_HEADER)
    except OSError as error:
        hint = f"remove it: {WEIGHTS} holds the plan, too"
        raise Refusal(f"its {PLAN} can't be read", found=error.strerror or str(error), hint=hint) from error
    if _parse(text, PLAN) != _readable(metadata):
        raise Refusal(
            f"{PLAN} is not that of {WEIGHTS}",
            expected=f"the plan of the file with sha256 {metadata['sha256']}",
            hint=f"remove {PLAN}: {WEIGHTS} holds the plan, too; or copy both again",
        )


@contextlib.contextmanager
def _explained(path: str, verb: str) -> Iterator[None]:
    """Turns a refusal or an OS error into an ArtifactError that names the file."""
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


def _resolved(path: object) -> str:
    """The absolute path behind links, as text."""
    try:
        return os.path.realpath(os.fsdecode(os.fspath(path)))  # type: ignore[call-overload]
    except (TypeError, ValueError, OSError) as error:
        raise ArtifactError("this is not a path", expected="str or os.PathLike", found=shown(path)) from error


# --- The IR as texts and tensors ---


def describe(gm: IRModule) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The IR as four JSON texts (graph, modules, tensors, plan) and its tensors, each once.

    Raises:
        Refusal: something in it can't be stored; it is named.
    """
    if not isinstance(gm, IRModule):
        raise Refusal("it is not the IR", expected="what mpcompile.transform returned", found=type(gm).__name__)
    guards = {str(node.target) for node in gm.graph.nodes if is_guard(gm, node)}
    nodes = [node for node in gm.graph.nodes if not (node.op == "call_module" and node.target in guards)]
    graph = {
        "class": type(gm).__name__,
        "locked": gm.locked_mode,
        "signature": encode_signature(gm.graph),
        "nodes": encode_nodes(nodes),
    }
    tree = Tree(gm, guards)
    try:
        plan = gm.plan.to_json()
    except GraphError:  # it has none: the IR of import_model
        plan = "null"
    except (TypeError, ValueError) as error:
        raise Refusal(f"its plan holds something that is no JSON: {error}", hint="see gm.plan.notes") from error
    tensors = pack_tensors(gm, tree.kinds, tree.tensors)
    texts = {"graph": _dump(graph), "modules": _dump(tree.modules), "tensors": _dump(tree.kinds), "plan": plan}
    hollow = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in tensors.items()}
    compare(gm, assemble(texts, hollow), guards)  # what can't be loaded is refused now
    return texts, tensors


def assemble(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> IRModule:
    """Inverse of :func:`describe`.

    Raises:
        Refusal: the texts name something that isn't allowed, or make no module.
    """
    try:
        graph, modules, kinds = (_parse(texts[key]) for key in ("graph", "modules", "tensors"))
        gm = IRModule(nn.Module(), fx.Graph(), class_name=identifier(graph["class"]))
        restore_modules(gm, modules, restore_tensors(kinds, unpack_tensors(kinds, tensors)))
        nodes = decode_nodes(gm, graph["nodes"])
        decode_signature(nodes, graph["signature"])
        gm.graph = nodes  # generates and compiles the source
        gm.graph.lint()
        if type(graph["locked"]) not in (bool, type(None)):
            raise Refusal("the mode that the graph stands for is malformed", found=shown(graph["locked"]))
        gm.locked_mode = graph["locked"]
        check_packed(gm)
        plan = None if texts["plan"] == "null" else Plan.from_json(texts["plan"])
        if plan is not None:
            gm.plan = plan
        _check_stage(gm, plan)
    except Refusal:
        raise
    except Exception as error:  # whatever a table can make constructors and fx do
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise Refusal(f"its parts make no module ({reason})", expected="what mpcompile.save writes") from error
    return gm


def _check_stage(gm: IRModule, plan: Plan | None) -> None:
    """Refuse a graph that is not legal after the passes that its plan records."""
    stage = max(spec.stage_of(gm), spec.recorded(plan) if plan is not None else spec.Stage.TRANSFORMED)
    try:
        spec.check(gm, stage, plan=plan)
    except GraphError as error:
        raise Refusal(error.message, expected=error.expected, found=error.found) from error


# --- The file ---


def _dump(value: Any) -> str:
    """The one JSON text of a value: no spaces, ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _parse(text: str | bytes, what: str = "header") -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"its {what} is no JSON: {str(error)[:80]}", hint="the file is damaged: copy it again") from error


def _framed(header: Mapping[str, Any]) -> bytes:
    """A header as it stands in a safetensors file: length, JSON, spaces up to a multiple of 8."""
    text = _dump(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _flat(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _write(path: str, metadata: dict[str, str], tensors: Mapping[str, Tensor], stale: str | None = None) -> None:
    """Write a new file and put it in the place of ``path``; just before, ``stale``, about the old one, goes."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Refusal("something else is there", expected="a regular file, or nothing", hint="choose another path")
    with replacing(path) as file:
        _fill(file, metadata, tensors)
        if stale is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stale)


def _fill(file: BinaryIO, metadata: dict[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Header, tensors, and at last the checksum into the header."""
    header: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].itemsize, n)):  # keeps every tensor aligned
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise Refusal(f"tensor {name} has a dtype that a file can't hold", found=tensor.dtype)
        end = place + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end]}
        place = end
    first = _framed(header)
    if len(first) > _MAX_HEADER:
        raise Refusal("its graph and plan are too large", expected=f"at most {_MAX_HEADER} bytes", found=len(first))
    digest = hashlib.sha256(first)
    file.write(first)
    for name in list(header)[1:]:
        data = _flat(tensors[name].detach().cpu().contiguous())
        for start in range(0, len(data), _CHUNK):
            digest.update(data[start : start + _CHUNK])
            file.write(data[start : start + _CHUNK])
    metadata["sha256"] = digest.hexdigest()
    file.seek(0)
    file.write(_framed(header))


def _read(path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, after every check that needs no knowledge of graphs."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Refusal("it is not a file", expected="a file that mpcompile.save wrote", hint="check the path")
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        room = size - 8 - length
        if not 2 <= length <= _MAX_HEADER or room < 0:
            raise Refusal(
                "it is not a safetensors file, or only the beginning of one",
                expected="a file that mpcompile.save wrote",
                found=f"{size} bytes",
                hint="copy it again; what torch.save wrote is loaded with torch.load",
            )
        raw = file.read(length)
        header = _parse(raw)
        metadata = _metadata(header)
        claimed, metadata["sha256"] = metadata["sha256"], _BLANK
        try:
            first = _framed(header)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"its header is not as mpcompile.save writes it: {error}") from error
        digest = hashlib.sha256(first)
        tensors: dict[str, Tensor] = {}
        place = 0
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = _room(name, entry, place, room)
                _take(file, digest, name, tensors[name])
                place += tensors[name].nbytes
        metadata["sha256"] = claimed
        if place != room or digest.hexdigest() != claimed or _framed(header)[8:] != raw:
            raise Refusal(
                "its content is not what was written",
                expected=f"{8 + length + place} bytes with sha256 {shown(claimed)}",
                found=f"{size} bytes with {digest.hexdigest()}",
                hint="the file is damaged: copy it again, or save the module again",
            )
    return metadata, tensors


def _metadata(header: Any) -> dict[str, str]:
    """The string metadata, if it is of our kind and version."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != KIND:
        raise Refusal(
            "it is a safetensors file of another kind",
            expected="a file that mpcompile.save wrote",
            hint="weights alone are loaded with safetensors.torch.load_file and model.load_state_dict",
        )
    if metadata.get("format_version") != str(VERSION):
        raise Refusal(
            "its format is not known here",
            expected=f"format version {VERSION} (this is mpcompile {__version__})",
            found=f"{shown(metadata.get('format_version'))}, of mpcompile {shown(metadata.get('mpcompile'))}",
            hint="load it with the version of mpcompile that wrote it, or a newer one",
        )
    keys = {"sha256", "format", "format_version", "mpcompile", "torch", *_TEXTS}
    if metadata.keys() != keys or not all(isinstance(v, str) for v in metadata.values()):
        raise Refusal("its metadata is malformed", expected=sorted(keys), found=shown(sorted(metadata)))
    return metadata


def _room(name: str, entry: Any, place: int, room: int) -> Tensor:
    """An empty tensor for an entry of the header, which must begin at ``place``."""
    module_path(name)
    try:
        dtype, shape, (start, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        plain = all(type(i) is int and i >= 0 for i in [start, end, *shape])
        if plain and start == place and end - start == math.prod(shape) * dtype.itemsize and end <= room:
            return torch.empty(shape, dtype=dtype, device="cpu")
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
        raise Refusal(f"the header's entry for tensor {name} is malformed", found=shown(entry)) from error
    raise Refusal(
        f"tensor {name} is not where the header says",
        expected=f"shape and data_offsets that agree, between {place} and {room}",
        found=shown(entry),
        hint="the file is truncated or damaged: copy it again",
    )


def _take(file: BinaryIO, digest: Any, name: str, tensor: Tensor) -> None:
    """Read a tensor's bytes into it, hashing them on the way."""
    data = _flat(tensor)
    for start in range(0, len(data), _CHUNK):
        part = data[start : start + _CHUNK]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise Refusal(f"it ends inside tensor {name}", hint="the file is truncated: copy it again")
        digest.update(part)
    if tensor.dtype is torch.bool and len(data) and int(tensor.view(torch.uint8).max()) > 1:
        raise Refusal(f"tensor {name} holds booleans that are neither 0 nor 1")
