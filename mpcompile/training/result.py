"""The result of a run: its figures, and the final weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from mpcompile.calibration.norms import batch_norms, gathering, own_statistics
from mpcompile.data import batches as data
from mpcompile.data import ranks
from mpcompile.errors import InputError
from mpcompile.ir.numerics import training_flags
from mpcompile.measure.evaluate import evaluate
from mpcompile.training import policies, sharding
from mpcompile.training.options import Training
from mpcompile.training.setup import Setup


@dataclass
class Distilled:
    """Figures of a run.

    Attributes:
        losses: mean training loss of each epoch, over all ranks.
        accuracy: top-1 accuracy on ``val`` after each epoch, of the weights that would be the result; one more at the
            end if BatchNorm statistics were re-estimated. With ``sharding="fsdp"``, only the one at the end.
        steps: optimiser steps.
        images: training images seen on all ranks, repetitions included.
        resumed: the step at which this process resumed an earlier run, or 0.
    """

    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)


def preview(setup: Setup, training: Training) -> nn.Module:
    """Return the model that would be the result if training ended here; the student keeps training unchanged."""
    if training.method == "frozen":
        return setup.student if setup.ema is None else setup.ema.module
    model = copy.deepcopy(setup.student)
    if setup.ema is not None:
        model.load_state_dict(setup.ema.module.state_dict())
    setup.policy.finish(model)
    return model


def accuracy(model: nn.Module, val: Iterable[Any], hint: str) -> float:
    """Return the top-1 accuracy on ``val``, after copying the first rank's buffers to all ranks.

    Raises:
        InputError: evaluation failed; the message ends with ``hint``.
    """
    ranks.share_buffers(model)
    try:
        return evaluate(model, val)
    except InputError as error:
        raise InputError(f"evaluation failed: {error}. {hint}") from error


def finish(setup: Setup, training: Training, train: Any, device: torch.device, hint: str) -> None:
    """Turn the student into the result: averaged weights if there are any, masks applied, BatchNorm re-estimated."""
    if setup.ema is not None:
        setup.student.load_state_dict(setup.ema.module.state_dict())
    setup.policy.finish(setup.student)
    if setup.sharded:
        setup.original.load_state_dict(sharding.whole_weights(setup.student))
        policies.apply_masks(setup.original)
    ranks.share_buffers(setup.original)
    if training.bn_batches:
        stream = data.epoch_batches(train, training.seed, training.epochs, ranks.rank(), 0, None, hint)
        reestimate(setup.original, itertools.islice(stream, training.bn_batches), device)


def reestimate(model: nn.Module, stream: Iterator[Any], device: torch.device) -> None:
    """Replace BatchNorm statistics by plain averages over a few batches and all ranks, in eval mode otherwise."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    tensors = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(training_flags(model, False))
        stack.enter_context(torch.no_grad())
        start: Any = None
        if isinstance(model, fx.GraphModule):
            calls = [norm for norm in batch_norms(model) if norm.reads is not None]
            tensors += [tensor for norm in calls for tensor in own_statistics(model, norm).values()]
            start = stack.enter_context(gathering(model, calls))
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for place, batch in enumerate(stream):
            if start is not None:
                start(place)
            data.forward(model, data.unpack(batch, need_labels=False).images.to(device), "student")
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for tensor in tensors:
        ranks.average(tensor)
