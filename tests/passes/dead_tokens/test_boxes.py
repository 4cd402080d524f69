"""Boxes: sets of indices, checked against sets; and the parts to compute, which contain every box that is read."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mpcompile.passes.dead_tokens.boxes import FULL, box, count, pieces, positions, share, union, within

SHAPE = (2, 5, 12)


def indices(runs, length):
    return [i % length for start, stop in runs for i in range(start, stop)]


def cells(some, shape=SHAPE):
    axes = dict(some)
    return set(itertools.product(*[indices(axes.get(a, ((0, n),)), n) for a, n in enumerate(shape)]))


def runs_of(length):
    points = st.lists(st.integers(0, length), min_size=2, max_size=6, unique=True).map(sorted)
    pairs = points.map(lambda p: tuple(zip(p[::2], p[1::2], strict=False)))
    return pairs.map(union)


def boxes():
    return st.fixed_dictionaries({}, optional={a: runs_of(n) for a, n in enumerate(SHAPE)}).map(box)


@given(runs_of(12), runs_of(12))
def test_union_and_positions(a, b):
    both = union(a, b)
    assert indices(both, 12) == sorted({*indices(a, 12), *indices(b, 12)}) and count(both) == len(indices(both, 12))
    place = positions(both, a)
    assert [indices(both, 12)[i] for i in indices(place, count(both))] == indices(a, 12)
    if not set(indices(b, 12)) <= set(indices(a, 12)):
        assert positions(a, b) is None


def test_runs_from_the_end_are_not_mixed_with_those_from_the_front():
    assert union(((-2, 0),), ((0, 1),), ((-3, -2),)) == ((0, 1), (-3, 0))
    assert positions(((0, 2), (-3, 0)), ((-1, 0),)) == ((4, 5),)
    assert positions(((0, 4),), ((-1, 0),)) is None


@given(st.lists(boxes(), min_size=1, max_size=4))
def test_every_box_is_in_one_of_the_pieces(several):
    parts = pieces(several, SHAPE)
    assert all(any(within(part, some) is not None for part in parts) for some in several)
    assert sum(share(part, SHAPE) for part in parts) <= len(parts)


@given(boxes(), boxes())
def test_a_box_within_another_holds_the_same_cells(outer, inner):
    rest = within(outer, inner)
    if rest is None:
        have = {axis: set(indices(runs, 12)) for axis, runs in inner}
        assert any(axis not in have or not have[axis] <= set(indices(runs, 12)) for axis, runs in outer)
        return
    assert cells(inner) <= cells(outer)
    axes = [indices(dict(outer).get(a, ((0, n),)), n) for a, n in enumerate(SHAPE)]
    picked = [indices(dict(rest).get(a, ((0, len(own)),)), len(own)) for a, own in enumerate(axes)]
    assert set(itertools.product(*[[own[i] for i in p] for own, p in zip(axes, picked, strict=True)])) == cells(inner)


def test_queries_stay_apart_from_keys_and_values():
    query, key, value = box({1: ((0, 1),), 2: ((0, 4),)}), box({2: ((4, 8),)}), box({2: ((8, 12),)})
    assert pieces([value, query, key], SHAPE) == (query, box({2: ((4, 12),)}))
    assert pieces([box({2: ((0, 4),)}), key, value], SHAPE) == (FULL,)
    assert pieces([box({1: ((0, 1),)}), box({1: ((1, 2),)})], SHAPE) == (box({1: ((0, 2),)}),)
    assert pieces([query, FULL], SHAPE) == (FULL,)
