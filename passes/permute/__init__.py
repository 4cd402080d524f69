"""Permute: reorder channels so that the masks keep more energy, by reordering the weights themselves."""

from mpcompile.passes.permute.channel_classes import ChannelClass, Orders, classes, fold
from mpcompile.passes.permute.decide import Permutation, Permute

__all__ = ["ChannelClass", "Orders", "Permutation", "Permute", "classes", "fold"]
