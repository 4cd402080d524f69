"""Folders and repositories with a config.json: which library they belong to, and the origin of their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpcompile.errors import ArtifactError, ConfigError, printable
from mpcompile.io.reading import read_json, sha256
from mpcompile.sources import timm_models
from mpcompile.sources.loaded import LoadedModel
from mpcompile.sources.transformers_models import load_transformers

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which both libraries look for them
_INDEX = ".index.json"  # behind the name of weights in several files


def load_folder(
    name: str,
    place: Path,
    *,
    checkpoint: Path | None = None,
    size: Sequence[int] | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Return the model of a folder written by ``save_pretrained``, or in the layout of timm's hub.

    Args:
        name: the model's name, for messages.
        place: the folder.
        checkpoint: load the weights from this file instead of the folder's own.
        size: (channels, height, width) of images, for timm's models; None: the folder's.
        classes: number of classes, for timm's models.
        arguments: options of ``timm.create_model``; for transformers, ``architecture`` alone.

    Raises:
        ConfigError: there is no config.json, or an option does not fit.
        InputError: the model cannot be made.
        ArtifactError: weights are missing, damaged, or do not fit.
    """
    config = read_config(name, place / CONFIG)
    weights = weights_of(name, place, needed=checkpoint is None)
    if kind_of(name, config) == "transformers":
        return load_transformers(
            name, str(place), config, weights, checkpoint=checkpoint, **transformers_options(name, classes, arguments)
        )
    if "architecture" in config and not isinstance(config["architecture"], str):
        raise ConfigError(f"config.json of {name} names no architecture", expected='"architecture": "..."')
    return load_timm_layout(
        name, f"local-dir:{place}", weights, checkpoint=checkpoint, size=size, classes=classes, arguments=arguments
    )


def read_config(name: str, path: Path) -> Mapping[str, Any]:
    """Return the content of a config.json.

    Raises:
        ConfigError: there is none.
        ArtifactError: it is not a JSON object.
    """
    if not path.is_file():
        raise ConfigError(
            f"the folder {name} has no config.json",
            expected="a folder written by save_pretrained, or in the layout of timm's hub",
            hint="weights alone go into --checkpoint FILE, with the name of a timm model",
        )
    config = read_json(path)
    if not isinstance(config, Mapping):
        raise ArtifactError(f"{path} is not a model's configuration", expected="a JSON object")
    return config


def kind_of(name: str, config: Mapping[str, Any]) -> str:
    """Return the library that a configuration belongs to: "transformers" or "timm".

    Raises:
        ConfigError: it names no architecture.
    """
    if config.get("architectures") or config.get("auto_map"):
        return "transformers"
    if "architecture" in config:
        return "timm"
    raise ConfigError(
        f"config.json of {name} names no architecture",
        expected='"architectures" (transformers) or "architecture" (timm)',
        found=printable(", ".join(map(str, list(config)[:6])) or "nothing", 200),
    )


def transformers_options(name: str, classes: int | None, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the options of :func:`mpcompile.sources.transformers_models.load_transformers` in a command's options.

    Raises:
        ConfigError: an option that such a model does not take.
    """
    unknown = [key for key in arguments or {} if key != "architecture"]
    if unknown:
        raise ConfigError(
            f"{name} does not take these arguments",
            expected="architecture=CLASS, a class of transformers",
            found=", ".join(unknown),
            hint="a model of transformers is as its config.json says",
        )
    if classes is not None:
        raise ConfigError(f"the number of classes of {name} is fixed", hint="leave out --num-classes")
    return {"architecture": None if not arguments else str(arguments["architecture"])}


def load_timm_layout(
    name: str,
    where: str,
    weights: Any,
    *,
    checkpoint: Path | None,
    size: Sequence[int] | None,
    classes: int | None,
    arguments: Mapping[str, Any] | None,
) -> LoadedModel:
    """Return the model of a folder (``local-dir:PATH``) or repository (``hf-hub:NAME``) in the layout of timm's hub.

    Arguments are those of :func:`load_folder`.

    Raises:
        InputError: timm cannot make the model, or its weights do not fit.
        ArtifactError: the checkpoint cannot be read or does not fit.
    """
    import timm

    options = dict(arguments or {})
    model = timm_models.create_with(where, checkpoint is None, checkpoint, size, classes, **options)
    known: Any = getattr(model, "pretrained_cfg", {})
    return LoadedModel(
        model,
        name,
        "timm folder" if where.startswith("local-dir:") else "timm repository",
        f"{known.get('architecture', type(model).__name__)} (timm {timm.__version__})",
        weights,
        class_names=timm_models.class_names(model),
    )


def weights_of(name: str, place: Path, needed: bool) -> Any:
    """Return file and digest of a folder's weights, for the provenance.

    Raises:
        ArtifactError: there are none, and they are needed; or a file that an index names is missing.
    """
    for file in _WEIGHTS:
        for path in (place / file, place / f"{file}{_INDEX}"):
            if path.is_file():
                try:
                    return {"file": path.name, "sha256": sha256(path), **_shards(path)}
                except OSError as error:
                    raise ArtifactError(f"cannot read {path}", found=error.strerror or str(error)) from error
    others = sorted(p.name for p in place.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    if needed and not others:
        raise ArtifactError(f"the folder {name} has no weights", expected=" or ".join(_WEIGHTS), found="neither")
    return {"file": others[0], "sha256": sha256(place / others[0])} if others else None


def _shards(path: Path) -> dict[str, Any]:
    """Return the digests of the files that an index of weights names."""
    if not path.name.endswith(_INDEX):
        return {}
    index = read_json(path)
    names = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(names, Mapping) or not all(isinstance(n, str) and n == Path(n).name for n in names.values()):
        raise ArtifactError(f"{path} is not an index of weights", expected='"weight_map", with the files\' names')
    absent = [n for n in sorted(set(names.values())) if not (path.parent / n).is_file()]
    if absent:
        raise ArtifactError(f"files of weights are missing in {path.parent}", expected=json.dumps(absent[:3]))
    return {"shards": {n: sha256(path.parent / n) for n in sorted(set(names.values()))}}
