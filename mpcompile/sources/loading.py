"""One function for models from anywhere: the form of a name decides where the model comes from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpcompile.errors import ConfigError
from mpcompile.io.checkpoints import WEIGHTS, is_artifact, load_checkpoint
from mpcompile.io.reading import sha256
from mpcompile.sources import timm_models
from mpcompile.sources.folders import CONFIG, load_folder
from mpcompile.sources.functions import load_function, names_function
from mpcompile.sources.hub import PREFIX, load_repository
from mpcompile.sources.loaded import LoadedModel, ready
from mpcompile.sources.programs import load_program

FOLDER_PREFIX = "local-dir:"
PRETRAINED = "timm's pretrained"  # the origin of weights that timm downloads
FORMS = "a timm name, a folder with a config.json, hf-hub:ORG/NAME, module:function, file.py:function, or a .pt2 file"

_SUFFIXES = (".mpc", ".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")  # suffixes of files of weights


def load_model(
    name: str | os.PathLike[str],
    *,
    pretrained: bool = False,
    checkpoint: Path | str | None = None,
    input_size: Sequence[int] | None = None,
    num_classes: int | None = None,
    **arguments: Any,
) -> LoadedModel:
    """Load a dense model from wherever it comes: timm, a folder, the Hugging Face hub, a function, or a .pt2 file.

    Args:
        name: one of

            - a timm name, such as ``"vit_small_patch16_224"``;
            - a folder written by ``save_pretrained`` of transformers, or in the layout of timm's hub. A name with a
              path separator is always a folder; one without is a folder if that has a config.json, even if timm has a
              model of that name;
            - ``"hf-hub:ORG/NAME"``, optionally with ``@REVISION``;
            - ``"package.module:function"`` or ``"file.py:function"``, which **runs that code**: the function returns a
              module, or a pair of a module and example inputs;
            - a ``.pt2`` file of ``torch.export.save``, which torch unpickles: only open files that you trust.
        pretrained: load timm's pretrained weights. Folders, repositories and programs come with their own.
        checkpoint: load the weights from this file: safetensors, or a PyTorch state dict.
        input_size: (channels, height, width) of the images; None: what the source says.
        num_classes: number of classes of a timm model; None: what the source says.
        arguments: of the function, or options of ``timm.create_model``.

    Returns:
        The model in eval mode, fp32 on the CPU, with its preprocessing, class names and the origin of its weights.

    Raises:
        ConfigError: nothing has that name, an option does not fit, or an optional library is not installed.
        InputError: the model cannot be made.
        ArtifactError: weights are missing, damaged, or do not fit.

    Example:
        >>> loaded = load_model("resnet18", num_classes=10)
        >>> print(loaded.summary())
        resnet18: timm, ResNet (timm ...); weights: random; images 3x224x224, mean ...; 10 classes
    """
    name, checkpoint = os.fspath(name), None if checkpoint is None else Path(checkpoint)
    kind = kind_of(name)
    options = _Options(pretrained, checkpoint, input_size, num_classes, arguments)
    loaded = _LOADERS[kind](name, options)
    if checkpoint is not None:
        file = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
        loaded.weights, loaded.random = {"file": checkpoint.name, "sha256": sha256(file)}, False
    loaded = ready(loaded)
    if input_size is not None:
        loaded.data["input_size"] = list(input_size)
    return loaded


def kind_of(name: str) -> str:
    """Return the kind of source that a name means: "function", "program", "hub", "folder" or "timm".

    A folder is meant if the name has a path separator, or if there is a folder of that name with a config.json.

    Example:
        >>> [kind_of(name) for name in ("resnet18", "mine.py:build", "./vit", "hf-hub:timm/resnet18", "vit.pt2")]
        ['timm', 'function', 'folder', 'hub', 'program']
    """
    if name.startswith(PREFIX):
        return "hub"
    if name.startswith(FOLDER_PREFIX):
        return "folder"
    if names_function(name):
        return "function"
    path = Path(name)
    if path.suffix == ".pt2":
        return "program"
    separators = tuple(filter(None, (os.sep, os.altsep)))
    if any(mark in name for mark in separators) or name in (".", "..") or (path / CONFIG).is_file():
        return "folder"
    return "timm"


def is_weights(name: str) -> bool:
    """Return True if a name means a file or folder of weights, and False if it means a model.

    Example:
        >>> is_weights("checkpoint.safetensors"), is_weights("resnet18")
        (True, False)
    """
    kind, path = kind_of(name), Path(name)
    if kind in ("hub", "function", "program"):
        return False
    if kind == "folder" and (name.startswith(FOLDER_PREFIX) or (path / CONFIG).is_file()):
        return is_artifact(path)
    return path.suffix in _SUFFIXES or os.path.lexists(path)


class _Options(NamedTuple):
    """Options of :func:`load_model`."""

    pretrained: bool
    checkpoint: Path | None
    size: Sequence[int] | None
    classes: int | None
    arguments: Mapping[str, Any]


def _timm(name: str, how: _Options) -> LoadedModel:
    import timm

    if not timm.is_model(name) and not name.isidentifier() and not name.partition(".")[0].isidentifier():
        raise ConfigError(f"there is no model {name!r}", expected=FORMS)
    try:
        model = timm_models.create_with(
            name, how.pretrained, how.checkpoint, how.size, how.classes, **dict(how.arguments)
        )
    except ConfigError as error:
        if Path(name).is_dir():
            hint = f"the folder {name} has no {CONFIG}, so it is not meant"
        else:
            hint = f"a model is {FORMS}"
        raise ConfigError(error.message, expected=error.expected, hint=hint) from error
    weights = PRETRAINED if how.pretrained else "random"
    return LoadedModel(
        model,
        name,
        "timm",
        f"{type(model).__name__} (timm {timm.__version__})",
        weights,
        class_names=timm_models.class_names(model),
        random=not how.pretrained,
    )


def _function(name: str, how: _Options) -> LoadedModel:
    if how.pretrained:
        raise ConfigError(
            f"{name} decides itself whether its weights are pretrained", hint="leave out --pretrained; see --model-args"
        )
    _no_classes(name, how, "give --model-args NAME=VALUE, if the function takes such an argument")
    loaded = load_function(name, how.arguments)
    if how.checkpoint is not None:
        load_checkpoint(loaded.model, how.checkpoint)
    return loaded


def _folder(name: str, how: _Options) -> LoadedModel:
    place = Path(name.removeprefix(FOLDER_PREFIX))
    if place.is_file():
        raise ConfigError(
            f"{name} is a file, not a model",
            expected=FORMS,
            hint="weights go into --checkpoint FILE, with a model's name",
        )
    if not place.is_dir():
        raise ConfigError(f"there is no folder {name}", expected=FORMS)
    return load_folder(
        name, place, checkpoint=how.checkpoint, size=how.size, classes=how.classes, arguments=how.arguments
    )


def _hub(name: str, how: _Options) -> LoadedModel:
    return load_repository(name, checkpoint=how.checkpoint, size=how.size, classes=how.classes, arguments=how.arguments)


def _program(name: str, how: _Options) -> LoadedModel:
    if how.arguments:
        raise ConfigError(f"{name} is an exported program, which takes no arguments", found=", ".join(how.arguments))
    _no_classes(name, how, "export a model with another head")
    loaded = load_program(name, Path(name))
    if how.checkpoint is not None:
        load_checkpoint(loaded.model, how.checkpoint)
    return loaded


def _no_classes(name: str, how: _Options, hint: str) -> None:
    if how.classes is not None:
        raise ConfigError(f"--num-classes does not apply to {name}", hint=hint)


_LOADERS: dict[str, Callable[[str, _Options], LoadedModel]] = {
    "timm": _timm,
    "function": _function,
    "folder": _folder,
    "hub": _hub,
    "program": _program,
}
