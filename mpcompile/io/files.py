"""Files that commands read and write: regular ones alone are read, and what is written is never half-written.

Everything that mpcompile writes to disk for a user goes through :func:`replacing` or :func:`replace_atomically`, and
everything that it reads goes through :func:`open_regular`, so that a FIFO or a device can't make it wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import secrets
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from mpcompile.errors import ArtifactError, first_line, printable
from mpcompile.io.state_dicts import Found, explain_misfit, find_state, fitted, stand_ins, unwrapped

MARK = b"mpcompile"  # by which our own archives are recognised
TEMPORARY = ".mpcompile-"  # how the name of a temporary file begins; a random part follows
LARGEST_TEXT = 1 << 28  # bytes of a JSON file
_DEEPEST = 64  # nesting of JSON
_CHUNK = 1 << 20
_FAILED_WRITES = ("PytorchStreamWriter", "inline_container", "iostream error")  # as what torch tells of a full disk


# --- Reading ---


_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def kind_of(mode: int) -> str:
    """What a file is, for a message, from the mode that ``stat`` gives."""
    return "a folder" if stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "a regular file")


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """Open a file for reading if it is a regular one; a FIFO, socket, device or folder isn't waited for, nor opened.

    Args:
        path: links are followed.
        most: bytes that it may have.

    Raises:
        OSError: it can't be opened, is no regular file, or is larger than ``most``.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        _check_regular(os.stat(path), path)  # opening a device may do anything
        descriptor = os.open(path, flags)
    except ValueError as error:  # a null character in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        status = os.fstat(descriptor)
        _check_regular(status, path)  # another file may stand there by now
        if most is not None and status.st_size > most:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes, more than {most}", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, kind_of(status.st_mode), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, kind_of(status.st_mode), str(path))


