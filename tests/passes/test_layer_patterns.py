"""``Config(layer_patterns=...)``: patterns of single layers, by name and glob, and what is refused."""

import pytest
import torch

import mpcompile
from mpcompile import Config, transform
from mpcompile.errors import ConfigError, GraphError, NotEligibleError
from mpcompile.passes.mask import verify
from tests.support.helpers import mlp, tiny_vit

OPTIONS = {"score": "magnitude", "exclude": ()}


def patterns(gm):
    return {name: layer.pattern for name, layer in gm.plan.layers.items()}


def test_names_and_globs_give_patterns_and_the_first_that_matches_counts():
    config = Config(layer_patterns=("blocks.0.mlp.fc1=4:8", "blocks.0.*=dense", "*.fc2=8:16"), **OPTIONS)
    gm = transform(tiny_vit(), torch.randn(2, 3, 32, 32), config)
    found = patterns(gm)
    assert found["blocks.0.mlp.fc1"] == "4:8"
    assert found["blocks.0.attn.qkv"] == found["blocks.0.mlp.fc2"] == "dense"
    assert found["blocks.1.mlp.fc2"] == "8:16"
    assert found["blocks.1.attn.qkv"] == "2:4"  # the pattern of the layers that nothing names
    assert gm.plan.layers["blocks.0.attn.qkv"].reason == "dense in layer_patterns"
    assert not any(verify(gm).values())


def test_a_masked_graph_keeps_them_and_refuses_others(tmp_path):
    options = {"pattern": "2:4", "layer_patterns": ("0=1:4", "2=dense"), **OPTIONS}
    x = torch.randn(4, 32)
    gm = transform(mlp(), x, Config(**options))
    mpcompile.save(gm, tmp_path / "m.mpc")
    assert patterns(mpcompile.load(tmp_path / "m.mpc")) == patterns(gm) == {"0": "1:4", "2": "dense", "4": "2:4"}
    assert patterns(transform(gm, x, Config(**options))) == patterns(gm)
    with pytest.raises(GraphError, match="already masked"):
        transform(gm, x, Config(**{**options, "layer_patterns": ("0=2:4",)}))


def test_the_backend_masks_by_them():
    model, x = mlp(), torch.randn(4, 32)
    options = {"pattern": "2:4", "layer_patterns": ["0=1:4", "2=dense"], "engine": "reference", **OPTIONS}
    with torch.no_grad():
        found = torch.compile(model, backend="mpsparse", options=options)(x)
        wanted = transform(model, x, Config.from_options(options))(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_glob_that_does_not_fit_leaves_the_layer_dense():
    gm = transform(mlp(), torch.randn(4, 32), Config(layer_patterns=("*=8:32",), **OPTIONS))
    assert patterns(gm) == {"0": "8:32", "2": "dense", "4": "8:32"}
    assert gm.plan.layers["2"].reason == "K % 32 (K = 48)"


@pytest.mark.parametrize(("given", "message"), [(("7=2:4",), "no such layer"), (("2=8:32",), "K % 32")])
def test_a_named_layer_that_cannot_be_masked_is_refused(given, message):
    with pytest.raises(NotEligibleError, match=message):
        transform(mlp(), torch.randn(4, 32), Config(layer_patterns=given, **OPTIONS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_patterns": ("fc1",)}, "is malformed"),
        ({"layer_patterns": ("=2:4",)}, "is malformed"),
        ({"layer_patterns": ("fc1=5:4",)}, "1 <= N <= M"),
        ({"layer_patterns": ("fc1=2:4",), "pattern": "dense"}, "refines one pattern"),
        ({"layer_patterns": ("fc1=2:4",), "mac_reduction": 0.3}, "refines one pattern"),
        ({"layer_patterns": (1,)}, "wrong type"),
    ],
)
def test_malformed_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Config(**options)
