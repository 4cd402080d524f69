"""Models from the options of a command, wherever they come from, and the provenance of an artifact."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch

from mpcompile._moved import renamed
from mpcompile._version import __version__
from mpcompile.cli.options import DTYPES, config_of, model_arguments
from mpcompile.config import Config
from mpcompile.errors import ConfigError, first_line
from mpcompile.sources.loaded import LoadedModel
from mpcompile.sources.loading import PRETRAINED, kind_of, load_model

__getattr__ = renamed(
    __name__,
    {
        "create": "sources.timm_models.create",
        "create_sized": "sources.timm_models.create_sized",
        "create_with": "sources.timm_models.create_with",
        "names_file": "sources.loading.is_weights",
    },
)
_SAFE = ("timm", "folder", "hub")  # kinds that run no code: a file may name them


def load_source(args: argparse.Namespace, like: Mapping[str, Any] | None = None) -> LoadedModel:
    """Return the model that :func:`mpcompile.cli.options.weights_options` describe, and print a line on it.

    Args:
        args: the parsed arguments; without a model, that of the artifact is loaded.
        like: the provenance of an artifact, whose image size and number of classes are the defaults.

    Raises:
        ConfigError: there is no such model, or an option does not fit.
        InputError: the model cannot be made.
        ArtifactError: weights cannot be read or do not fit.
    """
    like = like or {}
    name = args.model if args.model is not None else _named(like)
    data, classes = like.get("data"), like.get("num_classes")
    size = data.get("input_size") if isinstance(data, Mapping) else None
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        size = None  # provenance is not checked on load: anyone may have written it
    if not (isinstance(classes, int) and classes > 0) or kind_of(name) != "timm":
        classes = None  # other sources know their number of classes
    made_from = like.get("weights")
    if args.model is None and kind_of(name) == "timm" and args.checkpoint is None and isinstance(made_from, Mapping):
        file = f"--checkpoint FILE, the file {made_from.get('file')}"
        raise ConfigError("the artifact was made from the weights of a file", expected=file)
    loaded = load_model(
        name,
        pretrained=args.pretrained or (args.model is None and made_from == PRETRAINED),
        checkpoint=args.checkpoint,
        input_size=getattr(args, "input_size", None) or size,
        num_classes=args.num_classes if getattr(args, "num_classes", None) is not None else classes,
        **model_arguments(args),
    )
    digests = [part.get("sha256") for part in (made_from, loaded.weights) if isinstance(part, Mapping)]
    if len(set(digests)) > 1 and all(digests):
        loaded.notes.append("these are not the weights that the artifact was made from")
    announce(args, loaded)
    return loaded


def announce(args: argparse.Namespace, loaded: LoadedModel) -> None:
    """Print one line on stderr, about what was loaded and from where, unless ``--quiet`` is given."""
    if not args.quiet:
        print(loaded.summary(), file=sys.stderr, flush=True)


def _named(provenance: Mapping[str, Any]) -> str:
    """Return the name of the dense model in an artifact's provenance.

    Raises:
        ConfigError: there is none, or loading it would run code that the artifact names.
    """
    name = provenance.get("model")
    if not isinstance(name, str) or not name:
        raise ConfigError("the artifact does not say which model it was made from", hint="give MODEL")
    if kind_of(name) not in _SAFE:
        raise ConfigError(
            "the artifact's dense model is made by code, which is run only if you name it",
            expected="MODEL",
            found=name,
            hint="give MODEL, if you trust it",
        )
    return name


def class_names(provenance: Mapping[str, Any], loaded: LoadedModel | None = None) -> list[str]:
    """Return the class names of an artifact, or else of its dense model, in the order of the outputs; [] if unknown."""
    names = provenance.get("class_names")
    if isinstance(names, list) and all(isinstance(name, str) for name in names) and names:
        return names
    return [] if loaded is None else list(loaded.class_names)


def provenance(loaded: LoadedModel, calibration_images: int, seed: int) -> dict[str, Any]:
    """Return the provenance of an artifact: model, weights, classes, data configuration, calibration, versions."""
    import timm

    origin = loaded.provenance()
    if loaded.random:
        origin["weights"] = f"random, seed {seed}"
    return {
        **origin,
        "calibration_images": calibration_images,
        "versions": {
            "mpcompile": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def prepare(args: argparse.Namespace, like: Mapping[str, Any] | None = None) -> tuple[LoadedModel, Any, Config]:
    """Return the model, inputs of random noise and the Config of a command with ``model_options``.

    Args:
        args: the parsed arguments.
        like: as for :func:`load_source`.

    Raises:
        ConfigError: an option is invalid, there is no such model, or the device cannot be used.
        InputError: the model cannot be made.
        ArtifactError: weights cannot be read or do not fit.
    """
    config = config_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    loaded = load_source(args, like)
    inputs = on_device(loaded, args.device, args.batch, DTYPES[args.dtype])
    return loaded, inputs, config


def on_device(loaded: LoadedModel, device: str, batch: int, dtype: torch.dtype = torch.float32) -> Any:
    """Move a model to a device and a dtype, and return inputs of random noise for it.

    Raises:
        ConfigError: the device cannot be used.
    """
    try:
        inputs = loaded.example_inputs(batch, dtype=dtype, device=torch.device(device))
        loaded.model.to(torch.device(device), dtype)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {first_line(error)}") from error
    return inputs
