"""Options: validated once, the same everywhere."""

import dataclasses
import json

import pytest
import torch

from mpcompile import Config, MPCompileError
from mpcompile.errors import ConfigError


def test_defaults_and_size():
    config = Config()
    assert (config.pattern, config.tome_r, config.score, config.engine) == ("2:4", 0, "obs", "auto")
    assert len(dataclasses.fields(Config)) <= 19
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pattern = "4:8"


def test_options_round_trip_through_json():
    config = Config("8:16", tome_r=4, exclude=["head", "*.fc2"], include="stem.0", frozen=True)
    assert config.exclude == ("head", "*.fc2") and config.include == ("stem.0",)
    assert Config.from_options(json.loads(json.dumps(config.to_dict()))) == config
    assert Config.from_options(None) == Config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patern": "2:4"}, r"unknown option 'patern'; expected one of pattern, mac_.*did you mean|Did you mean"),
        ({"pattern": "5:4"}, "1 <= N <= M"),
        ({"pattern": "two"}, "not an N:M pattern"),
        ({"pattern": 24}, "wrong type"),
        ({"tome_r": -1}, "negative"),
        ({"tome_r": True}, "wrong type"),
        ({"tome_r": 2.5}, "wrong type"),
        ({"score": "wand"}, "no such value"),
        ({"engine": "gpu"}, "no such value"),
        ({"exclude": 3}, "wrong type"),
        ({"prefix_tokens": -2}, "negative"),
        ({"outputs": ["logits", 1]}, "wrong type"),
        ({"permute": 1}, "wrong type"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_options(options)


def test_patterns():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert Config("dense").choices(cpu) == () and Config("dense").pattern_for(torch.ones(1, 8)) is None
    assert [Config("4:8").pattern_for(torch.ones(1, k)) for k in (16, 12)] == [(4, 8), None]
    found = [Config("auto").pattern_for(torch.ones(1, k)) for k in (48, 24, 12, 6)]
    assert found == [(8, 16), (4, 8), (2, 4), None]
    assert Config("auto").choices(cuda) == ((2, 4),)


def test_menus():
    names = lambda config, k: [str(p) for p in config.menu(torch.ones(1, k))]  # noqa: E731
    config = Config(mac_reduction=0.4)
    assert names(config, 48) == ["12:16", "10:16", "8:16", "6:16", "4:16"]
    assert names(config, 24) == ["6:8", "5:8", "4:8", "3:8", "2:8"] and names(config, 12) == ["3:4", "2:4", "1:4"]
    assert names(config, 6) == [] and config.pattern_for(torch.ones(1, 6)) is None
    assert config.choices(torch.device("cuda")) == ((2, 4),)
    named = Config(mac_reduction=0.4, patterns=["2:4", "dense", "8:16", "6:8"])
    assert names(named, 48) == ["6:8", "8:16", "2:4"] and names(named, 4) == ["2:4"]
    assert Config.from_options(json.loads(json.dumps(named.to_dict()))) == named


def test_options_must_be_a_mapping():
    with pytest.raises(ConfigError, match="not a mapping"):
        Config.from_options(["pattern"])


def test_errors_name_the_place_the_values_and_the_next_step():
    error = MPCompileError("broken", layer="fc", expected="a", found="b", hint="try c")
    assert str(error) == "fc: broken; expected a, found b. Try c"
    assert (error.layer, error.expected, error.found, error.hint) == ("fc", "a", "b", "try c")
