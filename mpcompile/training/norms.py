"""BatchNorm statistics of a trained student."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mpcompile.data import batches as data
from mpcompile.data import ranks
from mpcompile.ir.numerics import training_flags


def reestimate(model: nn.Module, stream: Iterator[Any], device: torch.device) -> None:
    """BatchNorm statistics as plain averages over a few batches, averaged over all ranks; all else as in evaluation."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    with training_flags(model, False), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for item in stream:
            data.forward(model, data.unpack(item, need_labels=False).images.to(device), "student")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for tensor in (norm.running_mean, norm.running_var):
            assert tensor is not None
            ranks.average(tensor)
