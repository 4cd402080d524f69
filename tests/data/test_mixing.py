"""Mixed images: which ones, of what, and that recipes refuse labels for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.data.mixing import MixedBatches, mixed
from mpcompile.data.seeding import seeded
from mpcompile.errors import ConfigError
from mpcompile.training.recipes.recipe import Recipe


@given(st.integers(1, 9), st.integers(0, 10**6))
def test_mixes_lie_between_two_images_of_the_batch(count, seed):
    levels = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    with seeded(seed, 0, 0):
        found = mixed(levels, 1.0)
    assert found.shape == levels.shape and found.min() >= 0 and found.max() <= count - 1
    assert torch.equal(mixed(levels, 0.0), levels)
    if count == 1:
        assert torch.equal(found, levels)
    else:
        assert not torch.equal(found, levels)
    with seeded(seed, 0, 0):
        assert torch.equal(mixed(levels, 1.0), found)


def test_a_share_of_a_batch_is_mixed_and_labels_stay():
    samples = [(torch.full((3, 8, 8), float(i)), i) for i in range(400)]
    with seeded(0, 0, 0):
        images, labels = MixedBatches(0.3)(samples)
    changed = (images != labels.view(-1, 1, 1, 1)).flatten(1).any(1).float().mean()
    assert 0.2 < float(changed) < 0.4
    assert torch.equal(labels, torch.arange(400))


def test_a_recipe_mixes_only_without_labels():
    with pytest.raises(ConfigError, match=r"labels then do not describe.*train.alpha=1.*found train.alpha=0.5"):
        Recipe.load("deit_tiny_2of4_tome8", ["data.mix=0.3"])
    assert Recipe.load("deit_tiny_2of4_tome8", ["data.mix=0.3", "train.alpha=1"]).data.mix == 0.3
    with pytest.raises(ConfigError, match=r"cache stores.*data.mix=0 with.*found data.mix=0.3"):
        Recipe.load("deit_tiny_2of4_tome8", ["data={augment: false, mix: 0.3}", "train={alpha: 1, cache: true}"])
