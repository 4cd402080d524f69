"""Distillation with frozen masks: a masked student learns back what its dense teacher knows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile.errors import InputError
from mpcompile.graph import training_flags
from mpcompile.layers import MaskedConv2d, MaskedLinear


def apply_masks(student: nn.Module) -> int:
    """Set every masked weight to exactly zero in storage; returns the number of masked layers."""
    masked = [m for m in student.modules() if isinstance(m, (MaskedLinear, MaskedConv2d))]
    for layer in masked:
        layer.apply_mask()
    return len(masked)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and kernels decay; biases, norms, position embeddings and class tokens don't."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() >= 2 and not any(word in name for word in ("pos_embed", "cls_token", "reg_token"))
            (decay if plain else rest).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float, smoothing: float
) -> Tensor:
    """(1 - a) CE(labels, smoothed) + a T^2 KL(teacher / T || student / T), on logits (batch, classes)."""
    hard = F.cross_entropy(student, labels, label_smoothing=smoothing)
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - alpha) * hard + alpha * temperature**2 * soft


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int = 3,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    alpha: float = 0.5,
    temperature: float = 2.0,
    smoothing: float = 0.1,
    warmup: float = 0.1,
    progress: bool = True,
) -> list[float]:
    """Train the student in place, masks frozen and applied again after every step.

    Args:
        student: a module from :func:`mpcompile.transform`; left in the mode it was in.
        teacher: the dense model; run in eval mode, not changed.
        train: (input, label) batches, iterated once an epoch; needs a length.
        lr: peak learning rate of AdamW, reached after the ``warmup`` share of the steps, then cosine to zero.
        alpha, temperature, smoothing: see :func:`distillation_loss`.

    Returns:
        Mean loss of each epoch. Source: arXiv 2606.02608, fine-tuning recipe.

    Raises:
        InputError: no batches, a student without masks and merges to recover from, or a loss that is not finite.
    """
    try:
        steps = epochs * len(train)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError("train has no length", expected="a list of batches or a DataLoader") from error
    if not steps:
        raise InputError("there is nothing to train on", expected="at least one batch and one epoch", found="none")
    optimizer = torch.optim.AdamW(parameter_groups(student, weight_decay), lr=lr)
    ramp = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / ramp, 0.5 * (1 + math.cos(math.pi * max(0, step - ramp) / max(1, steps - ramp)))),
    )
    history = []
    with training_flags(student, True), training_flags(teacher, False):
        for epoch in range(epochs):
            losses = []
            bar = tqdm(train, desc=f"distil {epoch + 1}/{epochs}", unit="batch", disable=None if progress else True)
            for images, labels in bar:
                with torch.no_grad():
                    target = teacher(images)
                loss = distillation_loss(student(images), target, labels, alpha, temperature, smoothing)
                if not bool(torch.isfinite(loss)):
                    raise InputError("the loss is not finite", hint=f"lower the learning rate (now {lr:g})")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                apply_masks(student)
                losses.append(float(loss.detach()))
            history.append(sum(losses) / len(losses))
    return history
