"""The numbers of a search: the best choice against all choices, budgets that are kept, and fits that find the truth."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.config import Config
from mpcompile.optimization.accuracy.outcome import Outcome
from mpcompile.optimization.frontier import Entry, Frontier
from mpcompile.optimization.numbers.model import Drops, Level, Menu, Model, interpolated
from mpcompile.optimization.recipe import Recipe

values = st.floats(0.001, 1, allow_nan=False)


@st.composite
def models(draw):
    count, depth = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    damages = sorted(draw(st.lists(values, min_size=depth - 1, max_size=depth - 1, unique=True)))
    costs = [100.0, *sorted((draw(st.floats(20, 90)) for _ in damages), reverse=True)]
    levels = [Level((k,) if k else (), d, c) for k, (d, c) in enumerate(zip([0.0, *damages], costs, strict=True))]
    menus = [
        Menu(
            (f"layer{i}",),
            ("dense", "12:16", "8:16"),
            (0.0, *sorted(draw(values) for _ in range(2))),
            tuple((10.0, draw(st.floats(4, 12)), draw(st.floats(2, 12))) for _ in levels),
        )
        for i in range(count)
    ]
    return Model(levels, menus, scale=draw(st.floats(0.2, 3)), interaction=draw(st.floats(-0.3, 0.9)))


def every_choice(model):
    """Return (damage, cost) of all choices."""
    for number, level in enumerate(model.levels):
        for options in itertools.product(*(range(len(menu.patterns)) for menu in model.menus)):
            pairs = list(zip(model.menus, options, strict=True))
            masks = sum(menu.damages[i] for menu, i in pairs)
            cost = level.cost + sum(menu.costs[number][i] - menu.costs[number][0] for menu, i in pairs)
            yield masks, model.damage(level.damage, masks), model.room(level.damage, 1e9), number, cost


@settings(max_examples=60, deadline=None)
@given(models(), st.floats(0, 4))
def test_the_best_choice_is_the_cheapest_of_all_within_the_budget(model, budget):
    found = model.best(budget)
    allowed = [
        cost
        for masks, _, _, number, cost in every_choice(model)
        if (room := model.room(model.levels[number].damage, budget)) >= masks or (masks == 0 and room >= 0)
    ]
    assert found.cost == pytest.approx(min(allowed), abs=1e-6)
    assert found.damage <= budget + 1e-6 or found.recipe == Recipe()


@given(models(), st.floats(0, 4))
def test_room_is_what_a_budget_leaves(model, budget):
    for level in model.levels:
        room = model.room(level.damage, budget)
        if room > 0:
            assert model.damage(level.damage, room) == pytest.approx(budget, abs=1e-6)
        elif level.damage > budget:
            assert room < 0


@given(models())
def test_larger_budgets_never_cost_more(model):
    costs = [model.best(budget).cost for budget in (0, 0.1, 0.5, 2, 1e9)]
    assert costs == sorted(costs, reverse=True)
    assert model.reach()[1] == pytest.approx(costs[-1])


def test_levers_that_are_not_allowed_are_not_used():
    menu = Menu(("fc",), ("dense", "8:16"), (0.0, 0.1), ((10.0, 5.0), (8.0, 4.0)))
    model = Model([Level((), 0.0, 30.0), Level((4, 4), 0.05, 20.0)], [menu])
    assert model.best(9.0, masks=False).recipe == Recipe((4, 4))
    assert model.best(9.0, tokens=False).recipe == Recipe((), (("fc", "8:16"),))
    assert model.best(9.0).recipe == Recipe((4, 4), (("fc", "8:16"),))


def test_the_least_damage_for_a_cost_is_just_enough():
    menus = [Menu((f"fc{i}",), ("dense", "8:16"), (0.0, 0.01 * 2**i), ((10.0, 5.0),)) for i in range(4)]
    model = Model([Level((), 0.0, 40.0)], menus, interaction=0.0)
    found = model.least_damage(30.0)
    assert found.cost == 30 and found.damage == pytest.approx(0.03)
    assert model.least_damage(40.0).recipe == Recipe()


def test_scale_and_interaction_are_found_from_builds():
    truth = Model([Level((), 0.0, 1.0)], [], scale=2.5, interaction=0.4)
    measured = [(t, m, truth.damage(t, m)) for t, m in [(0.0, 0.1), (0.0, 0.3), (0.2, 0.1), (0.1, 0.3)]]
    model = Model([], [])
    model.fit(measured)
    assert (model.scale, model.interaction) == pytest.approx((2.5, 0.4))
    model.fit([])
    assert model.scale == pytest.approx(2.5)


def test_expected_drops_are_fitted_through_builds():
    truth = Drops(0.2, 0.7)
    fitted = Drops().fit([(d, truth.of(d)) for d in (0.001, 0.01, 0.1)])
    assert (fitted.factor, fitted.power) == pytest.approx((0.2, 0.7))
    assert fitted.of(fitted.damage(0.02)) == pytest.approx(0.02)
    assert Drops().fit([]) == Drops()
    assert Drops().fit([(0.01, 0.02)]).of(0.01) == pytest.approx(0.02)


@given(st.floats(1, 1000))
def test_interpolation_meets_what_is_known(rows):
    at = {100: 5.0, 200: 7.0, 400: 20.0}
    found = interpolated(at, rows)
    assert 0 < found <= 20 * max(1, rows / 400) + 1e-9
    assert [interpolated(at, r) for r in at] == list(at.values())


def test_a_recipe_is_a_config_and_comes_back_from_json():
    recipe = Recipe((3, 0), (("a.fc", "8:16"), ("b.fc", "12:16"), ("c.fc", "8:16")))
    config = recipe.config(Config(score="magnitude"))
    assert (config.pattern, config.tome_r, config.score) == ("8:16", (3, 0), "magnitude")
    assert config.named_pattern("b.fc") == "12:16" and config.named_pattern("other") == "dense"
    assert Recipe.read(recipe.record()) == recipe
    assert Recipe((0, 0)).config(Config()).tome_r == 0


def test_a_frontier_comes_back_from_json_and_knows_its_best_dense_build():
    outcome = Outcome(400, 10, 3, 3, 300, 0.01, 0.002)
    bad = Outcome(400, 50, 30, 3, 270, 0.2, 0.05)
    entries = [
        Entry("dense, torch", runtime="torch", dense=True, latency_ms=4.0),
        Entry("dense, openvino", runtime="openvino", dense=True, latency_ms=3.0),
        Entry("dense, openvino bf16", runtime="openvino", dense=True, precision="bf16", outcome=bad, latency_ms=1.0),
        Entry("8 tokens", Recipe((4, 4)), "torch", outcome=outcome, latency_ms=2.0, speedup=1.5, verdict="chosen"),
    ]
    frontier = Frontier(entries, 0.02, 0.8, {"precision": "fp32"}, ["a note"])
    assert frontier.best_dense.name == "dense, openvino"  # bf16 is faster, but loses too much
    again = Frontier.read(frontier.to_dict())
    assert again.to_dict() == frontier.to_dict() and again.chosen.name == "8 tokens"
    assert "a note" in str(again) and "1.50x" in str(again)
