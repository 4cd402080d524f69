"""Spectral Edge Budgeting: the weights of layers, the presets of the paper, and the names that have moved."""

import pytest

from mpcompile.kernels.nm_format import Pattern
from mpcompile.pruning import damage, knapsack
from mpcompile.pruning.edge_budget import layer_weights, seb_preset, seb_weights


def test_weights_follow_the_edge_down_to_a_floor():
    assert seb_weights([1.0, 1.0], 0.5, 1.0, 0.7).tolist() == [1, 1]
    low, _, high = seb_weights([1.0, 2.0, 9.0], 0.3, 5.0, 0.5)
    assert low == 0.1 and high > 1


@pytest.mark.parametrize(
    ("sparsity", "attention", "other", "s_d"),
    [
        (0.1, 0.0, 0.0, 0.3),
        (0.2, 0.0, 0.0, 0.3),
        (0.21, 1.0, 1.0, 0.5),
        (0.4, 1.0, 1.0, 0.5),
        (0.55, 1.25, 1.25, 0.7),
        (0.56, 1.0, 2.0, 0.85),
    ],
)
def test_presets_are_those_of_the_paper(sparsity, attention, other, s_d):
    assert seb_preset(sparsity) == (attention, other, s_d)


def test_up_to_a_fifth_all_layers_weigh_the_same():
    assert layer_weights({"a": 1.0, "b": 9.0}, 0.2) == {"a": 1.0, "b": 1.0}


def test_attention_is_modulated_less_where_most_weights_go():
    edges = {"blocks.0.attn.qkv": 3.0, "blocks.0.mlp.fc1": 3.0, "blocks.0.mlp.fc2": 1.0}
    weights = layer_weights(edges, 0.6)
    assert 1 < weights["blocks.0.attn.qkv"] < weights["blocks.0.mlp.fc1"]
    even = layer_weights(edges, 0.5)
    assert even["blocks.0.attn.qkv"] == even["blocks.0.mlp.fc1"]


def test_old_names_in_knapsack_still_work():
    with pytest.deprecated_call():
        assert knapsack.lost_energy(Pattern(2, 4)) == damage.lost_energy(Pattern(2, 4))
    with pytest.deprecated_call():
        assert knapsack.seb_regime(0.5) == seb_preset(0.5)
    with pytest.deprecated_call():
        assert knapsack.seb_weights is seb_weights
    with pytest.deprecated_call():
        assert knapsack.knapsack is knapsack.solve
    with pytest.raises(AttributeError, match="nothing"):
        _ = knapsack.nothing
