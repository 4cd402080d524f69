"""The state of a search on disk: measured numbers and outcomes, from which an interrupted run resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile._version import __version__
from mpcompile.data import ranks
from mpcompile.errors import ArtifactError
from mpcompile.io.reading import read_json
from mpcompile.io.writing import make_folder, write_atomically
from mpcompile.optimization.accuracy.images import Images
from mpcompile.optimization.accuracy.outcome import Outcome
from mpcompile.optimization.numbers.model import Drops, Level, Menu, Model
from mpcompile.optimization.recipe import Recipe

log = logging.getLogger(__name__)
NAME = "search.json"


class State:
    """What a search has measured, in a folder or in memory only.

    Args:
        folder: of the file :data:`NAME`; None keeps nothing.
        key: of the model, the images and the goal: a file of another search is replaced.

    Example:
        >>> state = State(None, "key")
        >>> state.outcome(Recipe()) is None
        True
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: str) -> None:
        self.path = None if folder is None or ranks.rank() else Path(folder) / NAME
        self.values: dict[str, Any] = {"mpcompile_search": key, "model": None, "outcomes": {}}
        if folder is not None and not ranks.rank():
            make_folder(Path(folder))
        found = ranks.broadcast(self._read(key) if self.path is not None else None)
        if found is not None:
            self.values = found
            log.info("resuming the search in %s: %d outcomes known", folder, len(found["outcomes"]))

    def _read(self, key: str) -> dict[str, Any] | None:
        assert self.path is not None
        if not self.path.exists():
            return None
        try:
            values = read_json(self.path)
            known = isinstance(values, dict) and values.get("mpcompile_search") == key
            if known and values["model"] is not None:
                _model(values["model"])
            return {**values, "outcomes": dict(values["outcomes"])} if known else None
        except (ArtifactError, KeyError, TypeError, ValueError):
            return None  # damaged: it is measured again

    @property
    def model(self) -> Model | None:
        """The numbers measured so far."""
        return None if self.values["model"] is None else _model(self.values["model"])

    def keep_model(self, model: Model) -> None:
        """Keep the numbers."""
        self.values["model"] = dataclasses.asdict(model)
        self._write()

    def outcome(self, recipe: Recipe, part: str = "held-out") -> Outcome | None:
        """Return the known outcome of a recipe on a part of the images."""
        values = self.values["outcomes"].get(_name(recipe, part))
        return None if values is None else Outcome(**values)

    def keep_outcome(self, recipe: Recipe, outcome: Outcome, part: str = "held-out") -> None:
        """Keep an outcome."""
        self.values["outcomes"][_name(recipe, part)] = outcome.record()
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_atomically(self.path, json.dumps(self.values) + "\n")


def _name(recipe: Recipe, part: str) -> str:
    return f"{part} {json.dumps(recipe.record(), sort_keys=True)}"


def _model(values: Mapping[str, Any]) -> Model:
    levels = [Level(tuple(v["merges"]), v["damage"], v["cost"]) for v in values["levels"]]
    menus = [
        Menu(tuple(v["layers"]), tuple(v["patterns"]), tuple(v["damages"]), tuple(tuple(costs) for costs in v["costs"]))
        for v in values["menus"]
    ]
    return Model(levels, menus, values["scale"], values["interaction"], Drops(**values["drops"]))


def search_key(model: nn.Module, parts: tuple[Images, ...], goal: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return a digest of everything that the results of a search depend on, besides the speed of the machine."""
    digest = hashlib.sha256(json.dumps([__version__, torch.__version__, goal, config], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        _add(digest, tensor)
    for images in parts:
        for leaf in pytree.tree_leaves((images.batches, images.labels)):
            if isinstance(leaf, Tensor):
                _add(digest, leaf)
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data if plain.numel() else b"")
