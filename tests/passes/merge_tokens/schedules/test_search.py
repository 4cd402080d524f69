"""The search for a schedule: what it accepts, what it never does, and that it repeats itself."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile import Config, Pipeline, Plan, transform
from mpcompile.capture.importers import import_model
from mpcompile.errors import ConfigError
from mpcompile.ir.shapes import propagate
from mpcompile.passes.base import Calibration, Context
from mpcompile.passes.merge_tokens.insert import Merges, MergeTokens
from mpcompile.passes.merge_tokens.schedules.curves import Curve
from mpcompile.passes.merge_tokens.schedules.search import search, without_data
from mpcompile.passes.merge_tokens.schedules.solve import Budget, solve
from mpcompile.passes.merge_tokens.schedules.stream import Stream
from tests.support.helpers import tiny_vit

SEARCH, CHECK = range(8), range(8, 16)


def budget(reduction=0.3, blocks=6):
    """A model whose cost is the sum of its tokens."""
    stream = Stream([f"block{i}" for i in range(blocks)], [], 1, 0, [65])
    return Budget(reduction, 65.0 * blocks, lambda numbers: float(sum(map(sum, numbers)) - 65), [stream])


def noise(part, schedule=(), size=8):
    generator = torch.Generator().manual_seed(hash((part, schedule)) % (1 << 31))
    return torch.rand(size, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1 << 20), st.floats(0.05, 0.45))
def test_nothing_worse_than_constant_or_linear_is_chosen(seed, reduction):
    """Losses without any structure, on which the best of many schedules on the search images is only lucky."""
    mine = budget(reduction)
    result = search(mine, lambda r, part: noise((part, seed), r), SEARCH, CHECK, "noise", seed)
    assert result.best.check == min(candidate.check for candidate in result.candidates)
    assert {"constant", "linear"} <= {candidate.name for candidate in result.candidates}
    assert all(mine.meets(candidate.r) for candidate in result.candidates)
    assert result == search(mine, lambda r, part: noise((part, seed), r), SEARCH, CHECK, "noise", seed)


def test_finds_a_curve_that_is_better_on_every_image():
    mine = budget()
    planted = solve(mine, Curve(1.7, 0.6))[0]
    calls = []

    def loss(schedule, part):
        calls.append(part)
        distance = sum((a - b) ** 2 for a, b in zip(schedule[0], planted, strict=True))
        return 1 + distance + 0.1 * noise(part)

    result = search(mine, loss, SEARCH, CHECK, "distance")
    losses = {candidate.name: candidate.check for candidate in result.candidates}
    assert result.chosen not in ("constant", "linear") and losses[result.chosen] < 0.2 * losses["constant"]
    assert (result.search_images, result.check_images) == (64, 64)
    assert sum(part in CHECK for part in calls) <= len(CHECK) * len(result.candidates)  # no search on the check images


def test_differences_within_their_noise_are_not_accepted():
    """All schedules are equally good: what differs is noise, which the margin of an exchange must keep out."""
    accepted = 0
    for seed in range(8):
        result = search(budget(), lambda r, part, seed=seed: noise((part, seed), r), SEARCH, CHECK, "noise", seed)
        accepted += sum("exchange" in candidate.name for candidate in result.candidates)
    assert accepted <= 4


def test_losses_that_are_not_numbers_lose():
    def loss(schedule, part):
        constant = len(set(schedule[0])) == 1 or max(schedule[0]) - min(schedule[0]) <= 1
        return noise(part) if constant else torch.full((8,), torch.nan)

    result = search(budget(), loss, SEARCH, CHECK, "noise")
    assert result.chosen == "constant" and json.loads(json.dumps(result.best.check)) < 1


# --- On a model ---


AUTO = Config(pattern="dense", tome_r="auto", tome_reduction=0.4)


def photos(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator)


@pytest.fixture(scope="module")
def planned():
    model = tiny_vit(depth=3, patch_size=4)
    imported = import_model(model, photos(2))
    propagate(imported.gm, imported.inputs)
    state = {name: value.clone() for name, value in imported.gm.state_dict().items()}
    data = Calibration(list(photos(48).split(10)))
    decisions = []
    for _ in range(2):
        ctx = Context(AUTO, imported.inputs, imported.lifted, calibration=data, seed=3)
        code = str(imported.gm.graph)
        decisions.append(MergeTokens().plan(imported.gm, ctx))
        assert str(imported.gm.graph) == code
    assert all(torch.equal(value, state[name]) for name, value in imported.gm.state_dict().items())
    return decisions


def test_a_model_is_searched_and_plans_the_same_twice(planned):
    first, second = planned
    result = first.search
    assert first == second
    assert result is not None and (result.search_images, result.check_images) == (24, 24)
    assert result.measure == "KL of class scores" and result.tried > 5
    assert result.best.r == (tuple(first.streams[0].r),)
    assert Merges.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_the_plan_tells_the_choice_and_the_images():
    gm = transform(tiny_vit(depth=3, patch_size=4), photos(2), AUTO, iter(photos(48).split(10)), calibrate="dense")
    record = next(record for record in gm.plan.passes if record.name == "merge_tokens")
    assert "24 check images (on 24 search images)" in record.summary and "constant 0." in record.summary
    assert gm.plan.macs.reduction >= 0.4
    assert Plan.from_json(gm.plan.to_json()) == gm.plan


@pytest.mark.parametrize(
    ("data", "schedule", "said"),
    [
        (None, "auto", " schedule: there is no calibration data"),
        ([photos(20)], "auto", "needs 32 images"),
        ([photos(48)], "linear", "linear schedule, as requested"),
    ],
)
def test_without_a_search_the_plan_says_why(data, schedule, said):
    config = Config(pattern="dense", tome_r="auto", tome_reduction=0.2, tome_schedule=schedule)
    gm = transform(tiny_vit(depth=3, patch_size=4), photos(2), config, data, pipeline=Pipeline([MergeTokens()]))
    assert said in gm.plan.passes[-1].summary


def test_a_target_out_of_reach_is_refused_with_the_reachable_range():
    with pytest.raises(ConfigError, match=r"cannot save 90.0%.*of at most 0\.\d+"):
        transform(tiny_vit(), photos(2), Config(tome_r="auto", tome_reduction=0.9), [photos(40)])


def test_without_data_no_block_merges_many_of_its_tokens_if_that_can_be_avoided():
    names = [without_data(budget(reduction, blocks=12))[1] for reduction in (0.1, 0.4, 0.75)]
    assert names == ["t^2 (1 - t)^1", "t^1.5 (1 - t)^1", "parabolic"]
    for reduction in (0.1, 0.4):
        tokens = budget(reduction, 12).tokens(without_data(budget(reduction, 12))[0])[0]
        assert all(a - b <= a / 4 for a, b in itertools.pairwise(tokens))
