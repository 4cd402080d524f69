"""Training options. The same fields serve Python, recipes in YAML and the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpcompile._moved import renamed
from mpcompile.config import only_fields
from mpcompile.errors import ConfigError
from mpcompile.io.fields import check_fields

__getattr__ = renamed(__name__, {"check_type": "io.fields.check_type"})
OPTIMIZERS = ("adamw", "sgd")
METHODS = ("frozen", "sr-ste", "gradual")
PRECISIONS = ("fp32", "bf16")
SHARDINGS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Training:
    """Options of :func:`mpcompile.distill`.

    Attributes:
        epochs: passes over the training data.
        optimizer: ``"adamw"`` or ``"sgd"`` (with Nesterov ``momentum``).
        lr: peak learning rate, reached after the warm-up and followed by a cosine to zero.
        weight_decay: decay of matrices and kernels; biases, norms, position embeddings and class tokens do not decay.
        momentum: momentum of SGD.
        warmup: steps during which the learning rate rises linearly: below 1 a share of all steps, otherwise a number.
        alpha: weight of the teacher's term in the loss, 0 to 1; that of the labels is 1 - alpha; with 1, labels are
            ignored.
        temperature: temperature of both softmaxes in the teacher's term of the loss.
        smoothing: label smoothing, below 1.
        features: weight of the relative squared error of block outputs, 0 for none.
        feature_epochs: number of epochs, from the first, with that term; None for all.
        accumulate: batches per optimiser step, whose gradients are accumulated.
        clip: maximum norm of the gradient, or None.
        ema: decay of an exponential moving average of the weights, which becomes the result; None for none.
        precision: ``"bf16"`` runs both models under autocast; weights and optimiser state stay fp32.
        bn_batches: training batches over which BatchNorm statistics are re-estimated at the end; 0 for none.
        freeze_bn: BatchNorms normalise by their running statistics, as in evaluation, and keep them; their weights and
            biases are trained. None: if the student was reconstructed and ``bn_batches`` is 0. Such a student starts
            close to the teacher, and normalising by small batches would move it away first.
        method: policy for the masks. ``"frozen"`` keeps them. ``"sr-ste"`` (Zhou et al. 2021) trains dense weights
            through masks that follow their magnitude; ``"gradual"`` (Kao et al. 2022) fades removed weights out over
            the first half of training. The last two are for comparison, and start from dense weights.
        sr_ste_decay: decay of removed weights towards zero in ``"sr-ste"``.
        cache: cache the teacher's logits of each training image; requires the same images in every epoch, and batches
            (images, labels, index).
        sharding: with several processes, ``"ddp"`` or ``"fsdp"`` (weights, gradients and optimiser state are sharded).
        checkpoint_steps: optimiser steps between checkpoints, in addition to one after each epoch; 0 for none.
        seed: seed of shuffling, augmentation and dropout; generators are seeded in every epoch so that an interrupted
            run can resume.

    Raises:
        ConfigError: an unknown option or an invalid value.

    Example:
        >>> Training(lr=3e-4, features=1.0).epochs
        3
    """

    epochs: int = 3
    optimizer: str = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.01
    momentum: float = 0.9
    warmup: float = 0.1
    alpha: float = 0.5
    temperature: float = 2.0
    smoothing: float = 0.1
    features: float = 0.0
    feature_epochs: int | None = None
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    precision: str = "fp32"
    bn_batches: int = 0
    freeze_bn: bool | None = None
    method: str = "frozen"
    sr_ste_decay: float = 2e-4
    cache: bool = False
    sharding: str = "ddp"
    checkpoint_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, *_RANGES)
        named = {"optimizer": OPTIMIZERS, "precision": PRECISIONS, "method": METHODS, "sharding": SHARDINGS}
        for name, allowed in named.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"option {name!r} has no such value",
                    expected=f"one of {', '.join(allowed)}",
                    found=getattr(self, name),
                )
        if self.freeze_bn and self.bn_batches:
            raise ConfigError(
                "freeze_bn keeps the statistics that bn_batches would replace",
                expected="bn_batches=0 with freeze_bn=True",
                found=f"bn_batches={self.bn_batches}",
            )
        if self.sharding == "fsdp" and (self.method != "frozen" or self.features or self.ema is not None):
            raise ConfigError(
                "sharding='fsdp' does not support feature matching, a moving average or moving masks",
                expected="method='frozen', features=0 and ema=None",
                found=f"method={self.method!r}, features={self.features:g}, ema={self.ema}",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, base: Training | None = None) -> Training:
        """Return the options in a mapping, such as a recipe's ``train``; the rest come from ``base`` or the defaults.

        Raises:
            ConfigError: an unknown option (the message lists the valid ones), or an invalid value.
        """
        only_fields(cls, options or {}, "distillation has no option")
        return dataclasses.replace(base or cls(), **dict(options or {}))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    def warmup_steps(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of ``steps`` steps, at most ``steps - 1``."""
        requested = self.warmup * steps if self.warmup < 1 else self.warmup
        return max(0, min(round(requested), steps - 1))


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("epochs", 1, math.inf),
    ("lr", 0, math.inf),
    ("weight_decay", 0, math.inf),
    ("momentum", 0, 1),
    ("warmup", 0, math.inf),
    ("alpha", 0, 1),
    ("temperature", 1e-3, 1e3),
    ("smoothing", 0, 0.999),
    ("features", 0, math.inf),
    ("feature_epochs", 0, math.inf),
    ("accumulate", 1, math.inf),
    ("clip", 1e-12, math.inf),
    ("ema", 0, 1),
    ("bn_batches", 0, math.inf),
    ("sr_ste_decay", 0, math.inf),
    ("checkpoint_steps", 0, math.inf),
    ("seed", 0, 2**63 - 1),
)
