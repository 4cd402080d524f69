"""What a model gets right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mpcompile.data import batches as data
from mpcompile.data import ranks
from mpcompile.data.labels import check_range
from mpcompile.errors import InputError
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import device_of


@torch.no_grad()
def evaluate(model: nn.Module, val: Iterable[Any]) -> float:
    """Share of labelled batches (images, labels, ...) that the model gets right, over the shards of all ranks.

    Raises:
        InputError: nothing to evaluate on, batches without labels, labels out of range, or images that the model
            doesn't take.
    """
    device = device_of(model)
    right = seen = 0.0
    with training_flags(model, False):
        for item in data.read(val, "evaluation"):
            batch = data.unpack(item, need_labels=True)
            assert batch.labels is not None
            logits = data.forward(model, batch.images.to(device), "model")
            data.check_are_logits(logits, "model")
            check_range(batch.labels, logits.shape[1])
            right += float((logits.argmax(1).cpu() == batch.labels.cpu()).sum())
            seen += len(batch.labels)
    right, seen = ranks.total(right, seen, device=device)
    if not seen:
        raise InputError("there is nothing to evaluate on", expected="at least one batch", found="none")
    return right / seen
