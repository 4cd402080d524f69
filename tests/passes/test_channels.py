"""Axes of channels: atoms, and the table of rules."""

import doctest

import pytest
import torch
from torch import nn

from mpcompile.capture.importers import import_model
from mpcompile.passes.channels import atoms, axes
from mpcompile.passes.channels.atoms import Atoms
from mpcompile.passes.channels.rules import RULES


@pytest.mark.parametrize("module", [atoms, axes])
def test_examples(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed


def test_every_rule_is_for_an_aten_operator():
    assert [name for name in RULES if not hasattr(torch.ops.aten, name)] == []


def test_axes_that_do_not_tile_are_frozen():
    table = Atoms()
    a, b = table.new(6), table.new(4)
    table.unify([a], [b])
    assert table.frozen[a] and table.frozen[b]


def test_slices_of_a_frozen_atom_are_frozen():
    table = Atoms()
    whole, selector = table.new(8), table.new(3)
    parts = table.slice(whole, selector)
    assert len(parts) == 3 and table.slice(whole, table.new(3)) is None
    table.freeze([whole])
    assert all(table.frozen[part] for part in parts)


class Rolled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.first(x).roll(1, -1))


def test_an_operator_without_a_rule_freezes_its_operands_and_is_named():
    x = torch.randn(2, 8)
    analysis = axes.analyse(import_model(Rolled(), x).gm, [x])
    assert analysis.unknown == {"roll"}
    for dims in (analysis.dims["first.weight"][0], analysis.dims["second.weight"][1]):
        assert all(analysis.atoms.frozen[a] for a in analysis.atoms.expand(dims))
