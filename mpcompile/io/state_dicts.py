"""State dicts as training scripts leave them: nested, with wrapper prefixes, next to other pickled objects.

Nothing here loads a file, and nothing imports what a file names: other classes in it become :class:`Ignored`.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mpcompile import _moved
from mpcompile.errors import ArtifactError, printable

# Entries under which a checkpoint holds its state dict; averaged weights are preferred to those of the last step.
KEYS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights"),
)
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_INNER = WRAPPERS[1:]  # removed anywhere in a name, since no layer has such a name
# Names under which a training script's module holds the model.
_PREFIXES = (
    *("ema_model.", "model_ema.", "ema.", "averaged_model."),
    *("model.", "net.", "network.", "backbone.", "encoder.", "student."),
)
_MAX_NESTING = 4
_NAMED = 3  # tensors listed in a message
_LARGE = 1 << 30  # bytes that a tensor may claim without storing them
log = logging.getLogger(__name__)
_RENAMED = {"Found": "StateDict", "stand_ins": "replacements", "unwrapped": "strip_wrappers", "fitted": "match_names"}
__getattr__ = _moved.renamed(__name__, {old: f"io.state_dicts.{new}" for old, new in _RENAMED.items()})


@dataclass(frozen=True)
class StateDict:
    """A state dict from a file, and the steps that it took to find it, in words for the user.

    Attributes:
        state: tensors by name.
        steps: the steps in order, such as ``"prefix 'module.' removed"``.
    """

    state: dict[str, Tensor]
    steps: tuple[str, ...] = field(default=())

    def log_steps(self, path: Path) -> None:
        """Log the steps in one line."""
        if self.steps:
            log.warning("%s", printable(f"{path}: {'; '.join(self.steps)}", 560))


# --- Unpickling tensors and ignoring other objects ---


class Ignored:
    """Replaces an object of a class that a file names. It accepts any arguments and state, and does nothing."""

    name = ""

    def __new__(cls, *_args: Any, **_options: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _Dict:
    """Replaces a dict subclass, which the unpickler fills item by item."""

    def __new__(cls, *_args: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _List(list[Any]):
    """Replaces a list subclass."""

    def __new__(cls, *_args: Any) -> _List:
        return super().__new__(cls)

    def __init__(self, *_args: Any) -> None:
        super().__init__()


_HARMLESS = {"argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions"}
_HARMLESS |= {"functools", "numbers", "pathlib", "re", "types", "typing", "uuid"}
_BUILTINS = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range"}
_BUILTINS |= {"set", "slice", "str", "tuple"}


def replacements(file: BinaryIO, as_dicts: bool = False) -> list[Any]:
    """Return replacements for the classes in a torch file, so that ``weights_only`` ignores their objects.

    The result is an argument for ``torch.serialization.safe_globals``. Functions and classes of the standard library
    that do more than hold values get no replacement, so that a file that names one is refused.

    Args:
        file: the torch file.
        as_dicts: replace every class by a dict. Objects of dict subclasses are filled item by item, which
            ``weights_only`` allows only for real dicts. By default, only a class with "dict" in its name is replaced by
            a dict.
    """
    names = sorted(_globals(file))
    pairs: list[Any] = []
    for name in names:
        module, _, last = name.rpartition(".")
        top = module.split(".")[0]
        if top in ("builtins", "__builtin__"):
            allowed = last in _BUILTINS
        else:
            allowed = top in _HARMLESS or top not in sys.stdlib_module_names
        if not allowed:
            continue
        if last.lower().endswith("list"):
            kind: Any = _List
        elif as_dicts or "dict" in last.lower():
            kind = _Dict
        else:
            kind = type("Ignored", (Ignored,), {"name": name})
        pairs.append((kind, name))
    return pairs


def _globals(file: BinaryIO) -> set[str]:
    """Return the classes and functions that a torch file names, without those that torch allows by default."""
    start = file.tell()
    try:
        if file.read(2) == b"PK":
            file.seek(start)
            return set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        from torch import _weights_only_unpickler as unpickler

        file.seek(start)  # older files: magic number, protocol, system, and then the object
        names = set().union(*(unpickler.get_globals_in_pkl(file) for _ in range(4)))
        return names - set(unpickler._get_allowed_globals())
    except Exception:  # damaged, or not a torch file: loading will report it
        return set()


# --- Finding the state dict ---


def find_state(raw: Any, path: Path) -> StateDict:
    """Return the state dict in the content of a checkpoint file, with its names unchanged.

    Args:
        raw: the content.
        path: the file, for the error.

    Raises:
        ArtifactError: there is no state dict.
    """
    steps: list[str] = []
    while isinstance(raw, Mapping):
        key = next((key for key in KEYS if isinstance(raw.get(key), Mapping) and _holds_tensors(raw[key])), None)
        if key is None and not any(isinstance(value, Tensor) for value in raw.values()):
            key = _only_one(raw)
        if key is None or len(steps) >= _MAX_NESTING:
            break
        raw = raw[key]
        steps.append(f"read from the entry {printable(key, 60)!r}")
    expected, hint = "tensors by name", "save model.state_dict() with torch.save or safetensors"
    if not isinstance(raw, Mapping):
        kind = f"a pickled {raw.name}" if isinstance(raw, Ignored) else f"a {type(raw).__name__}"
        raise ArtifactError(f"{path} cannot be read as a checkpoint", expected=expected, found=kind, hint=hint)
    state = {name: value for name, value in raw.items() if isinstance(name, str) and _plain(value)}
    if not state:
        pickled = next((value.name for value in raw.values() if isinstance(value, Ignored) and value.name), None)
        keys = f"the entries {', '.join(str(key) for key in list(raw)[:5])}" if raw else "nothing"
        content = keys if pickled is None else f"a pickled {pickled}"
        raise ArtifactError(f"{path} cannot be read as a checkpoint", expected=expected, found=content, hint=hint)
    odd = sum(isinstance(value, Tensor) for value in raw.values()) - len(state)
    if odd:
        steps.append(f"{odd} tensors without a name, or of an unusual kind, left out")
    return StateDict(state, tuple(steps))


def _only_one(raw: Mapping[Any, Any]) -> Any:
    """Return the key of the only entry whose tensors are named like layers; None if there are none or several."""
    held = [key for key, value in raw.items() if isinstance(value, Mapping) and _holds_tensors(value)]
    named = [key for key in held if isinstance(key, str) and _holds_weights(raw[key])]
    return named[0] if len(named) == 1 else None


def _holds_weights(value: Mapping[Any, Any], depth: int = 0) -> bool:
    """Return True for weights, False for an optimiser's state, whose tensors are numbered or next to step counts."""
    tensors = [key for key, entry in value.items() if isinstance(entry, Tensor)]
    if any(isinstance(key, str) and "." in key for key in tensors):
        return True
    inner = [entry for entry in value.values() if isinstance(entry, Mapping)]
    return not tensors and depth < _MAX_NESTING and any(_holds_weights(entry, depth + 1) for entry in inner)