def read_bytes(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as :func:`open_regular`.
    """
    with open_regular(path, most) as file:
        return file.read()


def read_text(path: str | os.PathLike[str], most: int = LARGEST_TEXT) -> str:
    """The UTF-8 text of a regular file.

    Raises:
        OSError: as :func:`open_regular`, or it isn't UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(errno.EILSEQ, "it is not UTF-8 text", str(path)) from error


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text whose integers and nesting are of a reasonable size.

    Raises:
        ValueError: it isn't such a text.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
    level = [value]
    for _ in range(_DEEPEST):
        nested = [part for part in level if isinstance(part, (dict, list))]
        level = [item for part in nested for item in (part.values() if isinstance(part, dict) else part)]
        if not level:
            return value
    raise ValueError("too deeply nested")


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ArtifactError: it is missing, can't be read, or is no JSON.
    """
    try:
        return parse_json(read_bytes(path))
    except OSError as error:
        raise ArtifactError(f"can't read {path}", found=error.strerror or str(error)) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON", found=str(error)[:80]) from error


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal.

    Raises:
        OSError: as :func:`open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while part := file.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


# --- Writing ---


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it, so that nothing half-written is left.

    Raises:
        ArtifactError: the folder is missing or not writable, or the disk is full; an older file is untouched.
    """
    replace_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in its place.

    Raises:
        ArtifactError: as :func:`write_atomically`.
    """
    try:
        with temporary_path(path) as temporary:
            write(temporary)
    except OSError as error:
        raise ArtifactError(
            f"can't write {path}", expected="a writable folder with room", found=error.strerror or str(error)
        ) from error


@contextlib.contextmanager
def temporary_path(path: str | os.PathLike[str], suffix: str = "") -> Iterator[Path]:
    """A new, empty file beside ``path``, of an unpredictable name, that takes its place in the end.

    For writers that want a path; where one takes an open file, :func:`replacing` leaves nothing behind even if the
    process is killed. An older file, and whatever a link leads to that lies at the temporary name, is untouched by a
    failure. A link at ``path`` is followed: the file that it leads to is replaced. The name ends in ``suffix``, or as
    ``path`` does, for writers that look at it.

    Raises:
        OSError: the folder is missing or not writable, the disk is full, or something else than a file is there.
    """
    target = _target(path)
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp{suffix or target.suffix}")
    os.close(_created(temporary))
    try:
        yield temporary
        _flushed(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if type(error).__name__ == "SafetensorError" or any(words in str(error) for words in _FAILED_WRITES):
            raise OSError(errno.EIO, printable(str(error).partition("\n")[0], 100), str(path)) from error
        raise
    _flush_folder(target.parent)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An open new file that becomes ``path`` in the end; until then it has no name where the system can do that.

    Its permissions are those of a new file. Raises as :func:`temporary_path`.
    """
    target = _target(path)
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    named = False
    try:
        descriptor = _unnamed(target.parent)
        if descriptor is None:
            descriptor, named = _created(temporary), True
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not named:
                _link(file.fileno(), temporary)
                named = True
        os.replace(temporary, target)
    except BaseException:
        if named:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise
    _flush_folder(target.parent)


def _target(path: str | os.PathLike[str]) -> Path:
    """The file that ``path`` leads to, which is a regular one or isn't there."""
    target = Path(os.path.realpath(path))
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise OSError(errno.EEXIST, "something else than a file is there", str(path))
    return target


def _created(path: Path) -> int:
    """A new file, open for writing; never one that is there already, nor what a link leads to."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _unnamed(folder: Path) -> int | None:
    """A new file without a name, which ceases to be with the process; None where there is no such thing."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:
        return None  # not on this file system; or what a named file will meet with, too


def _link(descriptor: int, path: Path) -> None:
    """Give a name to a file of :func:`_unnamed`."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:  # with folder descriptors, os.link follows the link in /proc, as this needs
        os.link(f"/proc/self/fd/{descriptor}", path.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _flushed(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    """So that a new name, too, outlives a power failure."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def make_folder(path: Path) -> None:
    """A folder and those it lies in, where they aren't there yet.

    Raises:
        ArtifactError: it can't be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"can't make the folder {path}", found=error.strerror or str(error)) from error


def check_writable(path: Path) -> None:
    """A file can be written at ``path``: for a check before the work whose result it gets.

    Raises:
        ArtifactError: its folder is missing or not writable, or something else than a file is there.
    """
    try:
        target = _target(path)
        if not target.name or target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = target.parent
        if not folder.is_dir():
            problem = f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}"
            raise ArtifactError(f"can't write {path}", expected="a file in a folder that is there", found=problem)
        _check_folder(folder)
    except OSError as error:
        found = error.strerror or str(error)
        raise ArtifactError(f"can't write {path}", expected="a file in a writable folder", found=found) from error


def check_folder_writable(path: Path) -> None:
    """Files can be written in the folder ``path``, which is there or can be made.

    Raises:
        ArtifactError: they can't.
    """
    try:
        place = Path(os.path.realpath(path))
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        _check_folder(place)
    except OSError as error:
        found = error.strerror or str(error)
        problem = f"can't make the folder {path}, or write into it"
        raise ArtifactError(problem, expected="a writable folder", found=found) from error


def _check_folder(folder: Path) -> None:
    temporary = folder / f"{TEMPORARY}{secrets.token_hex(8)}.tmp"
    os.close(_created(temporary))
    os.unlink(temporary)


# --- Whose file is it? ---


def sign(path: Path) -> None:
    """Mark a ZIP archive or an ONNX file, so that :func:`is_ours` knows it again; readers pass over the mark."""
    with open(path, "r+b") as file:
        if file.read(4) == b"PK\x03\x04":
            file.seek(-2, os.SEEK_END)
            if file.read(2) == b"\0\0":  # the length of the archive's comment, which is the end of the file
                file.seek(-2, os.SEEK_END)
                file.write(struct.pack("<H", len(MARK)) + MARK)
        elif path.suffix == ".onnx":
            file.seek(0, os.SEEK_END)
            file.write(_ONNX_PRODUCER)


_ONNX_PRODUCER = b"\x12" + bytes([len(MARK)]) + MARK  # ModelProto.producer_name; the last of several counts
_HTML = b'<meta name="generator" content="mpcompile'
_PICTURES = {b"\x89PNG": b"Software\0mpcompile", b"%PDF": b"/Creator (mpcompile)", b"<?xm": b"<dc:title>mpcompile</"}
_JSON: tuple[frozenset[str], ...] = (
    frozenset({"rows", "environment", "fell_back"}),
    frozenset({"layers", "passes", "macs"}),
    frozenset({"format", "mpcompile", "plan"}),
    frozenset({"layers", "machine", "cache"}),
    frozenset({"tiers", "samples"}),
    frozenset({"file", "format", "bytes"}),
    frozenset({"recipe", "result", "macs"}),
)
_JSON_ENTRIES: tuple[frozenset[str], ...] = (
    frozenset({"shape", "fits"}),
    frozenset({"shape", "zeros", "legal"}),
    frozenset({"model", "compile", "train"}),
)


def is_ours(path: Path) -> bool:
    """Whether mpcompile wrote a file, by its content; an empty file is anybody's, so that nothing is lost with it."""
    try:
        with open_regular(path) as file:
            head = file.read(1 << 16)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 16)))
            tail = file.read()
            if not size:
                return True
            if head.startswith(b"PK\x03\x04"):
                return MARK in tail[tail.rfind(b"PK\x05\x06") + 22 :]
            if head[:1] in b"{[" and size <= LARGEST_TEXT:
                file.seek(0)
                return _our_json(file.read())
            if head[8:9] == b"{":
                file.seek(8)
                return _our_tensors(file.read(min(size, int.from_bytes(head[:8], "little"))))
    except (OSError, OverflowError):
        return False
    if head.startswith(b"<!doctype html>"):
        return _HTML in head
    picture = _PICTURES.get(head[:4])
    if picture is not None:
        return picture in head or picture in tail
    digest = size == 64 and not head.strip(b"0123456789abcdef")  # student.stamp
    return digest or tail.endswith(_ONNX_PRODUCER)


