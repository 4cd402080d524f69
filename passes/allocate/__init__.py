"""Allocate: a pattern for each layer, so that a share of the MACs (or bytes) is saved at the least damage."""

from mpcompile.passes.allocate.decide import Allocate

__all__ = ["Allocate"]