def _holds_tensors(value: Mapping[Any, Any], depth: int = 0) -> bool:
    return any(
        isinstance(entry, Tensor)
        or (isinstance(entry, Mapping) and depth < _MAX_NESTING and _holds_tensors(entry, depth + 1))
        for entry in value.values()
    )


def _plain(value: object) -> bool:
    """Return True for a dense CPU tensor of at most 1 GiB, or a larger one that is stored in full.

    A view of few stored values could claim any size.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return False
    if value.device.type != "cpu":
        return False
    claimed = value.numel() * value.itemsize
    return claimed <= _LARGE or claimed <= value.untyped_storage().nbytes()


# --- Prefixes ---


def strip_wrappers(source: StateDict) -> StateDict:
    """Return the state dict without the prefixes that wrappers put in front of all names, or inside them."""
    state, steps = source.state, list(source.steps)
    while True:
        prefix = next((p for p in WRAPPERS if _under(state, p) and all(n.startswith(p) for n in _weights(state))), None)
        if prefix is None:
            break
        state = _under(state, prefix)
        steps.append(f"prefix {prefix!r} removed")
    for inner in _INNER:
        if any(f".{inner}" in name for name in state):
            state = {name.replace(f".{inner}", "."): value for name, value in state.items()}
            steps.append(f"{inner!r} removed from names")
    return StateDict(state, tuple(steps))


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _weights(state: Mapping[str, Tensor]) -> list[str]:
    """The names, without the counter of ``torch.optim.swa_utils.AveragedModel``."""
    return [name for name in state if name != "n_averaged"]


def match_names(source: StateDict, model: nn.Module) -> StateDict:
    """Return the state dict under a model's names, if removing prefixes of wrappers and scripts yields these names.

    Otherwise only wrapper prefixes are removed.
    """
    expected = set(model.state_dict())
    if expected <= source.state.keys():
        return source
    plain = strip_wrappers(source)
    for candidate in _candidates(plain, 0):
        if expected <= candidate.state.keys():
            return candidate
    return plain


def _candidates(source: StateDict, depth: int) -> Iterator[StateDict]:
    """Yield the state dict, then for each prefix the entries that have it, with the prefix removed, recursively."""
    yield source
    for prefix in (*WRAPPERS, *_PREFIXES) if depth < _MAX_NESTING else ():
        state = _under(source.state, prefix)
        if state:
            steps = [*source.steps, f"prefix {prefix!r} removed"]
            rest = len(source.state) - len(state)
            if rest:
                steps.append(f"{rest} tensors without it left out")
            yield from _candidates(StateDict(state, tuple(steps)), depth + 1)


def explain_misfit(state: Mapping[str, Tensor], model: nn.Module) -> tuple[str, str] | None:
    """Describe what a model expects and what a state dict holds instead.

    Returns None if names, shapes and kinds of numbers match.
    """
    own = model.state_dict()
    missing, unknown = [n for n in own if n not in state], [n for n in state if n not in own]
    if missing or unknown:
        return f"the model's {len(own)} tensors" + _named(", also ", missing), (
            f"{len(state)}" + _named(", among them ", unknown)
        )
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and tensor.shape != state[name].shape:
            return f"{name} of shape {tuple(tensor.shape)}", f"{tuple(state[name].shape)}"
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not state[name].is_floating_point():
            return f"{name} in floating point", f"{state[name].dtype}"  # copying would drop scales, or imaginary parts
    return None


def _named(before: str, names: list[str]) -> str:
    if not names:
        return ""
    listed = ", ".join(printable(name, 60) for name in names[:_NAMED])
    return f"{before}{listed}" + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