def _our_tensors(header: bytes) -> bool:
    try:
        metadata = json.loads(header)["__metadata__"]
        return metadata.get("format") == "mpcompile" or "mpcompile" in metadata
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def _our_json(text: bytes) -> bool:
    """What commands write with ``--json``, and the log of a run."""
    try:
        value = parse_json(text)
    except ValueError:
        try:
            value = parse_json(text.partition(b"\n")[0])
        except ValueError:
            return text.startswith(b'{"event": ')  # cut off by a kill
        return isinstance(value, dict) and {"event", "time"} <= value.keys()
    if isinstance(value, dict) and any(keys <= value.keys() for keys in (*_JSON, {"event", "time"})):
        return True
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return bool(entries) and any(
        all(isinstance(entry, dict) and keys <= entry.keys() for entry in entries) for keys in _JSON_ENTRIES
    )


# --- Checkpoints ---


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a safetensors file, or in a torch file of tensors (weights_only), whoever wrote it.

    Prefixes of wrappers that stand before all names (``module.``, ``_orig_mod.``) are taken off, and a state dict is
    found where training scripts put it; each is logged. A folder stands for the ``model.safetensors`` in it, and a file
    of :func:`mpcompile.save` for its dense weights, with zeros where masks remove.

    Raises:
        ArtifactError: the file is missing, truncated or not a checkpoint.
    """
    found = unwrapped(_state(path))
    found.tell(path)
    return found.state


def _state(path: Path) -> Found:
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        problem = "something that is no regular file" if path.exists() else "none"
        expected = "a .safetensors, .pt or .pth file"
        raise ArtifactError(f"there is no checkpoint {path}", expected=expected, found=problem)
    try:
        raw = _loaded(path)
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(
            f"{path} can't be read as a checkpoint",
            expected="a whole safetensors file, or a torch file of tensors alone",
            found=first_line(error),
            hint="fetch the file again, or save the state dict with safetensors",
        ) from error
    return find_state(raw, path)


def _loaded(path: Path) -> Any:
    """What stands in the file."""
    with open_regular(path) as file:
        head = file.read(9)
        if head[8:9] != b"{" and path.suffix != ".safetensors":
            return _unpickled(file, path)
    if is_artifact(path):
        from mpcompile.artifact.file import load
        from mpcompile.export.programs import dense_state

        return dense_state(load(path))
    from safetensors.torch import load_file

    return load_file(path)


def _unpickled(file: BinaryIO, path: Path) -> Any:
    """What a torch file holds; objects beside the tensors are passed over, and nothing that it names is imported."""
    problem: pickle.UnpicklingError | None = None
    for as_dicts in (False, True):  # a class whose objects are filled like dicts is known by its name, or by failing
        file.seek(0)
        names = stand_ins(file, as_dicts)
        file.seek(0)
        try:
            with torch.serialization.safe_globals(names):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            problem = error
            if "SETITEM" not in str(error):
                break
    reason = str(problem).rpartition("WeightsUnpickler error: ")[2].strip()
    raise ArtifactError(
        f"{path} can't be read as a checkpoint",
        expected="tensors by name, and plain values",
        found=reason.partition("\n")[0].partition(" Please use")[0],
        hint="save model.state_dict() with torch.save or safetensors",
    ) from problem


def is_artifact(path: Path) -> bool:
    """Whether a file says that :func:`mpcompile.save` wrote it, or a folder holds such a file."""
    from safetensors import safe_open

    path = path / "model.safetensors" if path.is_dir() else path
    try:
        with open_regular(path), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            return metadata.get("format") == "mpcompile" or "modules" in metadata
    except Exception:
        return False


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file into a model; prefixes of wrappers that its names have and the model's haven't come off.

    Raises:
        ArtifactError: as :func:`read_checkpoint`, or its tensors aren't the model's.
    """
    found = _state(path)
    found = fitted(found, model)
    misfit = explain_misfit(found.state, model)
    if misfit is None:
        try:
            model.load_state_dict(found.state)
        except (RuntimeError, TypeError, AttributeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            misfit = "its own tensors", " ".join(lines[1:3]) or str(error)
        else:
            found.tell(path)
            return
    raise ArtifactError(f"{path} doesn't fit the model", expected=misfit[0], found=misfit[1])
