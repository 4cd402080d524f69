"""Names of training, data and measurement that have changed: the old ones warn and resolve."""

from __future__ import annotations

import importlib

import pytest


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
