"""The cache folder, and small JSON files in it. A cache that can't be read or written costs time, never a result."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
_SAID: set[str] = set()


def say_once(text: str) -> None:
    """Log a warning that this process has not logged yet."""
    if text not in _SAID:
        _SAID.add(text)
        log.warning(text)


def cache_folder() -> Path:
    """``$MPCOMPILE_CACHE``, or ``mpcompile`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It need not exist yet."""
    given = os.environ.get("MPCOMPILE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpcompile"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is missing or damaged (which is said once)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        say_once(f"mpcompile: {path} can't be read and is ignored: {error}")
        return {}
    if not isinstance(data, dict):
        say_once(f"mpcompile: {path} can't be read and is ignored: it holds no JSON object")
        return {}
    return data


def write_json(path: Path, update: dict[str, Any]) -> None:
    """Add the keys of ``update`` to a JSON file; a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**read_json(path), **update}, indent=0), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        say_once(f"mpcompile: {path} can't be written, so nothing is kept for the next run: {error}")
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
