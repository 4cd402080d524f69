"""YAML as people write it is read; anything but plain values of a reasonable size is refused."""

import pytest

from mpcompile.errors import ConfigError
from mpcompile.io.yaml_options import parse
from mpcompile.training.options import Training
from mpcompile.training.recipes.recipe import Recipe

LEVELS = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
YAML = {
    "alias bomb": f"a: &a [x,x,x,x,x,x,x,x,x]\n{LEVELS}",
    "alias of itself": "a: &a [*a]",
    "depth": "a: " + "[" * 3000 + "]" * 3000,
    "some depth": "a: " + "[" * 30 + "]" * 30,
    "twice": "pattern: 2:4\npattern: 4:8",
    "twice within": "a: {b: 1, b: 2}",
    "huge integer": f"a: {'9' * 4000}",
    "large integer": f"a: {2**63}",
    "infinite": "a: 1e999",
    "tab": "a:\n\t- b",
    "binary": "a: !!binary aGk=",
    "set": "a: !!set {x, y}",
    "date": "a: !!timestamp 2024-01-01",
    "object": "a: !!python/object/apply:os.system [ls]",
    "list as a name": "? [a]\n: 1",
    "control characters": "a: \x1b[31m",
    "two documents": "a: 1\n---\na: 2",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_plain_values_of_a_reasonable_size(name, tmp_path):
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        parse(YAML[name], "the config")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    (tmp_path / "r.yaml").write_text(YAML[name])
    with pytest.raises(ConfigError):
        Recipe.load(tmp_path / "r.yaml")


def test_yaml_as_people_write_it():
    text = "base: &b {lr: 1e-4, seed: 010}\nuse: {<<: *b, lr: 0.5}\nday: 2024-01-01\npattern: 2:4\nnone: ~\nok: yes\n"
    assert parse(text, "x") == {
        "base": {"lr": 1e-4, "seed": 10},
        "use": {"lr": 0.5, "seed": 10},
        "day": "2024-01-01",
        "pattern": "2:4",
        "none": None,
        "ok": True,
    }


NO_RECIPES = [b"\xff\xfe", b"- a\n- b", b"5", b"a" * 2_000_000, b"model: [1]", b"{model: m, macs: 3}"]


@pytest.mark.parametrize("value", NO_RECIPES)
def test_files_that_are_not_recipes_are_refused(value, tmp_path):
    (tmp_path / "r.yaml").write_bytes(value)
    with pytest.raises(ConfigError):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("options", [{"lr": float("nan")}, {"lr": float("inf")}, {"epochs": 10**400}, {"seed": -1}])
def test_numbers_of_training_are_finite(options):
    with pytest.raises(ConfigError, match="out of range"):
        Training(**options)
