"""Schemas: check that plain values, such as those of a JSON file, have the types that hints declare.

One checker serves every file that is read. Dataclasses and ``TypedDict``s declare what a file must contain.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from mpcompile.errors import printable

_HUGE = 1 << 64


class Mismatch(ValueError):
    """A value of the wrong type.

    Attributes:
        where: the field, such as ``"layers.fc.macs_dense"``.
        expected: description of the expected value.
        found: description of the value found instead.
    """

    def __init__(self, where: str, expected: str, found: str) -> None:
        self.where, self.expected, self.found = where or "the value", expected, found
        super().__init__(f"{self.where}: expected {expected}, found {found}")


@dataclass(frozen=True)
class Between:
    """In ``Annotated``: numbers from ``low`` to ``high``. NaN is refused."""

    low: float = 0
    high: float = math.inf


@dataclass(frozen=True)
class Length:
    """In ``Annotated``: lists of ``count`` entries."""

    count: int


Natural = Annotated[int, Between(0)]


def check(value: Any, hint: Any, where: str = "") -> None:
    """Raise :class:`Mismatch` if a value is not of a type.

    As in JSON, a list is accepted for a tuple and an integer for a float. A mapping is accepted for a dataclass or a
    ``TypedDict``: a dataclass allows no keys besides its fields, a ``TypedDict`` allows others.

    Args:
        value: the value.
        hint: the type.
        where: the name of the field, for the error.

    Raises:
        Mismatch: for the first value that does not match.

    Example:
        >>> check({"a": [1, 2]}, dict[str, tuple[int, ...]])
        >>> check({"a": [1, "x"]}, dict[str, tuple[int, ...]], "sizes")
        Traceback (most recent call last):
        mpcompile.io.schema.Mismatch: sizes.a.1: expected a whole number, found 'x'
    """
    if hint is Any:
        return
    origin = get_origin(hint)
    if origin is Annotated:
        _check_range(value, hint, where)
    elif origin in (typing.Union, types.UnionType):
        _check_union(value, get_args(hint), where)
    elif dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        _check_record(value, hint, where)
    elif origin in (dict, Mapping):
        key_hint, value_hint = get_args(hint)
        if not isinstance(value, Mapping):
            raise _mismatch(value, "a mapping", where)
        for name, part in value.items():
            check(name, key_hint, f"{_at(where, name)} (its name)")
            check(part, value_hint, _at(where, name))
    elif origin in (list, tuple):
        _check_list(value, hint, where)
    elif not _is(value, hint):
        raise _mismatch(value, _NAMES.get(hint, getattr(hint, "__name__", str(hint))), where)


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "nothing",
    dict: "a mapping",
    list: "a list",
}


def _is(value: Any, hint: type) -> bool:
    if isinstance(value, bool) and hint in (int, float):
        return False
    if hint in (int, float) and isinstance(value, int):
        return abs(value) < _HUGE
    return isinstance(value, hint)


def _check_range(value: Any, hint: Any, where: str) -> None:
    base, *limits = get_args(hint)
    check(value, base, where)
    for limit in limits:
        if isinstance(limit, Between) and not limit.low <= value <= limit.high:
            span = f"{limit.low:g} or more" if limit.high == math.inf else f"{limit.low:g} to {limit.high:g}"
            raise Mismatch(where, span, printable(value, 60))
        if isinstance(limit, Length) and len(value) != limit.count:
            raise Mismatch(where, f"a list of {limit.count}", f"one of {len(value)}")


def _check_union(value: Any, hints: tuple[Any, ...], where: str) -> None:
    if value is None and type(None) in hints:
        return
    problems = []
    for hint in hints:
        if hint is type(None):
            continue
        try:
            return check(value, hint, where)
        except Mismatch as error:
            problems.append(error)
    inner = next((p for p in problems if p.where != (where or "the value")), None)
    if inner is not None:
        raise inner
    raise _mismatch(value, " or ".join(p.expected for p in problems), where)


@functools.lru_cache(maxsize=64)
def _fields(hint: Any) -> tuple[dict[str, Any], frozenset[str], bool]:
    """Return the hints by name, the required names, and True if other names are allowed."""
    hints = typing.get_type_hints(hint, include_extras=True)
    if typing.is_typeddict(hint):
        return hints, frozenset(hint.__required_keys__), True
    fields = [field for field in dataclasses.fields(hint) if field.init]
    required = [f for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return {f.name: hints[f.name] for f in fields}, frozenset(f.name for f in required), False


def _check_record(value: Any, hint: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise _mismatch(value, "a mapping", where)
    hints, required, others = _fields(hint)
    for name in sorted(required):
        if name not in value:
            raise Mismatch(_at(where, name), "a value", "none")
    for name, part in value.items():
        if name in hints:
            check(part, hints[name], _at(where, name))
        elif not others:
            raise Mismatch(_at(where, name), f"one of {', '.join(hints)}", "a field of this name")


def _check_list(value: Any, hint: Any, where: str) -> None:
    if not isinstance(value, (list, tuple)):
        raise _mismatch(value, "a list", where)
    hints = get_args(hint)
    if get_origin(hint) is list or hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    elif len(hints) != len(value):
        raise Mismatch(where, f"a list of {len(hints)}", f"one of {len(value)}")
    for place, (part, part_hint) in enumerate(zip(value, hints, strict=True)):
        check(part, part_hint, _at(where, place))


def _at(where: str, name: object) -> str:
    return f"{where}.{printable(name, 60)}" if where else printable(name, 60)


def _mismatch(value: Any, expected: str, where: str) -> Mismatch:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
    return Mismatch(where, expected, printable(text, 60))
