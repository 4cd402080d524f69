"""Training: how a student is distilled. The same fields serve Python, recipes in YAML and the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpcompile.config import only_fields
from mpcompile.errors import ConfigError

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
        lr: peak learning rate, reached after the warm-up; then a cosine to zero.
        weight_decay: of matrices and kernels; biases, norms, position embeddings and class tokens don't decay.
        momentum: of SGD.
        warmup: below 1 a share of all steps, from 1 on a number of steps; the learning rate rises linearly.
        alpha: weight of the teacher's logits against the labels, 0 to 1; with 1, labels aren't used.
        temperature: of both softmaxes in the teacher's part of the loss.
        smoothing: of the labels, below 1.
        features: weight of the block outputs' relative squared error, 0 for none.
        feature_epochs: epochs during which features count; None for all.
        accumulate: batches whose gradients make one optimiser step.
        clip: largest norm of the gradient, or None.
        ema: decay of the exponential moving average of the weights that becomes the result, or None for none.
        precision: ``"bf16"`` runs both models under autocast; weights and optimiser stay fp32.
        bn_batches: training batches over which BatchNorm statistics are estimated anew at the end; 0 for none.
        method: what happens to the masks. ``"frozen"`` keeps them. ``"sr-ste"`` (Zhou et al. 2021) trains dense
            weights through masks that follow their magnitude; ``"gradual"`` lets what the masks remove fade out over
            the first half of training. The last two are for comparison, and start from dense weights.
        sr_ste_decay: pull of removed weights towards zero in ``"sr-ste"``.
        cache: keep the teacher's logits of each training image; only where an image is the same every epoch, and
            batches are (image, label, index).
        sharding: with several processes, ``"ddp"`` or ``"fsdp"`` (weights, gradients and optimiser state spread).
        checkpoint_steps: optimiser steps between checkpoints, besides the one at the end of each epoch; 0 for none.
        seed: seeds order, augmentation and dropout; every epoch anew, so that an interrupted run can be repeated.

    Raises:
        ConfigError: an unknown option or a value that an option can't take.

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
        if self.sharding == "fsdp" and (self.method != "frozen" or self.features or self.ema is not None):
            raise ConfigError(
                "sharding='fsdp' has no feature matching, moving average or moving masks",
                expected="method='frozen', features=0 and ema=None",
                found=f"method={self.method!r}, features={self.features:g}, ema={self.ema}",
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, base: Training | None = None) -> Training:
        """From a mapping, such as a recipe's ``train``; what it doesn't name is as in ``base``, or as by default.

        Raises:
            ConfigError: a key that is no option; the message lists the valid ones.
        """
        only_fields(cls, options or {}, "distillation has no option")
        return dataclasses.replace(base or cls(), **dict(options or {}))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    def warmup_steps(self, steps: int) -> int:
        """Steps of the warm-up in a run of ``steps``; at least one step is left after it."""
        wanted = self.warmup * steps if self.warmup < 1 else self.warmup
        return max(0, min(round(wanted), steps - 1))


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


_LARGEST = 1 << 63  # above every integer that an option can be


def check_fields(options: Any, *ranges: tuple[str, float, float]) -> None:
    """The fields of a dataclass have the types they are declared with, and lie within (name, low, high).

    Raises:
        ConfigError: the first that doesn't.
    """
    for field in dataclasses.fields(options):
        check_type(field.name, str(field.type), getattr(options, field.name))
    for name, low, high in ranges:
        value = getattr(options, name)
        beyond = _LARGEST if isinstance(value, int) else math.inf
        if value is not None and not (low <= value <= high and value < beyond):
            raise ConfigError(f"option {name!r} is out of range", expected=f"{low:g} to {high:g}", found=value)


def check_type(name: str, wanted: str, value: Any) -> None:
    """A value is of a type written like ``"int"``, ``"float | None"`` or ``"tuple[float, float]"``.

    Raises:
        ConfigError: it isn't.
    """
    if wanted.startswith("tuple["):
        parts = wanted.removeprefix("tuple[").removesuffix("]").split(", ")
        if not isinstance(value, (tuple, list)) or len(value) != len(parts):
            raise ConfigError(f"option {name!r} has the wrong type", expected=f"{len(parts)} values", found=repr(value))
        for part, item in zip(parts, value, strict=True):
            check_type(name, part, item)
        return
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    allowed = tuple(kind for part in wanted.split(" | ") if part != "None" for kind in kinds[part])
    if value is None and wanted.endswith("None"):
        return
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted != "bool"):
        raise ConfigError(f"option {name!r} has the wrong type", expected=wanted, found=repr(value))
