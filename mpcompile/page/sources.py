"""What a page is made from: the JSON that commands write, read leniently, and an artifact."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpcompile.errors import ArtifactError
from mpcompile.graph import IRModule


@dataclass
class Sources:
    """Everything that a page may show; what is absent is None or empty, and its section says so.

    Attributes:
        audit: ``mpcompile audit --json``: ``rows`` (see :class:`mpcompile.report.Row`), ``environment``, ``notes``.
        explain: ``mpcompile explain --json``: ``layers`` with ``name``, ``engine``, ``us``, ``dense_us``.
        analyze: ``mpcompile analyze --json``: layers by name, or ``layers`` as a list with ``name``; of each ``sigma``,
            ``edge``, ``spikes``, ``verdict``, ``fit_error``, ``shape``, and ``singular_values`` (or ``eigenvalues`` of
            W^T W / N) to draw.
        certify: ``mpcompile certify --json``: ``samples``, ``tiers`` with ``name``, ``certified``, ``samples``,
            ``median``; ``statements`` with ``kind`` and ``text``.
        artifact: the loaded model.
        name: of the artifact's file, or "".
        size: bytes of the artifact on disk.
        dense_size: bytes of its weights, were they dense.
        pictures: name -> (H, W, 3) uint8 pictures with merged tokens outlined, in order, with captions.
    """

    audit: dict[str, Any] | None = None
    explain: dict[str, Any] | None = None
    analyze: dict[str, Any] | None = None
    certify: dict[str, Any] | None = None
    artifact: IRModule | None = None
    name: str = ""
    size: int | None = None
    dense_size: int | None = None
    pictures: dict[str, list[tuple[str, np.ndarray]]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """What was measured: the audit's JSON, or what the artifact carries of it; {} without either."""
        if self.audit is not None:
            return self.audit
        return self.artifact.plan.figures if self.artifact is not None else {}


_MARKS = {"audit": "rows", "explain": "layers", "certify": "tiers"}


def read_json(path: Path | None, command: str) -> dict[str, Any] | None:
    """What a command wrote with ``--json``; None without a file.

    Raises:
        ArtifactError: the file is missing, or holds something else.
    """
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"can't read {path}", found=error.strerror or str(error)) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON", found=str(error)[:80]) from error
    if command == "analyze":  # layers by name
        right = isinstance(found, dict) and any(isinstance(v, dict) and "fits" in v for v in found.values())
    else:
        right = isinstance(found, dict) and isinstance(found.get(_MARKS[command]), list)
    if not right:
        keys = f"keys {', '.join(list(found)[:5])}" if isinstance(found, dict) else type(found).__name__
        raise ArtifactError(
            f"{path} is not what mpcompile {command} wrote",
            expected=f"what mpcompile {command} MODEL --json {path.name} writes",
            found=keys,
        )
    return dict(found)


def number(value: Any) -> float | None:
    """A finite number, or None."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if plain else None


def numbers(value: Any) -> list[float]:
    """The finite numbers of a list; none of anything else."""
    return [x for x in map(number, value) if x is not None] if isinstance(value, list) else []


def records(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, entry) of a mapping of entries, or of a list of entries with names; others are passed over."""
    if isinstance(value, Mapping):
        value = [{"name": key, **entry} for key, entry in value.items() if isinstance(entry, Mapping)]
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, Mapping):
            yield str(entry.get("name", "")), entry
