"""The cache folder and small JSON files in it. If the cache cannot be read or written, runs are slower but correct."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from mpcompile.io.messages import warn_once
from mpcompile.io.reading import read_text
from mpcompile.io.writing import replacing

log = logging.getLogger(__name__)
_MAX_BYTES = 64 << 20  # size of the largest JSON file that is read


def cache_folder() -> Path:
    """Return ``$MPCOMPILE_CACHE``, or ``mpcompile`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. It may not exist yet.

    For a user without a home directory, return :func:`temporary_folder`.
    """
    chosen = os.environ.get("MPCOMPILE_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):
        return Path(base) / "mpcompile"
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "mpcompile" if os.path.isabs(home) else temporary_folder()


def temporary_folder() -> Path:
    """Return this user's folder inside the system's temporary folder."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(tempfile.gettempdir()) / f"mpcompile-{user}"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or damaged. Warn once about a damaged file."""
    try:
        data = json.loads(read_text(path, _MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warn_once(log, f"mpcompile: {path} cannot be read and is ignored: {str(error)[:200]}")
        return {}
    if not isinstance(data, dict):
        warn_once(log, f"mpcompile: {path} cannot be read and is ignored: it does not hold a JSON object")
        return {}
    return data


def write_json(path: Path, update: dict[str, Any]) -> None:
    """Add the keys of ``update`` to a JSON file atomically: readers see either the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**read_json(path), **update}, indent=0)
        # A cache needs no flush. Links are not followed: another user may have planted one in the temporary folder.
        with replacing(path, mode=0o600, durable=False, follow=False) as file:
            file.write(text.encode("utf-8"))
    except (OSError, RecursionError) as error:
        warn_once(log, f"mpcompile: {path} cannot be written, so nothing is stored for the next run: {error}")


def positive(value: Any) -> float | None:
    """Return ``value`` as a float if it is a positive, finite number, as a duration in a file must be; else None."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and number > 0 else None
