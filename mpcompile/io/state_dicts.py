"""State dicts as training scripts leave them: nested, under the prefixes of wrappers, beside whatever else was pickled.

Nothing here reads a file, and nothing imports what a file names: other classes in it become :class:`Ignored`.
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

from mpcompile.errors import ArtifactError, printable

# Where a state dict lies in a checkpoint; averaged weights go before those of the last step.
KEYS = (
    *("state_dict_ema", "ema_state_dict", "model_ema", "ema", "params_ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "params", "weights"),
)
WRAPPERS = ("module.", "_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_INNER = WRAPPERS[1:]  # stand anywhere in a name, since no layer is called so
# What a model is called as a part of a training script's module.
_PREFIXES = (
    *("ema_model.", "model_ema.", "ema.", "averaged_model."),
    *("model.", "net.", "network.", "backbone.", "encoder.", "student."),
)
_DEEPEST = 4
_NAMED = 3  # tensors named in a message
_LARGE = 1 << 30  # bytes that a tensor may claim beyond those that it stores
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A state dict, and what had to be done to find it, as words for whoever gave the file."""

    state: dict[str, Tensor]
    steps: tuple[str, ...] = field(default=())

    def tell(self, path: Path) -> None:
        """Log the steps in one line."""
        if self.steps:
            log.warning("%s", printable(f"{path}: {'; '.join(self.steps)}", 560))


# --- Unpickling without what is pickled beside the tensors ---


