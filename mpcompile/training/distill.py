"""Distillation with masks: a masked student learns back what its dense teacher knows.

The same loop runs on one device and, under torchrun, on many; an interrupted run goes on where it was, to the same
weights as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.errors import ConfigError
from mpcompile.ir.numerics import training_flags
from mpcompile.measure.evaluate import evaluate
from mpcompile.training import checkpoint
from mpcompile.training.losses import distillation_loss, parameter_groups
from mpcompile.training.options import Training
from mpcompile.training.policies import apply_masks
from mpcompile.training.run import Distilled, Run

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
    """Train the student in place, its masks applied again after every step.

    Under torchrun every process calls this with the same student and its own share of the batches: gradients are
    averaged, the first rank writes, and all ranks end with the same weights.

    Args:
        student: from :func:`mpcompile.transform`; left in the mode it was in.
        teacher: the dense model; run in eval mode, not changed.
        train: batches (images, labels) or (images, labels, index), read once an epoch: a DataLoader or a list; it
            needs a length. ``train.set_epoch(epoch)`` is called where there is one, also of its sampler.
        val: labelled batches for the accuracy after each epoch; nothing is chosen by it.
        training: how to train; ``options`` are its fields, and override it.
        out: folder for ``checkpoint.pt`` and ``log.jsonl``; None writes nothing.
            Every rank has to see it.
        resume: ``"auto"`` goes on from the checkpoint in ``out`` where there is one. The run then ends with the very
            weights of an undisturbed one, as long as the batches of an epoch depend on nothing but Python's, NumPy's
            and torch's random numbers, and kernels and threads are the same.
        fingerprint: stands for the images and how they are augmented: a run goes on only with the same one.
        trackers: ``"tensorboard"``, ``"wandb"``.
        progress: bars on the first rank.

    Returns:
        Losses and accuracies; see :class:`Distilled`. Source: arXiv 2606.02608, fine-tuning recipe.

    Raises:
        InputError: nothing to train on, labels out of range, other classes than the teacher's, a student without
            masks and merges to recover from, a loss, gradient or weight that is not finite, ranks that differ.
        ConfigError: an option that can't be.
        ArtifactError: a checkpoint that can't be read or written, or belongs to another run.

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
        raise ConfigError("resume='auto' needs a folder", expected="out=FOLDER, where checkpoints lie", found="None")
    before = checkpoint.random_state()
    try:
        with training_flags(student, True), training_flags(teacher, False):
            run = Run(student, teacher, train, val, training, folder, fingerprint, trackers, progress)
            return run.all(resume == "auto")
    finally:
        checkpoint.set_random_state(before)
