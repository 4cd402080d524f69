"""Allocate: a pattern for each layer, chosen to save a given share of the MACs (or bytes) with the least damage."""

from mpcompile.passes.allocate.decide import Allocate

__all__ = ["Allocate"]
