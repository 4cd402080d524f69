"""The distillation loss, and the parameters that weight decay applies to."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.data.labels import whole_numbers

_UNDECAYED = ("pos_embed", "cls_token", "dist_token", "reg_token", "relative_position_bias_table")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimiser groups: matrices and kernels decay; biases, norms, position embeddings and tokens do not."""
    from timm.optim import param_groups_weight_decay

    undecayed = [name for name, _ in model.named_parameters() if any(word in name for word in _UNDECAYED)]
    return list(param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed))


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, alpha: float, temperature: float, smoothing: float
) -> Tensor:
    """Return (1 - a) CE(smoothed labels, student) + a T^2 KL(teacher / T || student / T), a scalar.

    Computed in fp32. Source: arXiv 2606.02608, fine-tuning recipe (a = 0.5, T = 2, smoothing 0.1).

    Args:
        student, teacher: logits (batch, classes).
        labels: (batch,) of any integer type; None leaves out the first term.
        alpha: a, 0 to 1.
        temperature: T, applied to both softmaxes in the second term.
        smoothing: label smoothing, below 1.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> float(distillation_loss(logits, logits, torch.tensor([0]), 1.0, 2.0, 0.0))
        0.0
    """
    from timm.loss import LabelSmoothingCrossEntropy

    student, teacher = student.float(), teacher.float()
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    loss = alpha * temperature**2 * soft
    if alpha < 1 and labels is not None:
        loss = loss + (1 - alpha) * LabelSmoothingCrossEntropy(smoothing)(student, whole_numbers(labels))
    return loss
