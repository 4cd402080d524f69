"""Repositories of the Hugging Face hub: ``hf-hub:ORG/NAME``, through the library's own cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpcompile.errors import ConfigError, InputError, first_line
from mpcompile.sources.folders import CONFIG, kind_of, load_timm_layout, read_config, transformers_options
from mpcompile.sources.loaded import LoadedModel
from mpcompile.sources.transformers_models import load_transformers

PREFIX = "hf-hub:"
_OFFLINE = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ConnectTimeout")
_REASONS = {
    "GatedRepoError": "access to it has to be requested on its page, and `hf auth login` run",
    "RepositoryNotFoundError": "there is none of that name, or it is private",
    "RevisionNotFoundError": "it has no such revision",
    "RemoteEntryNotFoundError": "it has no config.json",
    "EntryNotFoundError": "it has no config.json",
    "HFValidationError": "this is not the name of a repository: ORG/NAME or ORG/NAME@REVISION",
}


def load_repository(
    name: str,
    *,
    checkpoint: Path | None = None,
    size: Sequence[int] | None = None,
    classes: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Return the model of a repository, whose files the library downloads, or finds in its cache.

    ``HF_HUB_OFFLINE=1`` uses the cache alone. Nothing in the repository is executed.

    Args:
        name: ``hf-hub:ORG/NAME``, optionally with ``@REVISION``.
        checkpoint, size, classes, arguments: as for :func:`mpcompile.sources.folders.load_folder`.

    Raises:
        ConfigError: transformers or huggingface_hub is not installed, or an option does not fit.
        InputError: the repository cannot be reached, or its model cannot be made.
        ArtifactError: weights are missing, damaged, or do not fit.
    """
    identifier, _, revision = name.removeprefix(PREFIX).partition("@")
    path = _download(name, identifier, revision or None)
    config = read_config(name, path)
    weights = {"repository": identifier, "revision": _commit(path)}
    if kind_of(name, config) == "transformers":
        return load_transformers(
            name,
            identifier,
            config,
            weights,
            revision=revision or None,
            checkpoint=checkpoint,
            **transformers_options(name, classes, arguments),
        )
    return load_timm_layout(
        name,
        f"{PREFIX}{name.removeprefix(PREFIX)}",
        weights,
        checkpoint=checkpoint,
        size=size,
        classes=classes,
        arguments=arguments,
    )


def _download(name: str, identifier: str, revision: str | None) -> Path:
    """Return the path of a repository's config.json in the library's cache.

    Raises:
        ConfigError: huggingface_hub is not installed.
        InputError: the file is not in the cache and cannot be downloaded.
    """
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError as error:
        raise ConfigError(
            f"huggingface_hub is not installed, so {name} cannot be loaded", hint="run pip install 'mpcompile[hub]'"
        ) from error
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # its warnings about each attempt to connect
    try:
        return Path(hf_hub_download(identifier, CONFIG, revision=revision))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if any(kind in _OFFLINE for kind in kinds):
            state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            raise InputError(
                f"{name} is not in the cache, and {state}",
                hint="where there is a network: hf download ORG/NAME --local-dir FOLDER; then give FOLDER",
            ) from error
        reason = next((_REASONS[kind] for kind in kinds if kind in _REASONS), first_line(error))
        raise InputError(f"{name} cannot be downloaded: {reason}") from error
    finally:
        log.setLevel(level)


def _commit(path: Path) -> str | None:
    """Return the commit of a file in the library's cache, which is the name of its folder."""
    return path.parent.name if path.parent.parent.name == "snapshots" else None
