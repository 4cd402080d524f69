"""Decisions of passes: frozen dataclasses that survive a round trip through JSON exactly, tensors included.

A decision has two forms in JSON. :meth:`Decision.to_json` is complete: a fresh pass can apply the decision that
:meth:`Decision.from_json` reads back. :meth:`Decision.record` is for the Plan: figures and names, without tensors.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from mpcompile.errors import InputError

Self = TypeVar("Self", bound="Decision")

_TENSOR = "tensor"  # key of an encoded tensor's dtype
UNRECORDED: Mapping[str, Any] = {"recorded": False}  # metadata of fields that the Plan does not keep


class Decision:
    """Base of the frozen dataclasses that :meth:`mpcompile.passes.base.Pass.plan` returns.

    Fields hold JSON values, tensors, other dataclasses and named tuples, also nested in lists, tuples and mappings with
    text keys.
    Their annotations determine how they are read back. A field with the metadata :data:`UNRECORDED` is part of the
    decision, but is not recorded in the Plan.

    Decorate subclasses with ``@dataclass(frozen=True, eq=False)``: two decisions are equal if their JSON is equal.

    Example:
        >>> @dataclasses.dataclass(frozen=True, eq=False)
        ... class Scaled(Decision):
        ...     layers: tuple[str, ...]
        ...     factors: dict[str, Tensor] = dataclasses.field(default_factory=dict, metadata=UNRECORDED)
        >>> decision = Scaled(("fc",), {"fc": torch.tensor([0.5])})
        >>> decision.record()
        {'layers': ['fc']}
        >>> Scaled.from_json(decision.to_json()) == decision
        True
    """

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values; a tensor becomes its dtype, its shape and its bytes in base64."""
        return {f.name: encode(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_json(cls: type[Self], data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`, bit for bit. Tensors are on the CPU.

        Raises:
            InputError: ``data`` is not a decision of this class.
        """
        return decode(dict(data), cls)

    def record(self) -> dict[str, Any]:
        """Return the fields that the Plan keeps, as JSON values. Subclasses may omit those that say nothing new."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {f.name: encode(getattr(self, f.name)) for f in fields if f.metadata.get("recorded", True)}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return json.dumps(self.to_json()) == json.dumps(other.to_json())  # NaN equals NaN here

    __hash__ = None  # type: ignore[assignment]


def encode(value: Any) -> Any:
    """Return a value of a decision as JSON values.

    Raises:
        TypeError: a value of a type that :func:`decode` could not restore.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        dtype = str(value.dtype).removeprefix("torch.")
        return {_TENSOR: dtype, "shape": list(value.shape), "bytes": base64.b64encode(raw).decode("ascii")}
    if dataclasses.is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"the keys of a decision are strings, not {list(value)[:3]}")
        return {key: encode(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(entry) for entry in value]
    raise TypeError(f"a decision cannot hold a {type(value).__name__}")


def decode(value: Any, hint: Any) -> Any:
    """Inverse of :func:`encode`: JSON values -> a value of the type ``hint``.

    Raises:
        InputError: the values do not have that type.
    """
    try:
        return _decoded(value, hint)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        name = getattr(hint, "__name__", str(hint))
        raise InputError(f"this is not the JSON of a {name}", found=f"{type(error).__name__}: {error}") from error


def _decoded(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _decoded(value, next(a for a in arguments if a is not type(None)))
    if hint is Tensor:
        return _tensor(value)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return typing.cast(Any, hint)(**{key: _decoded(entry, hints[key]) for key, entry in value.items()})
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return typing.cast(Any, hint)(*value)
    if origin is tuple:
        entries = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_decoded(entry, kind) for entry, kind in zip(value, entries, strict=True))
    if origin in (list, Sequence):
        return [_decoded(entry, arguments[0]) for entry in value]
    if origin in (dict, Mapping):
        return {key: _decoded(entry, arguments[1]) for key, entry in value.items()}
    return value


def _tensor(value: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, value[_TENSOR])
    raw = bytearray(base64.b64decode(value["bytes"]))
    if not raw:
        return torch.empty(value["shape"], dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype).reshape(value["shape"])
