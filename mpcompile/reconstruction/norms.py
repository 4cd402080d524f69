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


@torch.no_grad()
def match(walk: Walk, region: Region, norms: Sequence[BatchNorm], places: Tensor, batch: int, shared: bool) -> None:
    """Give the outputs of BatchNorms the means and variances of the dense model's, one BatchNorm after the other.

    Args:
        walk: student and twin, at the region.
        region: the region.
        norms: from :func:`norms_of`.
        places: samples on which means and variances are taken.
        batch: samples that run at a time.
        shared: use the samples of all ranks.
    """
    for norm in norms:
        ours = _sums(walk, region, norm, places, batch, shared, dense=False)
        theirs = _sums(walk, region, norm, places, batch, shared, dense=True)
        mean, variance = own_statistics(walk.twin, norm).values()
        write(walk.student, matched(norm, ours, theirs, (mean, variance)))


def _sums(walk: Walk, region: Region, norm: BatchNorm, places: Tensor, batch: int, shared: bool, dense: bool) -> Sums:
    """Return the sums over a BatchNorm's inputs in one of the models."""
    gm, side = (walk.twin, walk.targets) if dense else (walk.student, walk.values)
    nodes, _ = between(walk.student, [norm.source], region.inputs)
    groups: list[list[fx.Node]] = [nodes, list(region.inputs), [norm.source]]
    if dense:
        groups = [[walk.twin_of[node] for node in group] for group in groups]
    part, sums = extract(gm, *groups), Sums()
    for index in places.split(batch):
        sums.add(run_part(part, [side[node].take(index, walk.device) for node in region.inputs])[0])
    if shared and sums.sums is not None:
        ranks.average(sums.sums)
    return sums
