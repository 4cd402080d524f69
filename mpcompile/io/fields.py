"""Option dataclasses: checks of the types and ranges of their fields."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mpcompile.errors import ConfigError

_LARGEST = 1 << 63  # every integer option is below this


def check_fields(options: Any, *ranges: tuple[str, float, float]) -> None:
    """Check the types of all fields of a dataclass, and the ranges of some.

    Args:
        options: the instance; its annotations are like ``"int"``, ``"float | None"`` or ``"tuple[float, float]"``.
        ranges: (field, low, high), bounds included; None is always in range.

    Raises:
        ConfigError: names the first field that fails.
    """
    for field in dataclasses.fields(options):
        check_type(field.name, str(field.type), getattr(options, field.name))
    for name, low, high in ranges:
        value = getattr(options, name)
        limit = _LARGEST if isinstance(value, int) else math.inf
        if value is not None and not (low <= value <= high and value < limit):
            raise ConfigError(f"option {name!r} is out of range", expected=f"{low:g} to {high:g}", found=value)


def check_type(name: str, wanted: str, value: Any) -> None:
    """Check that a value is of a type written like ``"int"``, ``"float | None"`` or ``"tuple[float, float]"``.

    Raises:
        ConfigError: the value is of another type.
    """
    if wanted.startswith("tuple["):
        parts = wanted.removeprefix("tuple[").removesuffix("]").split(", ")
        if not isinstance(value, (tuple, list)) or len(value) != len(parts):
            raise ConfigError(f"option {name!r} has the wrong type", expected=f"{len(parts)} values", found=repr(value))
        for part, entry in zip(parts, value, strict=True):
            check_type(name, part, entry)
        return
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    allowed = tuple(kind for part in wanted.split(" | ") if part != "None" for kind in kinds[part])
    if value is None and wanted.endswith("None"):
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ConfigError(f"option {name!r} has the wrong type", expected=wanted, found=repr(value))
