"""Norms: BatchNorm statistics of a region on the outputs of the reconstructed regions before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.calibration.stream import batch_norms
from mpcompile.data import ranks
from mpcompile.reconstruction.fit import Task
from mpcompile.reconstruction.regions import Region


def norms_of(gm: fx.GraphModule, region: Region) -> list[str]:
    """Return the names of a region's BatchNorms whose statistics can be re-estimated, in graph order."""
    inside = set(region.nodes)
    return [str(node.target) for node in batch_norms(gm) if node in inside]


def statistics(gm: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the running statistics of BatchNorms, by name."""
    return {
        f"{name}.{key}": getattr(gm.get_submodule(name), key)
        for name in names
        for key in ("running_mean", "running_var")
    }


@torch.no_grad()
def reestimate(gm: nn.Module, names: Sequence[str], task: Task, places: Tensor, batch: int, shared: bool) -> None:
    """Set mean and variance of BatchNorms to those of their inputs on some samples, one BatchNorm after the other.

    Args:
        gm: the student.
        names: from :func:`norms_of`.
        task: the region and its inputs.
        places: the samples.
        batch: samples that run at a time.
        shared: use the samples of all ranks.
    """
    for name in names:
        module: Any = gm.get_submodule(name)
        sums: list[Tensor] = []

        def add(_: nn.Module, inputs: Any, sums: list[Tensor] = sums) -> None:
            x = inputs[0].transpose(0, 1).flatten(1).double()
            part = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
            sums[:] = [sums[0] + part] if sums else [part]

        hook = module.register_forward_pre_hook(add)
        try:
            for index in places.split(batch):
                task.output(index)
        finally:
            hook.remove()
        if shared:
            ranks.average(sums[0])
        count, total, square = sums[0]
        mean = total / count
        variance = (square / count - mean.square()).clamp(min=0) * (count / (count - 1).clamp(min=1))
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)
