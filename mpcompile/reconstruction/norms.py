"""Norms: BatchNorm statistics of a region on the outputs of the reconstructed regions before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from mpcompile.calibration.norms import BatchNorm, Sums, batch_norms, write
from mpcompile.data import ranks
from mpcompile.reconstruction.activations.walk import between, extract, run_part
from mpcompile.reconstruction.fit import Task
from mpcompile.reconstruction.regions import Region


def norms_of(gm: fx.GraphModule, region: Region) -> list[BatchNorm]:
    """Return a region's BatchNorms whose statistics can be re-estimated, in graph order."""
    inside = set(region.nodes)
    return [norm for norm in batch_norms(gm) if norm.node in inside]


@torch.no_grad()
def reestimate(
    gm: fx.GraphModule, region: Region, norms: Sequence[BatchNorm], task: Task, places: Tensor, batch: int, shared: bool
) -> None:
    """Set mean and variance of BatchNorms to those of their inputs on some samples, one BatchNorm after the other.

    Args:
        gm: the student.
        region: the region.
        norms: from :func:`norms_of`.
        task: the values that the region reads.
        places: the samples.
        batch: samples that run at a time.
        shared: use the samples of all ranks.
    """
    for norm in norms:
        nodes, _ = between(gm, [norm.source], region.inputs)
        part = extract(gm, nodes, region.inputs, [norm.source])
        sums = Sums()
        for index in places.split(batch):
            sums.add(run_part(part, task.values(index))[0])
        if shared and sums.sums is not None:
            ranks.average(sums.sums)
        write(gm, sums.statistics(norm))
