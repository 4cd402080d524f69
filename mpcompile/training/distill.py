"""Distillation with masks: a masked student recovers the accuracy of its dense teacher.

The same loop runs on one device and, under torchrun, on several. An interrupted run resumes where it stopped and ends
with the same weights as an uninterrupted one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.calibration.norms import frozen
from mpcompile.data.seeding import random_state, set_random_state
from mpcompile.errors import ConfigError
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import training_flags
from mpcompile.measure.evaluate import evaluate
from mpcompile.training.losses import distillation_loss, parameter_groups
from mpcompile.training.options import Training
from mpcompile.training.policies import apply_masks
from mpcompile.training.result import Distilled
from mpcompile.training.run import Run

__all__ = ["Distilled", "Training", "apply_masks", "distill", "distillation_loss", "evaluate", "parameter_groups"]

RESUME = ("never", "auto")


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train: Any,
    val: Iterable[Any] | None = None,
    training: Training | None = None,
    *,
    out: str | Path | None = None,
    resume: str = "never",
    fingerprint: str = "",
    trackers: Sequence[str] = (),
    progress: bool = True,
    **options: Any,
) -> Distilled:
    """Train the student in place, with its masks applied again after every step.

    Under torchrun, every process calls this with the same student and its own share of the batches: gradients are
    averaged, the first rank writes, and all ranks end with the same weights. The recipe is that of
    arXiv 2606.02608 (fine-tuning).

    Args:
        student: from :func:`mpcompile.transform`; keeps its train or eval mode.
        teacher: the dense model; runs in eval mode and is not changed.
        train: batches (images, labels) or (images, labels, index), read once per epoch: a DataLoader, a list, or
            anything with a length. ``set_epoch(epoch)`` is called on the loader, its samplers and its dataset
            if they have it.
        val: labelled batches for the accuracy after each epoch; no decision depends on it.
        training: training options; keyword ``options`` override its fields.
        out: folder for ``checkpoint.pt`` and ``log.jsonl``, visible to every rank; None writes nothing.
        resume: ``"auto"`` resumes from the checkpoint in ``out`` if it exists. The run then ends with exactly the
            weights of an uninterrupted one, provided that the batches of an epoch depend only on Python's, NumPy's
            and torch's random numbers, and that kernels and threads are the same.
        fingerprint: identifies the images and their augmentation: a run resumes only with the same one.
        trackers: ``"tensorboard"``, ``"wandb"``.
        progress: show progress bars on the first rank.

    Returns:
        Losses and accuracies; see :class:`Distilled`.

    Raises:
        InputError: there is nothing to train on, labels are out of range, student and teacher have different numbers
            of classes, the student has neither masks nor merged tokens, a loss, gradient or weight is not finite, or
            ranks differ.
        ConfigError: an option has an invalid value.
        ArtifactError: a checkpoint cannot be read or written, or belongs to another run.

    Example:
        >>> import mpcompile
        >>> dense = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> student = mpcompile.transform(dense, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> batches = [(torch.randn(8, 16), torch.randint(0, 4, (8,))) for _ in range(3)]
        >>> distill(student, dense, batches, epochs=2, lr=1e-3, progress=False).steps
        6
    """
    training = Training.from_options(options, training)
    if resume not in RESUME:
        raise ConfigError("resume has no such value", expected=f"one of {', '.join(RESUME)}", found=repr(resume))
    folder = None if out is None else Path(out)
    if resume == "auto" and folder is None:
        raise ConfigError("resume='auto' needs a folder", expected="out=FOLDER, for the checkpoints", found="None")
    before = random_state()
    try:
        kept = frozen(student) if _keeps_statistics(student, training) else contextlib.nullcontext()
        with training_flags(student, True), kept, training_flags(teacher, False):
            run = Run(student, teacher, train, val, training, folder, fingerprint, trackers, progress)
            return run.complete(resume == "auto")
    finally:
        set_random_state(before)


def _keeps_statistics(student: nn.Module, training: Training) -> bool:
    if training.freeze_bn is not None:
        return training.freeze_bn
    passes = student.plan.passes if isinstance(student, IRModule) else ()
    return not training.bn_batches and any(record.name == "reconstruct" for record in passes)
