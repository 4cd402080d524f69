"""Files of a user: only regular ones are read, each is written as a whole or not at all, and content is validated."""

from __future__ import annotations

import warnings
from typing import Any

from mpcompile.io.checkpoints import is_artifact, load_checkpoint, read_checkpoint
from mpcompile.io.ownership import MARK, is_ours, sign
from mpcompile.io.reading import (
    LARGEST_TEXT,
    kind_of,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    sha256,
)
from mpcompile.io.writing import (
    TEMPORARY,
    check_folder_writable,
    check_writable,
    make_folder,
    replacing,
    temporary_path,
    write_atomically,
)

__all__ = [
    "LARGEST_TEXT",
    "MARK",
    "TEMPORARY",
    "check_folder_writable",
    "check_writable",
    "is_artifact",
    "is_ours",
    "kind_of",
    "load_checkpoint",
    "make_folder",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_checkpoint",
    "read_json",
    "read_text",
    "replacing",
    "sha256",
    "sign",
    "temporary_path",
    "write_atomically",
]


def __getattr__(name: str) -> Any:
    if name == "replace_atomically":
        text = "replace_atomically is called write_atomically, which takes text and bytes as well"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return write_atomically
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
