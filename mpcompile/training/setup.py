"""The parts of a run: modules, optimiser and schedule, built and checked before the first step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpcompile.data import batches as data
from mpcompile.data import ranks
from mpcompile.errors import ConfigError, InputError
from mpcompile.ir.module import IRModule
from mpcompile.training import features, policies, sharding
from mpcompile.training.losses import parameter_groups
from mpcompile.training.options import Training

log = logging.getLogger(__name__)


@dataclass
class Setup:
    """The parts of a run.

    Attributes:
        original: the caller's student.
        student: the module whose weights are trained: ``original``, or a copy of it sharded over the ranks.
        module: the module that is run: the student, with block outputs if they are compared, and wrapped if there are
            several ranks.
        teacher: the dense model, with block outputs if the student has them.
        pair: the matched blocks whose outputs are compared, or None.
        ema: the moving average of the weights, or None.
        optimizer, scheduler: optimiser and learning rate schedule of the student.
        policy: the mask policy.
        sharded: True if weights, gradients and optimiser state are sharded over the ranks.
    """

    original: nn.Module
    student: nn.Module
    module: Any
    teacher: data.Teacher
    pair: features.FeaturePair | None
    ema: Any
    optimizer: Any
    scheduler: Any
    policy: policies.Frozen
    sharded: bool


def set_up(
    student: nn.Module, teacher: nn.Module, train: Any, training: Training, steps: int, device: torch.device, hint: str
) -> Setup:
    """Build the parts of a run.

    Args:
        student, teacher, train, training: arguments of :func:`mpcompile.distill`.
        steps: optimiser steps of the whole run.
        device: device of the student.
        hint: hint for errors in the training data.

    Raises:
        ConfigError: options that exclude each other.
        InputError: block outputs cannot be matched, or masks cannot move.
    """
    from timm.utils import ModelEmaV3

    sharded = ranks.active() and training.sharding == "fsdp"
    trained = copy.deepcopy(student) if sharded else student
    ema = None if training.ema is None else ModelEmaV3(student, decay=training.ema, use_warmup=True)
    pair = _pair(student, teacher, train, training, device, hint) if training.features else None
    module, target = (trained, teacher) if pair is None else (pair.student, pair.teacher)
    wrapped: Any = module
    if sharded:
        wrapped = sharding.shard(trained)
    elif ranks.active():
        ids = [device.index] if device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(module, device_ids=ids)
    optimizer = _optimizer(trained, training)
    scheduler = _scheduler(optimizer, training, steps)
    copies = () if pair is None else (pair.student.gm,)
    policy = policies.policy(training.method, trained, training.sr_ste_decay, copies)
    outputs = data.Teacher(target, training.cache)
    return Setup(student, trained, wrapped, outputs, pair, ema, optimizer, scheduler, policy, sharded)


def _pair(
    student: nn.Module, teacher: nn.Module, train: Any, training: Training, device: torch.device, hint: str
) -> features.FeaturePair:
    """Match the blocks of both models on the first training batch."""
    if training.cache:
        raise ConfigError("cache=True caches only logits", expected="features=0", found=training.features)
    first = next(data.epoch_batches(train, training.seed, 0, ranks.rank(), 0, None, hint))
    example = data.unpack(first, need_labels=False).images
    return features.pair(student, teacher, [example.to(device)])


def _optimizer(student: nn.Module, training: Training) -> Any:
    groups = parameter_groups(student, training.weight_decay)
    if training.optimizer == "sgd":
        momentum = training.momentum
        return torch.optim.SGD(groups, lr=training.lr, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=training.lr)


def _scheduler(optimizer: Any, training: Training, steps: int) -> Any:
    """Return timm's schedule: a linear warm-up, then a cosine to zero over the remaining steps."""
    from timm.scheduler import CosineLRScheduler

    ramp = training.warmup_steps(steps)
    if steps > 1 and ramp > steps / 2 and ranks.rank() == 0:
        text = "the learning rate rises for %d of %d steps; set warmup to a smaller share of all steps, such as 0.1"
        log.warning(text, ramp, steps)
    return CosineLRScheduler(
        optimizer,
        t_initial=steps - ramp,
        warmup_t=ramp,
        warmup_lr_init=training.lr / max(1, ramp),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def check_trainable(student: nn.Module) -> None:
    """Check that the student has something to recover from, and fp32 or fp64 weights to train.

    Raises:
        InputError: it has no masks and no merged tokens, no parameter that requires gradients, or weights in half
            precision.
    """
    merges = isinstance(student, IRModule) and "mpcompile.plan" in student.meta and bool(student.plan.tokens)
    if not policies.masked_weights(student) and not merges:
        raise InputError(
            "the student has no masks and no merged tokens: there is nothing to recover from",
            expected="a student from mpcompile.transform",
            found=type(student).__name__,
        )
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError("no parameter of the student can be trained", hint="student.requires_grad_(True)")
    for name, parameter in trained.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InputError(
                "weights in half precision cannot be trained",
                layer=name,
                expected="float32",
                found=parameter.dtype,
                hint="student.float(); precision='bf16' still computes in bf16",
            )


def check_readable(val: Iterable[Any] | None) -> None:
    """Check that ``val`` has batches and can be read again after every epoch.

    Raises:
        InputError: it is an iterator, or has no batch on any rank.
    """
    try:
        count = None if val is None else len(val)  # type: ignore[arg-type]
    except TypeError:  # a stream
        count = None
    counts = ranks.gather(count)  # a small set leaves some ranks without batches
    once = isinstance(val, Iterator)
    if once or (None not in counts and not sum(counts)):
        raise InputError(
            "val cannot be read again after every epoch",
            expected="a list of batches or a DataLoader",
            found="an iterator, which can be read once" if once else "no batch",
        )
