"""Top-1 accuracy of one model on labelled batches, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mpcompile.data import batches as data
from mpcompile.data import ranks
from mpcompile.data.outputs import logits_of
from mpcompile.errors import InputError
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import device_of
from mpcompile.measure.accuracy import top1_hits


@torch.no_grad()
def evaluate(model: nn.Module, val: Iterable[Any]) -> float:
    """Return the top-1 accuracy, 0 to 1, on labelled batches (images, labels, ...), over the shards of all ranks.

    Raises:
        InputError: there are no batches, batches without labels, labels out of range, or images that the model does
            not accept.

    Example:
        >>> evaluate(nn.Identity(), [(torch.eye(2), torch.tensor([0, 0]))])
        0.5
    """
    device = device_of(model)
    correct = count = 0.0
    with training_flags(model, False):
        for item in data.read(val, "evaluation"):
            batch = data.unpack(item, need_labels=True)
            assert batch.labels is not None
            logits = logits_of(data.forward(model, batch.images.to(device), "model"))
            correct += float(top1_hits(logits, batch.labels).sum())
            count += len(batch.labels)
    correct, count = ranks.total(correct, count, device=device)
    if not count:
        raise InputError("there is nothing to evaluate on", expected="at least one batch", found="none")
    return correct / count
