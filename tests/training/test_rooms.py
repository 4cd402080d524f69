"""Packages of training, data and measurement: allowed imports between them, and names that have changed."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import mpcompile

ROOT = Path(mpcompile.__file__).parent


def imported(room: str) -> set[str]:
    """The packages that a package imports, anywhere in its files."""
    rooms: set[str] = set()
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            rooms |= {name.split(".")[1] for name in names if name.startswith("mpcompile.")}
    return rooms


@pytest.mark.parametrize(
    ("room", "others"),
    [("data", {"training", "measure", "calibration", "passes", "pipeline"}), ("measure", {"training", "cli"})],
)
def test_arrows_point_one_way(room, others):
    assert "errors" in imported(room)
    assert not imported(room) & others


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(
            ("training.checkpoint", name)
            for name in ("digest", "in_the_way", "left_behind", "check_alike", "check_same")
        ),
        *(("training.checkpoint", name) for name in ("random_state", "set_random_state", "seed_everything")),
        ("training.policies", "digest"),
        ("training.features", "Pair"),
        ("training.options", "check_type"),
        ("data.loader", "Images"),
        ("data.ranks", "check_masks"),
        ("calibration.data", "draw"),
        ("measure.audit", "environment"),
    ],
)
def test_old_names_warn_and_resolve(module, name):
    with pytest.warns(
        DeprecationWarning, match=rf"mpcompile\.{module}\.{name} has a new name: use (mpcompile\.\S+)"
    ) as caught:
        value = getattr(importlib.import_module(f"mpcompile.{module}"), name)
    path, _, new = str(caught[0].message).rpartition(" ")[2].rpartition(".")
    assert value is getattr(importlib.import_module(path), new)
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(importlib.import_module(f"mpcompile.{module}"), f"{name}_")
