"""The number of tokens that merge: schedules, budgets, counts and published figures."""

import pytest
import timm
import torch

import mpcompile
from mpcompile import Config, Pipeline, transform
from mpcompile.errors import ConfigError, GraphError
from mpcompile.passes.dead_tokens import SkipDeadTokens
from mpcompile.passes.merge_tokens import MergeTokens
from tests.support import merging_reference
from tests.support.helpers import images, relative, tiny_vit, transformer
from tests.support.merging import decision, merged


def test_tokens_are_counted_and_clamping_is_reported():
    gm = merged(tiny_vit(), images(), 5)
    assert gm.plan.tokens == [17, 12, 7]
    gm = merged(tiny_vit(), images(), 25)
    assert gm.plan.tokens == [17, 9, 5]
    assert "clamped to half of the tokens in 2 blocks" in gm.plan.passes[-1].summary


PUBLISHED = [  # Bolya et al.; multiply-accumulates in G, or the share saved of them
    ("deit_small_patch16_224", 8, 3.416),
    ("deit_small_patch16_224", 13, 2.703),
    ("deit_small_patch16_224", 16, 2.291),
    ("vit_large_patch16_224", 8, (1 - 0.4970) * 61.555),
]


@pytest.mark.parametrize(("name", "r", "executed"), PUBLISHED)
def test_published_macs(name, r, executed):
    with torch.device("meta"):
        macs = merged(timm.create_model(name).eval(), torch.empty(1, 3, 224, 224), r).plan.macs
    assert macs.executed / 1e9 == pytest.approx(executed, abs=5e-3 if "large" in name else 6e-4)
    assert macs.executed < macs.paper < macs.dense
    assert 0 < macs.matching < 0.01 * macs.executed


@pytest.mark.parametrize("r", [[5, 0], [0, 5], [4, 1]])
def test_a_number_for_each_block(r):
    model, x = tiny_vit(), images()
    gm = merged(model, x, r)
    assert decision(gm)["r"] == r
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, r, 1)) < 1e-5


def test_a_linear_schedule():
    model, x = tiny_vit(), images()
    gm = merged(model, x, 3, tome_schedule="linear")
    assert decision(gm)["r"] == [6, 0]
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, [6, 0], 1)) < 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("schedule", ["auto", "linear"])
@pytest.mark.parametrize("reduction", [0.05, 0.2])
def test_auto_merges_the_fewest_tokens_that_meet_the_reduction(name, schedule, reduction):
    model, x = transformer(name), images(1, 128)
    gm = merged(model, x, "auto", tome_reduction=reduction, tome_schedule=schedule)
    assert gm.plan.macs.reduction >= reduction
    fewer = list(decision(gm)["r"])
    fewer[fewer.index(max(fewer))] -= 1
    assert merged(model, x, fewer).plan.macs.reduction < reduction


@pytest.mark.parametrize("schedule", ["constant", "parabolic"])
def test_dead_tokens_count_towards_the_reduction(schedule):
    """The target is met by what both passes save, and no merge stands where nothing reads merged tokens."""
    config = Config(pattern="dense", tome_r="auto", tome_reduction=0.4, tome_schedule=schedule)
    pipeline = Pipeline([MergeTokens(), SkipDeadTokens()])
    saved = {}
    for fewer in (0, 1):
        gm = transform(tiny_vit(depth=3), images(), config, pipeline=pipeline)
        r = gm.plan.passes[0].decision["r"]
        saved[fewer] = gm.plan.macs.reduction
        assert r[-1] == 0 and len(set(gm.plan.tokens[-2:])) == 1
        r[r.index(max(r))] -= 1
        config = Config(pattern="dense", tome_r=r)
    assert saved[1] < 0.4 <= saved[0]


def test_a_target_that_dead_tokens_meet_needs_no_merge():
    config = Config(pattern="dense", tome_r="auto", tome_reduction=0.1)
    gm = transform(tiny_vit(), images(), config)
    assert gm.plan.tokens == [] and gm.plan.macs.reduction >= 0.1
    assert "nothing has to merge" in gm.plan.passes[3].summary


def test_auto_reports_the_largest_reduction():
    with pytest.raises(ConfigError, match=r"cannot save 90.0%.*tome_reduction of at most 0\.\d+"):
        merged(tiny_vit(), images(), "auto", tome_reduction=0.9)


def test_refuses_a_schedule_of_the_wrong_length():
    with pytest.raises(ConfigError, match="2 numbers, one for each attention block, found 3"):
        merged(tiny_vit(), images(), [1, 2, 3])


@pytest.mark.parametrize(
    "options",
    [
        {"tome_r": -1},
        {"tome_r": [3, -1]},
        {"tome_r": "most"},
        {"tome_r": [1.5]},
        {"tome_r": "auto"},
        {"tome_r": "auto", "tome_reduction": 1.5},
        {"tome_r": 8, "tome_reduction": 0.5},
        {"tome_r": [8, 8], "tome_schedule": "linear"},
        {"tome_r": 8, "tome_schedule": "cosine"},
    ],
)
def test_refuses_options_that_make_no_sense(options):
    with pytest.raises(ConfigError, match="tome_"):
        Config(**options)


def test_prefix_can_be_overridden():
    gm = merged(tiny_vit(), images(), 3, prefix_tokens=3)
    assert decision(gm)["prefix"] == 3
    with pytest.raises(GraphError, match="more prefix tokens than tokens"):
        merged(tiny_vit(), images(), 3, prefix_tokens=18)


def test_saves_loads_and_merges_once(tmp_path):
    model, x = transformer("eva02_tiny_patch14_224", 112), images(2, 112)
    gm = merged(model, x, 8)
    mpcompile.save(gm, tmp_path / "merged.mpc")
    loaded = mpcompile.load(tmp_path / "merged.mpc")
    with torch.no_grad():
        assert torch.equal(loaded(x), gm(x))
    again = merged(loaded, x, 8)
    assert again.plan.tokens == gm.plan.tokens and again.plan.passes[-1].summary == "already merged"
    with pytest.raises(GraphError, match=r"tokens merge in it already.*found tome_r=4"):
        merged(loaded, x, 4)
