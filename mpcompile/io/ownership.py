"""Ownership: files that mpcompile wrote, and so may replace, are recognised by their content, never by their name."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

from mpcompile.io.reading import LARGEST_TEXT, open_regular, parse_json
from mpcompile.io.writing import write_atomically

MARK = b"mpcompile"  # the mark in archives and ONNX files that we write
_ZIP = b"PK\x03\x04"
_ONNX_PRODUCER = b"\x12" + bytes([len(MARK)]) + MARK  # ModelProto.producer_name; if repeated, the last one counts
_HTML = b'<meta name="generator" content="mpcompile'
_PICTURES = {b"\x89PNG": b"Software\0mpcompile", b"%PDF": b"/Creator (mpcompile)", b"<?xm": b"<dc:title>mpcompile</"}
_JSON: tuple[frozenset[str], ...] = (  # top-level keys of the JSON that commands write with --json
    frozenset({"rows", "environment", "fell_back"}),
    frozenset({"layers", "passes", "macs"}),
    frozenset({"format", "mpcompile", "plan"}),
    frozenset({"layers", "machine", "cache"}),
    frozenset({"tiers", "samples"}),
    frozenset({"max_drop", "confidence", "entries"}),
    frozenset({"mpcompile_runner"}),
    frozenset({"mpcompile_search"}),
    frozenset({"file", "format", "bytes"}),
    frozenset({"recipe", "result", "macs"}),
    frozenset({"processor", "isa", "kernel_libraries"}),
)
_JSON_ENTRIES: tuple[frozenset[str], ...] = (  # keys of every entry of a top-level list or mapping
    frozenset({"shape", "fits"}),
    frozenset({"shape", "zeros", "legal"}),
    frozenset({"model", "compile", "train"}),
)
_EVENT = frozenset({"event", "time"})  # a line in the log of a run
_EDGE = 1 << 16  # bytes examined at each end of a file
_DIGEST = 64  # bytes of student.stamp, a checksum in hexadecimal


def sign(path: Path) -> None:
    """Mark a ZIP archive or an ONNX file so that :func:`is_ours` recognises it; other readers ignore the mark."""
    with open(path, "r+b") as file:
        if file.read(4) == _ZIP:
            file.seek(-2, os.SEEK_END)
            if file.read(2) == b"\0\0":  # an archive without a comment ends with the comment's length, 0
                file.seek(-2, os.SEEK_END)
                file.write(struct.pack("<H", len(MARK)) + MARK)
        elif path.suffix == ".onnx":
            file.seek(0, os.SEEK_END)
            file.write(_ONNX_PRODUCER)


def write_signed(path: str | os.PathLike[str], write: Callable[[Path], object], *, suffix: str = "") -> None:
    """Replace a file by one that ``write`` creates at the temporary path it is given, then signed by :func:`sign`.

    Raises:
        ArtifactError: as :func:`mpcompile.io.writing.write_atomically`.
    """

    def write_and_sign(temporary: Path) -> None:
        write(temporary)
        sign(temporary)

    write_atomically(path, write_and_sign, suffix=suffix)


def is_ours(path: Path) -> bool:
    """Return True if mpcompile wrote a file, judged by content, or if the file is empty: replacing it loses nothing."""
    try:
        with open_regular(path) as file:
            head = file.read(_EDGE)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _EDGE))
            tail = file.read()
            if not size:
                return True
            if head.startswith(_ZIP):
                return MARK in tail[tail.rfind(b"PK\x05\x06") + 22 :]  # the comment, after the end-of-archive record
            if head[:1] in b"{[" and size <= LARGEST_TEXT:
                file.seek(0)
                return _is_our_json(file.read())
            if head[8:9] == b"{":
                file.seek(8)
                return _is_our_header(file.read(min(size, int.from_bytes(head[:8], "little"))))
    except (OSError, OverflowError):
        return False
    if head.startswith(b"<!doctype html>"):
        return _HTML in head
    picture = _PICTURES.get(head[:4])
    if picture is not None:
        return picture in head or picture in tail
    digest = size == _DIGEST and not head.strip(b"0123456789abcdef")
    return digest or tail.endswith(_ONNX_PRODUCER)


def _is_our_header(header: bytes) -> bool:
    """Return True for the header of a safetensors file that mpcompile wrote."""
    try:
        metadata = json.loads(header)["__metadata__"]
        return metadata.get("format") == "mpcompile" or "mpcompile" in metadata
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False


def _is_our_json(text: bytes) -> bool:
    """Return True for the JSON that commands write with ``--json``, and for the log of a run."""
    try:
        value = parse_json(text)
    except ValueError:
        try:
            value = parse_json(text.partition(b"\n")[0])
        except ValueError:
            return text.startswith(b'{"event": ')  # a log whose first line was cut off by a kill
        return isinstance(value, dict) and value.keys() >= _EVENT
    if isinstance(value, dict) and any(keys <= value.keys() for keys in (*_JSON, _EVENT)):
        return True
    entries = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return bool(entries) and any(
        all(isinstance(entry, dict) and keys <= entry.keys() for entry in entries) for keys in _JSON_ENTRIES
    )
