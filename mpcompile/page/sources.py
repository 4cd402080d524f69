"""The data of a page: the JSON of other commands, read leniently, and an artifact."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from mpcompile.errors import ArtifactError
from mpcompile.io import reading
from mpcompile.io.schema import Between, Mismatch, Natural, check
from mpcompile.ir.module import IRModule
from mpcompile.plan import Figures


@dataclass
class Sources:
    """The data of a page. Missing data is None or empty, and its section names the command that produces it.

    Attributes:
        audit: ``mpcompile audit --json``: ``rows`` (:class:`mpcompile.measure.report.Row`), ``environment``, ``notes``.
        explain: ``mpcompile explain --json``: ``layers`` with ``name``, ``engine``, ``us``, ``dense_us``.
        analyze: ``mpcompile analyze --json``: layers by name, or ``layers`` as a list with ``name``; per layer
            ``sigma``, ``edge``, ``spikes``, ``verdict``, ``fit_error``, ``shape``, and ``singular_values`` (or
            ``eigenvalues`` of W^T W / N) to draw.
        certify: ``mpcompile certify --json``: ``samples``, ``tiers`` with ``name``, ``certified``, ``samples``,
            ``median``; ``statements`` with ``kind`` and ``text``.
        optimize: ``mpcompile optimize --json``: ``entries`` (:class:`mpcompile.optimization.frontier.Entry`),
            ``max_drop``, ``confidence``.
        artifact: the loaded model.
        name: file name of the artifact, or "".
        size: size of the artifact on disk, in bytes.
        dense_size: size of its weights stored densely, in bytes.
        pictures: image name -> (caption, (H, W, 3) uint8 pixels) pairs, with merged tokens outlined.
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
    optimize: dict[str, Any] | None = None

    def figures(self) -> dict[str, Any]:
        """Return the JSON of the audit, or the figures stored in the artifact, or {}."""
        if self.audit is not None:
            return self.audit
        return self.artifact.plan.figures if self.artifact is not None else {}


class _Timed(TypedDict, total=False):
    name: str
    engine: str
    us: float | None
    dense_us: float | None


class _Explained(TypedDict, total=False):
    layers: list[_Timed]
    machine: str


class _Fitted(TypedDict, total=False):
    shape: list[Natural]
    sigma: Annotated[float, Between(0, 1e150)] | None
    edge: float | None
    spikes: int | None
    verdict: str | None
    fit_error: float | None
    singular_values: list[float]
    eigenvalues: list[float]


class _Tier(TypedDict, total=False):
    name: str
    certified: float | None
    samples: float | None
    median: float | None


class _Statement(TypedDict, total=False):
    kind: str
    text: str


class _Certified(TypedDict, total=False):
    samples: float | None
    tiers: list[_Tier]
    statements: list[_Statement]
    violations: float | None


class _Searched(TypedDict, total=False):
    max_drop: float | None
    confidence: float | None
    entries: list[dict[str, Any]]


# The fields that are read from each command's JSON, and their types; further fields are ignored.
_SCHEMAS: dict[str, Any] = {
    "audit": Figures,
    "explain": _Explained,
    "analyze": dict[str, _Fitted],
    "certify": _Certified,
    "optimize": _Searched,
}
_MARKS = {"audit": "rows", "explain": "layers", "certify": "tiers", "optimize": "entries"}


def read_json(path: Path | None, command: str) -> dict[str, Any] | None:
    """Return the JSON that a command wrote with ``--json``; None for no file.

    Raises:
        ArtifactError: the file is missing, or is not JSON of that command.
    """
    if path is None:
        return None
    value = reading.read_json(path)
    if command == "analyze":  # layers by name
        right = isinstance(value, dict) and any(isinstance(v, dict) and "fits" in v for v in value.values())
    else:
        right = isinstance(value, dict) and isinstance(value.get(_MARKS[command]), list)
    if not right:
        keys = f"keys {', '.join(list(value)[:5])}" if isinstance(value, dict) else type(value).__name__
        raise ArtifactError(
            f"{path} is not the JSON of mpcompile {command}",
            expected=f"the output of mpcompile {command} MODEL --json {path.name}",
            found=keys,
        )
    try:
        check(value, _SCHEMAS[command])
    except Mismatch as error:
        raise ArtifactError(
            f"{path} is not the JSON of mpcompile {command}: its field {error.where} has the wrong type",
            expected=error.expected,
            found=error.found,
        ) from error
    return dict(value)


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer larger than any float
        return None


def numbers(value: Any) -> list[float]:
    """Return the finite numbers of a list; [] for anything else."""
    return [x for x in map(number, value) if x is not None] if isinstance(value, list) else []


def records(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, entry) pairs of a mapping of entries, or of a list of named entries; other values are skipped."""
    if isinstance(value, Mapping):
        value = [{"name": key, **entry} for key, entry in value.items() if isinstance(entry, Mapping)]
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, Mapping):
            yield str(entry.get("name", "")), entry
