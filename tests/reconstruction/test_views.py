"""Views: what they keep of their images, what they depend on, and inputs that have none."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from mpcompile.errors import ConfigError, InputError
from mpcompile.reconstruction.views import Views


def images(*sizes, channels=3, low=0.0, high=1.0, side=(32, 24)):
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, channels, *side) for size in sizes]
    return [[torch.rand(shape, generator=generator) * (high - low) + low] for shape in shapes]


def test_rounds_depend_on_seed_and_number_alone():
    batches = images(4, 3, 1)
    views = Views(batches, 3, 7, mix=0.5)
    assert (views.images, views.rounds, len(views), views.note) == (8, 3, 24, None)
    assert all(a[0] is b[0] for a, b in zip(views.round(0), batches, strict=True))
    in_order = [[batch[0] for batch in views.round(number)] for number in range(3)]
    again = Views(iter(batches), 3, 7, mix=0.5)  # what can be read once is held
    last_first = [[batch[0] for batch in again.round(number)] for number in (2, 1, 0)][::-1]
    for a, b in zip(in_order, last_first, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(a[0], b) for a, b in zip(views, itertools.chain(*in_order), strict=True))
    different = [in_order[1], in_order[2], [batch[0] for batch in Views(batches, 2, 8, mix=0.5).round(1)]]
    for index, batch in enumerate(in_order[0]):
        assert all(not torch.equal(batch, other[index]) for other in different)
        assert not torch.equal(different[0][index], different[1][index])
        assert not torch.equal(different[0][index], different[2][index])


def test_without_the_images_every_round_is_augmented():
    batches = images(4)
    views = Views(batches, 2, 0, first=False)
    assert len(views) == 8 and not torch.equal(next(views.round(0))[0], batches[0][0])


def test_random_states_stay_as_they_were():
    views = Views(images(3, 2), 2, 0, mix=1.0)
    states = []
    for run in (False, True):
        random.seed(1), np.random.seed(2), torch.manual_seed(3)
        for _ in views.round(1) if run else range(2):
            states.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert states[:2] == states[2:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_views_have_the_form_and_range_of_their_images(dtype):
    channels = torch.tensor([-3.0, 0.0, 40.0]).view(3, 1, 1)
    batches = [[(batch[0] + channels).to(dtype, memory_format=torch.channels_last)] for batch in images(1, 4, 3)]
    whole = torch.cat([batch[0] for batch in batches])
    for (view,), (image,) in zip(Views(batches, 2, 0, mix=0.5, color=0.5).round(1), batches, strict=True):
        assert (view.shape, view.dtype, view.stride()) == (image.shape, dtype, image.stride())
        near = 0.0 if dtype is torch.float64 else 0.25  # the spacing of bfloat16 at 40
        assert bool((view.amin((0, 2, 3)) >= whole.amin((0, 2, 3)) - near - 1e-9).all())
        assert bool((view.amax((0, 2, 3)) <= whole.amax((0, 2, 3)) + near + 1e-9).all())


def test_greyscale_and_several_sizes():
    batches = images(2, channels=1) + images(1, channels=1, side=(16, 40))
    views = [view for (view,) in Views(batches, 2, 0, mix=1.0).round(1)]
    assert [tuple(view.shape) for view in views] == [(2, 1, 32, 24), (1, 1, 16, 40)]
    assert all(bool(view.isfinite().all()) for view in views)


def test_normalisation_is_undone_where_it_fits():
    grey = [[torch.full((2, 3, 16, 16), -0.5)]]  # 0.25, normalised by 0.5 and 0.5
    brighter = next(Views(grey, 2, 0, color=0.5, mean=[0.5] * 3, std=[0.5] * 3).round(1))[0]
    assert 0.01 < float((brighter + 0.5).abs().max()) <= 0.25 + 1e-6  # half of the distance to black
    for mean, std in ((None, None), ([0.1] * 3, [0.5] * 3), ([0.5], [0.5])):  # the range of one grey is a point
        assert torch.equal(next(Views(grey, 2, 0, color=0.5, mean=mean, std=std).round(1))[0], grey[0][0])


@pytest.mark.parametrize("sizes", [(4,), (3,), (2, 1), (1,)])
def test_mixes_are_of_two_images_of_the_set(sizes):
    total = sum(sizes)
    levels = torch.arange(total, dtype=torch.float32)
    parts = levels.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).split(sizes)
    views = Views([[part] for part in parts], 9, 0, mix=1.0, crop=(1.0, 1.0), color=0.0)
    changed, partners = torch.zeros(total), set()
    for number in range(1, 9):
        for own, view in zip(levels, torch.cat([batch[0] for batch in views.round(number)]), strict=True):
            values = view.unique()
            far = values[(values - own).abs() > 1e-4]
            changed[int(own)] += len(far) > 0
            assert len(values) <= 2 and bool(((values > -1e-4) & (values < total - 1 + 1e-4)).all())
            if len(values) == 2:  # a rectangle of another image
                partners.add((int(own), round(float(far[0]))))
    alone = sizes[0] == 1  # the first batch has no other image
    assert bool((changed[alone:] >= 5).all()) and not changed[:alone].any()
    assert alone or len({own for own, _ in partners}) == total
    assert len(sizes) > 1 or total == 1 or len(partners) > total  # other partners in other rounds


def test_inputs_that_are_no_images_have_no_views():
    image = torch.rand(2, 3, 16, 16)
    cases = {
        "a batch has 2 tensors, not images alone": [image, torch.ones(2, 4)],
        "the inputs are int64, not images in floating point": [torch.ones(2, 5, dtype=torch.int64)],
        "the inputs (2, 5, 8) are not images (batch, 1 or 3, 8 or more, 8 or more)": [torch.ones(2, 5, 8)],
        "the inputs (2, 4, 16, 16) are not images (batch, 1 or 3, 8 or more, 8 or more)": [torch.ones(2, 4, 16, 16)],
        "the inputs (2, 3, 4, 4) are not images (batch, 1 or 3, 8 or more, 8 or more)": [torch.ones(2, 3, 4, 4)],
    }
    for problem, batch in cases.items():
        views = Views([batch], 3, 0, first=False)
        assert (views.note, views.rounds, len(views)) == (f"no views: {problem}", 1, 2)
        assert list(views) == [batch]
    assert Views([[torch.ones(2, 5)]], 1, 0).note is None  # none were asked for
    mixed = Views([[image], [torch.rand(2, 1, 16, 16)]], 2, 0)
    assert mixed.note == "no views: the images differ in their number of channels" and len(mixed) == 4


def test_images_inside_a_dict_and_beside_parameters():
    weight, images = nn.Parameter(torch.ones(3)), torch.rand(2, 3, 16, 16)
    batch = [{"pixel_values": images, "interpolate": None}, weight, True]
    view = next(Views([batch], 2, 0).round(1))
    assert view[1] is weight and view[2] is True and view[0]["interpolate"] is None
    assert view[0]["pixel_values"].shape == images.shape and not torch.equal(view[0]["pixel_values"], images)
    assert batch[0]["pixel_values"] is images


def test_options_out_of_range_and_no_images():
    for options in ({"rounds": 0}, {"mix": 1.5}, {"crop": (0.0, 1.0)}, {"crop": (0.9, 0.5)}, {"color": float("nan")}):
        with pytest.raises(ConfigError, match="is out of range"):
            Views(images(1), **{"rounds": 2, "seed": 0, **options})
    with pytest.raises(InputError, match="there are no images"):
        Views([], 2, 0)
