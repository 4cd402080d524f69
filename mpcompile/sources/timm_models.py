"""Models of timm: by name, from a folder in the layout of its hub, or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.errors import ArtifactError, ConfigError, InputError, message_lines
from mpcompile.io.checkpoints import load_checkpoint

PREFIXES = ("local-dir:", "hf-hub:")  # in front of names that timm does not list


def create(name: str, pretrained: bool, **options: Any) -> nn.Module:
    """Create a timm model.

    Args:
        name: a name from ``timm.list_models()``, or a folder or repository behind ``local-dir:`` or ``hf-hub:``.
        pretrained: load timm's pretrained weights, which timm downloads, or those of the folder or repository.
        options: options of ``timm.create_model``.

    Raises:
        ConfigError: timm has no such model.
        InputError: timm cannot create it.
    """
    import timm

    elsewhere = name.startswith(PREFIXES)
    if not elsewhere and not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        raise ConfigError(f"timm has no model {name!r}", expected=", ".join(near) or "a name from timm.list_models()")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        if getattr(model, "dynamic_img_size", False):  # a fixed size, which commands use, can be traced
            model = timm.create_model(name, pretrained=pretrained, **options, dynamic_img_size=False)
        return model
    except Exception as error:
        hint = "check the connection, or give --checkpoint FILE" if pretrained and not elsewhere else None
        reason = " ".join(message_lines(error)[: 3 if elsewhere else 1]) or type(error).__name__
        raise InputError(f"timm cannot create {name!r}: {reason}", hint=hint) from error


def create_sized(
    name: str, pretrained: bool, size: Sequence[int] | None, classes: int | None, **options: Any
) -> nn.Module:
    """Create a timm model for a given image size and number of classes.

    Args:
        name: as for :func:`create`.
        pretrained: as for :func:`create`.
        size: (channels, height, width) of its images, which its data configuration then reports; None: timm's default.
        classes: number of classes; None: timm's default.
        options: more options of ``timm.create_model``.
    """
    if classes is not None:
        options["num_classes"] = classes
    if size is None or tuple(size) == usual_size(name):
        return create(name, pretrained, **options)
    try:
        model = create(name, pretrained, img_size=tuple(size[-2:]), **options)
    except InputError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        model = create(name, pretrained, **options)  # without img_size: such a model takes images of any size
    _record_size(model, size)
    return model


def usual_size(name: str) -> tuple[int, ...] | None:
    """Return the image size (channels, height, width) of a timm model; None if timm does not know it."""
    import timm

    if name.startswith(PREFIXES):
        return None
    try:
        usual = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag: `create` reports it
        return None
    return None if usual is None else tuple(usual.input_size)


def _record_size(model: nn.Module, size: Sequence[int]) -> None:
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "input_size": tuple(size)}  # type: ignore[assignment]


def create_with(
    name: str,
    pretrained: bool,
    checkpoint: Path | None,
    size: Sequence[int] | None,
    classes: int | None,
    **options: Any,
) -> nn.Module:
    """Create a timm model as :func:`create_sized` does, in eval mode, with the weights of a checkpoint if one is given.

    If the checkpoint is for the model's default image size, position embeddings are resampled, where timm can do so.

    Raises:
        ConfigError: timm has no such model.
        ArtifactError: the checkpoint cannot be read or does not fit.
    """
    if size is None and isinstance(options.get("img_size"), (int, tuple, list)):
        sides = options.pop("img_size")  # as a size, it also reaches the data configuration
        size = (options.get("in_chans", 3), *((sides, sides) if isinstance(sides, int) else sides))
    model = create_sized(name, pretrained, size, classes, **options).eval()
    if checkpoint is None:
        return model
    try:
        load_checkpoint(model, checkpoint)
    except ArtifactError:
        if size is None or tuple(size) == usual_size(name) or not hasattr(model, "set_input_size"):
            raise
        usual: Any = create_sized(name, False, None, classes, **options).eval()
        load_checkpoint(usual, checkpoint)
        usual.set_input_size(img_size=tuple(size[-2:]))
        _record_size(usual, size)
        return usual
    return model


def class_names(model: nn.Module) -> list[str]:
    """Return the names of a timm model's classes that its configuration lists; [] if it lists none."""
    known = getattr(model, "pretrained_cfg", None)
    names = known.get("label_names") if isinstance(known, Mapping) else None
    count = getattr(model, "num_classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) and len(names) == count else []
