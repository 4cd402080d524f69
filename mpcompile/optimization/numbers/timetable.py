"""Times of layers on another machine, as ``mpcompile explain --json`` writes them there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from mpcompile.errors import ArtifactError
from mpcompile.io.reading import read_json
from mpcompile.io.schema import Mismatch, Natural, check

Times = Mapping[tuple[tuple[int, ...], str], Mapping[int, float]]
"""(shape of the weight, pattern or ``"dense"``) -> rows of the product -> microseconds."""


class _Layer(TypedDict):
    shape: list[Natural]
    pattern: str
    tokens: int | None
    us: float | None
    dense_us: float | None


class _Explained(TypedDict):
    layers: list[_Layer]
    machine: str


def read_times(paths: Sequence[str | os.PathLike[str]]) -> tuple[Times, str]:
    """Return the times in files of ``mpcompile explain --json``, one per pattern or number of tokens, and the machine.

    Raises:
        ArtifactError: a file is missing or is no such JSON, the files are of different machines, or nothing was timed.

    Example:
        >>> read_times(["no-such-file.json"])
        Traceback (most recent call last):
        mpcompile.errors.ArtifactError: ...
    """
    times: dict[tuple[tuple[int, ...], str], dict[int, float]] = {}
    machines = set()
    for path in map(Path, paths):
        values: Any = read_json(path)
        try:
            check(values, _Explained)
        except Mismatch as error:
            raise ArtifactError(
                f"{path} is not the JSON of mpcompile explain: {error}",
                expected=f"the output of mpcompile explain MODEL --json {path.name}",
            ) from error
        machines.add(values["machine"])
        for layer in values["layers"]:
            shape, rows = tuple(layer["shape"]), layer["tokens"]
            for pattern, us in ((layer["pattern"], layer["us"]), ("dense", layer["dense_us"])):
                if rows and us:
                    times.setdefault((shape, pattern), {})[rows] = us
    if len(machines) != 1 or not times:
        raise ArtifactError(
            "these files are not the times of one machine",
            expected="timed layers, of one machine",
            found="; ".join(sorted(machines)) or "no file",
        )
    return times, machines.pop()
