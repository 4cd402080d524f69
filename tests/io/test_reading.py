"""Only regular files are read, and JSON has to be of a reasonable size."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from mpcompile import Config, load, save, transform
from mpcompile.artifact.verify import read
from mpcompile.cli.options import read_config
from mpcompile.errors import ArtifactError, ConfigError, MPCompileError
from mpcompile.io.checkpoints import read_checkpoint
from mpcompile.io.reading import parse_json, read_json
from mpcompile.training import checkpoint, events
from mpcompile.training.recipes.recipe import Recipe
from tests.support.helpers import mlp


@pytest.fixture(scope="module")
def pruned():
    return transform(mlp(), torch.randn(2, 32), Config(pattern="2:4")).eval()


def odd_places(folder):
    """Objects that may be in the place of a file, and whose reading may block."""
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    return [folder / name for name in ("fifo", "link", "folder", "loop", "none")] + [Path("/dev/zero")]


def resumed(path):
    return events.EventLog(path, resume_at=1)


def lines(path):
    return list(events.read(path))


READERS = [read_json, load, read_checkpoint, read, resumed, lines, checkpoint.read, read_config]


@pytest.mark.parametrize("reader", READERS)
def test_nothing_but_a_regular_file_is_read(reader, tmp_path):
    signal.alarm(60)
    try:
        for place in odd_places(tmp_path):
            if place.name == "none" and reader is resumed:
                continue  # a new log is created
            with pytest.raises(MPCompileError) as caught:
                reader(place)
            assert re.search(f"{place.name}|fifo", str(caught.value)) and str(caught.value).isprintable()
    finally:
        signal.alarm(0)


def test_a_recipe_and_the_plan_of_a_folder_are_regular_files(pruned, tmp_path):
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.load(tmp_path / "r.yaml")
    save(pruned, f"{tmp_path}/a/")
    (tmp_path / "a/plan.json").unlink()
    assert load(tmp_path / "a").plan == pruned.plan  # it is only for people
    os.mkfifo(tmp_path / "a/plan.json")
    with pytest.raises(ArtifactError, match=r"plan\.json cannot be read"):
        load(tmp_path / "a")


def test_json_of_any_size_is_a_value_or_an_error():
    for text in ("[" * 100_000, "[" * 500 + "]" * 500, '{"a": ' + "9" * 30 + "}", "{", b"\xff", "9" * 5000):
        with pytest.raises(ValueError):
            parse_json(text)
    assert parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
