"""Forged artifacts: files with a valid checksum over any header and data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def forge(path: Path, header: dict[str, Any], data: bytes) -> Path:
    """Write a file with a valid checksum over the header and data."""

    def framed() -> bytes:
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    header["__metadata__"]["sha256"] = "0" * 64
    header["__metadata__"]["sha256"] = hashlib.sha256(framed() + data).hexdigest()
    path.write_bytes(framed() + data)
    return path
