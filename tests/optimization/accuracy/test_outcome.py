"""Outcomes: bounds of drops against exact and simulated ones, and the sums that make them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpcompile.errors import ConfigError
from mpcompile.optimization.accuracy.outcome import (
    Outcome,
    check_goal,
    compare,
    images_needed,
    outcome_of,
    paired_bound,
)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(81, 600), st.sampled_from([0.6, 0.8, 0.95, 0.99]))
def test_a_bound_is_above_the_drop_and_rises_with_losses_and_confidence(lost, won, samples, confidence):
    bound = paired_bound(lost, won, samples, confidence)
    assert (lost - won) / samples < bound < 1
    assert bound < paired_bound(lost + 1, won, samples, confidence)
    assert bound < paired_bound(lost, won, samples, (1 + confidence) / 2)


def test_a_bound_is_half_the_drop_itself():
    assert paired_bound(7, 3, 100, 0.5) == pytest.approx(0.04)


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.01), (0.01, 0.0), (0.05, 0.05), (0.003, 0.001)])
def test_bounds_hold_as_often_as_they_say(lost, won):
    rng, samples, confidence = np.random.default_rng(0), 400, 0.9
    counts = rng.multinomial(samples, [lost, won, 1 - lost - won], size=2000)
    bounds = [paired_bound(int(a), int(b), samples, confidence) for a, b, _ in counts]
    share = np.mean([bound >= lost - won for bound in bounds])
    assert share > confidence - 0.03  # the score interval is close to its nominal level also for a handful of losses


def test_without_labels_changed_classes_take_the_place_of_the_drop():
    outcome = Outcome(200, 6, None, None, None, 0.01, 0.004)
    assert outcome.drop == 0.03 and not outcome.labelled
    assert outcome.upper(0.95) == pytest.approx(0.0584, abs=2e-4)  # Clopper-Pearson
    assert Outcome(10, 10, None, None, None, 0.0, 0.0).upper(0.9) == 1.0
    assert Outcome(10, 0, None, None, None, 0.0, 0.0).interval()[0] == 0.0


def test_an_interval_holds_its_drop_and_turns_around_with_the_counts():
    low, high = Outcome(300, 20, 9, 4, 200, 0.1, 0.01).interval()
    assert low < 5 / 300 < high
    turned = Outcome(300, 20, 4, 9, 200, 0.1, 0.01).interval()
    assert turned == pytest.approx((-high, -low))


@pytest.mark.parametrize("max_drop", [0.005, 0.02, 0.1])
@pytest.mark.parametrize("confidence", [0.6, 0.8, 0.95])
def test_the_images_needed_are_just_enough(max_drop, confidence):
    count = images_needed(max_drop, confidence)
    assert paired_bound(0, 0, count, confidence) <= max_drop + 1e-9
    if count > 2:
        assert paired_bound(0, 0, count - 2, confidence) > max_drop


def test_sums_of_batches_make_the_outcome_of_all():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(60, 7, generator=generator)
    scores = dense + torch.randn(60, 7, generator=generator)
    labels = torch.randint(0, 7, (60,), generator=generator)
    parts = [compare(d, s, n) for d, s, n in zip(dense.split(16), scores.split(16), labels.split(16), strict=True)]
    outcome = outcome_of([sum(column) for column in zip(*parts, strict=True)], True)
    hit, dense_hit = scores.argmax(1) == labels, dense.argmax(1) == labels
    assert outcome.samples == 60
    assert outcome.right == int(hit.sum())
    assert (outcome.lost, outcome.won) == (int((dense_hit & ~hit).sum()), int((hit & ~dense_hit).sum()))
    assert outcome.changed == int((scores.argmax(1) != dense.argmax(1)).sum())
    p, q = dense.double().softmax(1), scores.double().softmax(1)
    assert outcome.divergence == pytest.approx(float((p * (p / q).log()).sum() / 60))
    rows = torch.arange(60)
    assert outcome.expected == pytest.approx(float((p[rows, dense.argmax(1)] - p[rows, scores.argmax(1)]).mean()))


def test_a_build_that_changes_nothing_loses_nothing():
    scores = torch.randn(5, 3)
    assert outcome_of(compare(scores, scores, torch.zeros(5, dtype=torch.long)), True).drop == 0


@pytest.mark.parametrize(("max_drop", "confidence"), [(0, 0.8), (1, 0.8), (-0.1, 0.8), (0.1, 0.4), (0.1, 1)])
def test_goals_out_of_range_are_refused(max_drop, confidence):
    with pytest.raises(ConfigError, match="expected"):
        check_goal(max_drop, confidence)