class Ignored:
    """Stands in for an object of a class that a file names: it takes whatever it is given, and does nothing."""

    name = ""

    def __new__(cls, *_args: Any, **_options: Any) -> Ignored:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _Dict:
    """Stands in for a class of dicts, which the unpickler fills item by item."""

    def __new__(cls, *_args: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class _List(list[Any]):
    """Stands in for a class of lists."""

    def __new__(cls, *_args: Any) -> _List:
        return super().__new__(cls)

    def __init__(self, *_args: Any) -> None:
        super().__init__()


_HARMLESS = {"argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal", "enum", "fractions"}
_HARMLESS |= {"functools", "numbers", "pathlib", "re", "types", "typing", "uuid"}
_BUILTINS = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range"}
_BUILTINS |= {"set", "slice", "str", "tuple"}


def stand_ins(file: BinaryIO, as_dicts: bool = False) -> list[Any]:
    """What ``torch.serialization.safe_globals`` needs so that ``weights_only`` passes over the classes in a file.

    Objects of a class of dicts are filled item by item, which ``weights_only`` does with real dicts alone: what its
    name says to be one gets one, or with ``as_dicts`` everything.

    Functions of the standard library that do more than hold values get none, so that the file is refused.
    """
    names = sorted(_globals(file))
    found: list[Any] = []
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
        found.append((kind, name))
    return found


def _globals(file: BinaryIO) -> set[str]:
    """The classes and functions that a torch file names, but for those that torch allows itself."""
    start = file.tell()
    try:
        if file.read(2) == b"PK":
            file.seek(start)
            return set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        from torch import _weights_only_unpickler as unpickler

        file.seek(start)  # older files: magic number, protocol, system, and then the object
        found = set().union(*(unpickler.get_globals_in_pkl(file) for _ in range(4)))
        return found - set(unpickler._get_allowed_globals())
    except Exception:  # damaged, or no torch file: loading it says so
        return set()


# --- Where the state dict is ---


def find_state(raw: Any, path: Path) -> Found:
    """The state dict in what a checkpoint file holds, its names as they stand there.

    Raises:
        ArtifactError: there is none.
    """
    steps: list[str] = []
    while isinstance(raw, Mapping):
        key = next((key for key in KEYS if isinstance(raw.get(key), Mapping) and _holds_tensors(raw[key])), None)
        if key is None and not any(isinstance(value, Tensor) for value in raw.values()):
            key = _only_one(raw)
        if key is None or len(steps) >= _DEEPEST:
            break
        raw = raw[key]
        steps.append(f"read from the entry {printable(key, 60)!r}")
    expected, hint = "tensors by name", "save model.state_dict() with torch.save or safetensors"
    if not isinstance(raw, Mapping):
        kind = f"a pickled {raw.name}" if isinstance(raw, Ignored) else f"a {type(raw).__name__}"
        raise ArtifactError(f"{path} can't be read as a checkpoint", expected=expected, found=kind, hint=hint)
    state = {name: value for name, value in raw.items() if isinstance(name, str) and _plain(value)}
    if not state:
        pickled = next((value.name for value in raw.values() if isinstance(value, Ignored) and value.name), None)
        keys = f"the entries {', '.join(str(key) for key in list(raw)[:5])}" if raw else "nothing"
        found = keys if pickled is None else f"a pickled {pickled}"
        raise ArtifactError(f"{path} can't be read as a checkpoint", expected=expected, found=found, hint=hint)
    odd = sum(isinstance(value, Tensor) for value in raw.values()) - len(state)
    if odd:
        steps.append(f"{odd} tensors without a name, or of an unusual kind, left out")
    return Found(state, tuple(steps))


def _only_one(raw: Mapping[Any, Any]) -> Any:
    """The entry that must be the state dict, whatever it is called: the one whose tensors have names of layers."""
    held = [key for key, value in raw.items() if isinstance(value, Mapping) and _holds_tensors(value)]
    named = [key for key in held if isinstance(key, str) and _holds_weights(raw[key])]
    return named[0] if len(named) == 1 else None


def _holds_weights(value: Mapping[Any, Any], depth: int = 0) -> bool:
    """Not an optimiser's state, whose tensors are numbered or lie beside step counts."""
    tensors = [key for key, item in value.items() if isinstance(item, Tensor)]
    if any(isinstance(key, str) and "." in key for key in tensors):
        return True
    inner = [item for item in value.values() if isinstance(item, Mapping)]
    return not tensors and depth < _DEEPEST and any(_holds_weights(item, depth + 1) for item in inner)


def _holds_tensors(value: Mapping[Any, Any], depth: int = 0) -> bool:
    return any(
        isinstance(item, Tensor) or (isinstance(item, Mapping) and depth < _DEEPEST and _holds_tensors(item, depth + 1))
        for item in value.values()
    )


def _plain(value: object) -> bool:
    """A dense tensor whose values are all in the file: others can claim any size."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return False
    if value.device.type != "cpu":
        return False
    claimed = value.numel() * value.itemsize
    return claimed <= _LARGE or claimed <= value.untyped_storage().nbytes()


# --- Prefixes ---


def unwrapped(found: Found) -> Found:
    """Without the prefixes that wrappers put before all names, or anywhere into them."""
    state, steps = found.state, list(found.steps)
    while True:
        prefix = next((p for p in WRAPPERS if _under(state, p) and all(n.startswith(p) for n in _weights(state))), None)
        if prefix is None:
            break
        state = _under(state, prefix)
        steps.append(f"prefix {prefix!r} taken off")
    for inner in _INNER:
        if any(f".{inner}" in name for name in state):
            state = {name.replace(f".{inner}", "."): value for name, value in state.items()}
            steps.append(f"{inner!r} taken out of names")
    return Found(state, tuple(steps))


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _weights(state: Mapping[str, Tensor]) -> list[str]:
    """The names, but for the counter of ``torch.optim.swa_utils.AveragedModel``."""
    return [name for name in state if name != "n_averaged"]


def fitted(found: Found, model: nn.Module) -> Found:
    """With the names of a model, if they are there under the prefix of a wrapper or of a training script's module."""
    wanted = set(model.state_dict())
    if wanted <= found.state.keys():
        return found
    plain = unwrapped(found)
    for candidate in _candidates(plain, 0):
        if wanted <= candidate.state.keys():
            return candidate
    return plain


def _candidates(found: Found, depth: int) -> Iterator[Found]:
    yield found
    for prefix in (*WRAPPERS, *_PREFIXES) if depth < _DEEPEST else ():
        state = _under(found.state, prefix)
        if state:
            steps = [*found.steps, f"prefix {prefix!r} taken off"]
            rest = len(found.state) - len(state)
            if rest:
                steps.append(f"{rest} tensors beside it left out")
            yield from _candidates(Found(state, tuple(steps)), depth + 1)


def explain_misfit(state: Mapping[str, Tensor], model: nn.Module) -> tuple[str, str] | None:
    """What a model expects and what is found instead; None where names, shapes and kinds of numbers are its own."""
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
    shown = ", ".join(printable(name, 60) for name in names[:_NAMED])
    return f"{before}{shown}" + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
