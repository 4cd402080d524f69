"""Norms: BatchNorm statistics of a region on the outputs of the reconstructed regions before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mpcompile.calibration.norms import BatchNorm, Sums, batch_norms, matched, own_statistics, write
from mpcompile.data import ranks
from mpcompile.reconstruction.activations.walk import Walk, between, extract, run_part
from mpcompile.reconstruction.regions import Region


def norms_of(gm: fx.GraphModule, region: Region) -> list[BatchNorm]:
    """Return a region's BatchNorms whose statistics can be re-estimated, in graph order."""
    inside = set(region.nodes)
    return [norm for norm in batch_norms(gm) if norm.node in inside]


class Matching:
    """Gives the outputs of a region's BatchNorms the dense outputs' means and variances, as often as it is called.

    Args:
        walk: student and twin, at the region.
        region: the region.
        norms: from :func:`norms_of`.
        places: samples on which means and variances are taken.
        batch: samples that run at a time.
        shared: use the samples of all ranks.
    """

    def __init__(
        self, walk: Walk, region: Region, norms: Sequence[BatchNorm], places: Tensor, batch: int, shared: bool
    ) -> None:
        self.walk, self.region, self.norms = walk, region, norms
        self.places, self.batch, self.shared = places, batch, shared
        self.dense = [self._sums(norm, dense=True) for norm in norms]  # the dense model stays as it is

    @torch.no_grad()
    def __call__(self) -> None:
        """Match one BatchNorm after the other, each behind those before it."""
        for norm, theirs in zip(self.norms, self.dense, strict=True):
            mean, variance = own_statistics(self.walk.twin, norm).values()
            write(self.walk.student, matched(norm, self._sums(norm, dense=False), theirs, (mean, variance)))

    @torch.no_grad()
    def _sums(self, norm: BatchNorm, dense: bool) -> Sums:
        """Return the sums over a BatchNorm's inputs in one of the models."""
        walk, inputs = self.walk, self.region.inputs
        gm, side = (walk.twin, walk.targets) if dense else (walk.student, walk.values)
        nodes, _ = between(walk.student, [norm.source], inputs)
        groups: list[list[fx.Node]] = [nodes, list(inputs), [norm.source]]
        if dense:
            groups = [[walk.twin_of[node] for node in group] for group in groups]
        part, sums = extract(gm, *groups), Sums()
        for index in self.places.split(self.batch):
            sums.add(run_part(part, [side[node].take(index, walk.device) for node in inputs])[0])
        if self.shared and sums.sums is not None:
            ranks.average(sums.sums)
        return sums
