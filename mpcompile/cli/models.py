"""Models from the options of a command: timm models, checkpoints, image sizes, and the provenance of an artifact."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcompile._version import __version__
from mpcompile.artifact.container import WEIGHTS
from mpcompile.cli.options import DTYPES, config_of
from mpcompile.config import Config
from mpcompile.data.images import data_config
from mpcompile.errors import ArtifactError, ConfigError, InputError, first_line
from mpcompile.io.checkpoints import load_checkpoint
from mpcompile.io.reading import sha256

_SUFFIXES = (".mpc", ".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin")  # suffixes of files of weights


def names_file(target: str) -> bool:
    """Return True if ``target`` is a file of weights, False if it is the name of a timm model."""
    path = Path(target)
    return path.suffix in _SUFFIXES or os.path.lexists(path)


def create(name: str, pretrained: bool, **options: Any) -> nn.Module:
    """Create a timm model.

    Args:
        name: a name from ``timm.list_models()``.
        pretrained: load timm's pretrained weights, which timm downloads.
        options: options of ``timm.create_model``.

    Raises:
        ConfigError: timm has no such model.
        InputError: timm cannot create it.
    """
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        raise ConfigError(f"timm has no model {name!r}", expected=", ".join(near) or "a name from timm.list_models()")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        if getattr(model, "dynamic_img_size", False):  # a fixed size, which commands use, can be traced
            model = timm.create_model(name, pretrained=pretrained, **options, dynamic_img_size=False)
        return model
    except Exception as error:
        raise InputError(
            f"timm cannot create {name!r}: {first_line(error)}",
            hint="check the connection, or give --checkpoint FILE" if pretrained else None,
        ) from error


def create_sized(name: str, pretrained: bool, size: Sequence[int] | None, classes: int | None) -> nn.Module:
    """Create a timm model for a given image size and number of classes.

    Args:
        name: as for :func:`create`.
        pretrained: as for :func:`create`.
        size: (channels, height, width) of its images, which its data configuration then reports; None: timm's default.
        classes: number of classes; None: timm's default.
    """
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if size is None or tuple(size) == _usual_size(name):
        return create(name, pretrained, **options)
    try:
        model = create(name, pretrained, img_size=tuple(size[-2:]), **options)
    except InputError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        model = create(name, pretrained, **options)  # without img_size: such a model takes images of any size
    _record_size(model, size)
    return model


def _usual_size(name: str) -> tuple[int, ...] | None:
    import timm

    try:
        usual = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag: `create` reports it
        return None
    return None if usual is None else tuple(usual.input_size)


def _record_size(model: nn.Module, size: Sequence[int]) -> None:
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "input_size": tuple(size)}  # type: ignore[assignment]


def create_with(
    name: str, pretrained: bool, checkpoint: Path | None, size: Sequence[int] | None, classes: int | None
) -> nn.Module:
    """Create a timm model as :func:`create_sized` does, in eval mode, with the weights of a checkpoint if one is given.

    If the checkpoint is for the model's default image size, position embeddings are resampled, where timm can do so.

    Raises:
        ConfigError: timm has no such model.
        ArtifactError: the checkpoint cannot be read or does not fit.
    """
    model = create_sized(name, pretrained, size, classes).eval()
    if checkpoint is None:
        return model
    try:
        load_checkpoint(model, checkpoint)
    except ArtifactError:
        if size is None or tuple(size) == _usual_size(name) or not hasattr(model, "set_input_size"):
            raise
        usual: Any = create_sized(name, False, None, classes).eval()
        load_checkpoint(usual, checkpoint)
        usual.set_input_size(img_size=tuple(size[-2:]))
        _record_size(usual, size)
        return usual
    return model


def load_model(args: argparse.Namespace, like: Mapping[str, Any] | None = None) -> nn.Module:
    """Return the model that :func:`mpcompile.cli.options.weights_options` describe, in eval mode.

    Args:
        args: the parsed arguments.
        like: the provenance of an artifact, whose image size and number of classes are the defaults.

    Raises:
        ConfigError: timm has no such model.
        ArtifactError: the checkpoint cannot be read or does not fit.
    """
    data = (like or {}).get("data")
    size, classes = data.get("input_size") if isinstance(data, Mapping) else None, (like or {}).get("num_classes")
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        size = None  # provenance is not checked on load: anyone may have written it
    if not (isinstance(classes, int) and classes > 0):
        classes = None
    wanted = args.num_classes if args.num_classes is not None else classes
    return create_with(args.model, args.pretrained, args.checkpoint, size, wanted)


def class_names(provenance: Mapping[str, Any]) -> list[str]:
    """Return the class names of an artifact in the order of its outputs; [] if its provenance has none."""
    names = provenance.get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def provenance(
    args: argparse.Namespace, name: str, model: nn.Module, calibration_images: int, seed: int
) -> dict[str, Any]:
    """Return the provenance of an artifact: model, weights, classes, data configuration, calibration, versions."""
    import timm

    weights: Any = "timm's pretrained" if args.pretrained else f"random, seed {seed}"
    if args.checkpoint is not None:
        file = args.checkpoint / WEIGHTS if args.checkpoint.is_dir() else args.checkpoint
        weights = {"file": args.checkpoint.name, "sha256": sha256(file)}
    return {
        "model": name,
        "weights": weights,
        "num_classes": getattr(model, "num_classes", None),
        "data": data_config(model),
        "calibration_images": calibration_images,
        "versions": {
            "mpcompile": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def prepare(args: argparse.Namespace, like: Mapping[str, Any] | None = None) -> tuple[nn.Module, torch.Tensor, Config]:
    """Return the model, random images (batch, C, H, W) and the Config of a command with ``model_options``.

    Args:
        args: the parsed arguments.
        like: as for :func:`load_model`.

    Raises:
        ConfigError: an option is invalid, timm has no such model, or the device cannot be used.
        ArtifactError: the checkpoint cannot be read or does not fit.
    """
    config = config_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = load_model(args, like)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    try:
        device = torch.device(args.device)
        images = torch.randn(args.batch, *size, dtype=DTYPES[args.dtype], device=device)
        model = model.to(device, DTYPES[args.dtype])
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {args.device!r} cannot be used: {first_line(error)}") from error
    return model, images, config
