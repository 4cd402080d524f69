"""Boxes: parts of a tensor, given by the indices that they hold along some of its axes.

Indices are runs ``(start, stop)``. A run with a negative start counts from the end, as slices do, and ``(-2, 0)`` are
the last two: the number of tokens may vary from call to call. Counts of indices are therefore always known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Run = tuple[int, int]
Runs = tuple[Run, ...]
Box = tuple[tuple[int, Runs], ...]
"""Pairs of an axis and its runs, by axis; an axis without an entry is whole."""

FULL: Box = ()


def box(axes: Mapping[int, Runs]) -> Box:
    """Return a box from the runs of each axis that is not whole.

    Example:
        >>> box({2: ((0, 4),), 1: ((0, 1),)})
        ((1, ((0, 1),)), (2, ((0, 4),)))
    """
    return tuple(sorted(axes.items()))


def count(runs: Runs) -> int:
    """Return how many indices runs hold.

    Example:
        >>> count(((0, 2), (-1, 0)))
        3
    """
    return sum(stop - start for start, stop in runs)


def union(*several: Runs) -> Runs:
    """Return the indices of several runs, in ascending order, those counted from the end last.

    Example:
        >>> union(((4, 6),), ((0, 1), (-1, 0)), ((1, 3),))
        ((0, 3), (4, 6), (-1, 0))
    """
    result: list[Run] = []
    for start, stop in sorted((run for runs in several for run in runs), key=lambda run: (run[0] < 0, run)):
        if result and start <= result[-1][1] and (start < 0) == (result[-1][0] < 0):
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        else:
            result.append((start, stop))
    return tuple(result)


def positions(outer: Runs, inner: Runs) -> Runs | None:
    """Return where the indices of ``inner`` are among those of ``outer``; None if some are not.

    Example:
        >>> positions(((0, 1), (4, 8)), ((5, 7),))
        ((2, 4),)
    """
    found: list[Runs] = []
    for start, stop in inner:
        ahead = 0
        for first, last in outer:
            if first <= start and stop <= last and (first < 0) == (start < 0):
                found.append(((ahead + start - first, ahead + stop - first),))
                break
            ahead += last - first
        else:
            return None
    return union(*found)


def within(outer: Box, inner: Box) -> Box | None:
    """Return the box ``inner`` of a tensor as a box of its part ``outer``; None if it is not contained in it."""
    have, relative = dict(inner), dict(inner)
    for axis, runs in outer:
        if axis not in have:
            return None
        place = positions(runs, have[axis])
        if place is None:
            return None
        relative[axis] = place
        if place == ((0, count(runs)),):
            del relative[axis]
    return box(relative)


def without(some: Box, axes: Iterable[int]) -> Box:
    """Return a box that is whole along the given axes."""
    gone = set(axes)
    return tuple((axis, runs) for axis, runs in some if axis not in gone)


def share(some: Box, shape: Sequence[int]) -> float:
    """Return which share of the elements of a tensor a box holds.

    Example:
        >>> share(((1, ((0, 1),)),), (2, 4, 8))
        0.25
    """
    result = 1.0
    for axis, runs in some:
        result *= count(runs) / shape[axis]
    return result


def _along(boxes: Sequence[Box], axis: int, shape: Sequence[int]) -> Runs | None:
    """Return the union of boxes along one axis; None if it is the whole axis."""
    parts = [dict(each).get(axis) for each in boxes]
    if any(part is None for part in parts):
        return None
    runs = union(*[part for part in parts if part is not None])
    return None if count(runs) >= shape[axis] else runs


def _bounding(boxes: Sequence[Box], shape: Sequence[int]) -> Box:
    runs = {axis: _along(boxes, axis, shape) for axis in range(len(shape))}
    return box({axis: each for axis, each in runs.items() if each is not None})


def _disjoint(several: Sequence[Runs]) -> bool:
    plain = [runs for runs in several if all(start >= 0 for start, _ in runs)]
    return len(plain) == len(several) and count(union(*several)) == sum(map(count, several))


def pieces(boxes: Iterable[Box], shape: Sequence[int]) -> tuple[Box, ...]:
    """Return boxes to compute so that each of the given ones is in one of them, and little is computed twice.

    Boxes that hold different indices of one axis (queries, and keys with values) stay apart if they also differ along
    another one; all others are joined.

    Example:
        Queries of one token; keys and values of all, of 4 channels each:

        >>> query, key, value = (((1, ((0, 1),)), (2, ((0, 4),))), ((2, ((4, 8),)),), ((2, ((8, 12),)),))
        >>> pieces([query, key, value], (2, 5, 12))
        (((1, ((0, 1),)), (2, ((0, 4),))), ((2, ((4, 12),)),))
    """
    several = list(dict.fromkeys(boxes))
    whole = _bounding(several, shape)
    if whole == FULL and FULL in several:
        return (FULL,)
    for axis in reversed(range(len(shape))):
        groups: dict[Runs, list[Box]] = {}
        for each in several:
            groups.setdefault(dict(each).get(axis, ()), []).append(each)
        if () in groups or len(groups) < 2 or not _disjoint(list(groups)):
            continue
        others: dict[Box, list[Runs]] = {}  # what a group holds along the other axes -> its runs along this one
        for runs, members in groups.items():
            others.setdefault(without(_bounding(members, shape), [axis]), []).append(runs)
        if len(others) > 1:
            return tuple(sorted(box({**dict(rest), axis: union(*each)}) for rest, each in others.items()))
    return (whole,)
