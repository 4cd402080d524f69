"""Models from a user's own function: ``package.module:function`` or ``file.py:function``.

This runs the user's code, as ``python -m package.module`` would, with the working directory on the import path.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.data.images import data_config
from mpcompile.errors import ConfigError, InputError, summary
from mpcompile.sources.loaded import DEFAULT_SIZE, LoadedModel
from mpcompile.sources.timm_models import class_names

_FORM = re.compile(r"(?P<place>.+\.py|[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*)")
_SHOWN = 6  # names in a message
_FRAMES = 2  # frames of a traceback in a message


def names_function(name: str) -> bool:
    """Return True for ``package.module:function`` and ``file.py:function``.

    Example:
        >>> names_function("models/mine.py:build"), names_function("torchvision.models:resnet18")
        (True, True)
        >>> names_function("hf-hub:timm/resnet18"), names_function("resnet18")
        (False, False)
    """
    return _FORM.fullmatch(name) is not None


def load_function(name: str, arguments: Mapping[str, Any]) -> LoadedModel:
    """Import a module, call its function, and return the model that it returns.

    Args:
        name: ``package.module:function`` or ``file.py:function``. The function may also be a class, or the model
            itself. It returns a module, or a pair of a module and example inputs.
        arguments: keyword arguments of the function.

    Raises:
        InputError: the module fails on import, the function fails, or it returns no module.
        ConfigError: there is no such function, or it does not take the arguments.
    """
    form = _FORM.fullmatch(name)
    assert form is not None
    with _user_code():
        module = _imported(form["place"])
        target = _attribute(module, form["name"], form["place"])
        made = target if isinstance(target, nn.Module) else _called(target, name, arguments)
    model, example = made if isinstance(made, (tuple, list)) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        expected = "a torch.nn.Module, or a pair (module, example inputs)"
        raise InputError(f"{name} returns no module", expected=expected, found=f"a {type(made).__name__}")
    keyword, size = _image_input(example)
    size = size or _own_size(model)
    known = getattr(model, "pretrained_cfg", None)
    data = data_config(model)
    data["input_size"] = list(size or data["input_size"])
    notes = [] if known else ["preprocessing is not known: timm's default is assumed"]
    if not known and not size:
        notes.append(f"image size is not known: {'x'.join(map(str, DEFAULT_SIZE))} is assumed")
    return LoadedModel(
        model,
        name,
        "function",
        type(model).__name__,
        "as the function made them",
        data,
        class_names=class_names(model),
        input_name=keyword,
        example=example,
        notes=notes,
    )


@contextlib.contextmanager
def _user_code() -> Iterator[None]:
    """Put the working directory on the import path, and send what the code prints to stderr: stdout has the result."""
    place = os.getcwd()
    if place not in sys.path:
        sys.path.insert(0, place)
    with contextlib.redirect_stdout(sys.stderr):
        yield


def _imported(place: str) -> ModuleType:
    """Return the module of a dotted name or a file.

    Raises:
        InputError: it does not exist, or fails on import.
    """
    if not place.endswith(".py"):
        return _run(lambda: importlib.import_module(place), place, place)
    path = Path(place).absolute()
    if not path.is_file():
        raise InputError(f"there is no file {place}", expected="file.py:function")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if known is None:  # classes are looked up there by their module's name; a library of that name keeps its own
        sys.modules[path.stem] = module
    folder = str(path.parent)
    if folder not in sys.path:  # so that the file finds the ones beside it, as `python file.py` does
        sys.path.insert(1, folder)
    loader = spec.loader
    try:
        _run(lambda: loader.exec_module(module), place, str(path))
    except InputError:
        if known is None:
            sys.modules.pop(path.stem, None)
        raise
    return module


def _run(job: Callable[[], Any], place: str, where: str) -> Any:
    """Return the result of importing ``place``.

    Raises:
        InputError: it fails; the message has the error and where it came from.
    """
    try:
        return job()
    except ModuleNotFoundError as error:
        top = (error.name or "") + "."
        if f"{where}.".startswith(top):
            hint = f"modules are found from the working directory, {os.getcwd()}, as by python -m"
            raise InputError(f"there is no module {error.name}", hint=hint) from error
        raise _failed(f"{place} cannot be imported", error) from error
    except (Exception, SystemExit) as error:
        raise _failed(f"{place} cannot be imported", error) from error


def _failed(message: str, error: BaseException) -> InputError:
    """Return the error with the last frames of its traceback that are not the import system's or our own."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and os.path.dirname(frame.filename) != os.path.dirname(__file__)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append(traceback.FrameSummary(error.filename, error.lineno, "<module>", lookup_line=False, line=""))
    places = [f"{_short(f.filename)}, line {f.lineno}" + (f": {f.line}" if f.line else "") for f in frames]
    own = places[:1] + places[1:][-_FRAMES:] if places else []
    text = f"{type(error).__name__}: {error.msg}" if isinstance(error, SyntaxError) else summary(error)
    return InputError(f"{message}: {text}" + (f" ({' -> '.join(own)})" if own else ""))


def _short(path: str) -> str:
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    """Return the function, class or model of a module.

    Raises:
        ConfigError: there is none of that name; the message names those that there are.
    """
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"{place} has no function {name}", expected=_functions(module, name))
        target = getattr(target, part)
    if not callable(target):
        found = f"a {type(target).__name__}"
        raise ConfigError(f"{name} in {place} is no function", expected=_functions(module, name), found=found)
    return target


def _functions(module: ModuleType, name: str) -> str:
    public = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    own = [key for key, value in public.items() if getattr(value, "__module__", None) == module.__name__] or [*public]
    near = difflib.get_close_matches(name, own, _SHOWN)
    named = [*near, *(key for key in own if key not in near)]
    return ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "") or "one, but it defines none"


def _called(function: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> Any:
    """Return what a function returns.

    Raises:
        ConfigError: it does not take the arguments.
        InputError: it fails.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C
        signature = None
    if signature is not None:
        try:
            signature.bind(**arguments)
        except TypeError as error:
            taken = ", ".join(map(str, signature.parameters.values())) or "no arguments"
            needs = "missing" in str(error)
            hint = "give it with --model-args NAME=VALUE" if needs else "check --model-args"
            raise ConfigError(f"{name} does not take these arguments: {error}", expected=taken, hint=hint) from error
    try:
        return function(**arguments)
    except (Exception, SystemExit) as error:
        raise _failed(f"{name} fails", error) from error


def _image_input(example: Any) -> tuple[str | None, tuple[int, ...] | None]:
    """Return the keyword (None: positional) and the size (C, H, W) of images in example inputs."""
    items = list(example.items()) if isinstance(example, Mapping) else [(None, value) for value in _listed(example)]
    images = [(key, value) for key, value in items if isinstance(value, Tensor) and value.dim() == 4]
    if not images:
        return None, None
    key, value = images[0]
    return (key if len(items) == 1 else None), tuple(value.shape[1:])


def _listed(example: Any) -> list[Any]:
    return pytree.tree_leaves(example) if example is not None else []


def _own_size(model: nn.Module) -> tuple[int, ...] | None:
    """Return the image size that a model's attributes tell, as those of timm, torchvision and open_clip do."""
    known = getattr(model, "pretrained_cfg", None)
    if isinstance(known, Mapping) and known.get("input_size"):
        return tuple(known["input_size"])
    size = getattr(model, "image_size", None)
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
        return (3, *size)
    return None
