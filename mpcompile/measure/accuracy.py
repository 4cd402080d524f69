"""Top-1 accuracy: hits of one model, and a comparison of one build with the dense model."""

from __future__ import annotations

from scipy.stats import binomtest
from torch import Tensor

from mpcompile.data.labels import check_range
from mpcompile.errors import InputError
from mpcompile.measure.report import Row


def top1_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return a boolean per sample, (B,): True if the largest of its logits (B, classes) is that of its label (B,).

    Raises:
        InputError: a label is outside 0 to classes - 1.
    """
    check_range(labels, logits.shape[1])
    return logits.argmax(-1) == labels.to(logits.device)


class Comparison:
    """Sums over all samples of how one build compares with the dense model; no sample is kept.

    Args:
        row: row of the build; :meth:`add` and :meth:`finish` fill it in.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.agreeing: int | None = None
        self.error = self.energy = 0.0

    def add(self, outputs: Tensor, reference: Tensor, labels: Tensor | None, samples: int | None = None) -> None:
        """Count one batch: outputs of this build, those of the dense model, and int64 labels (B,) if known.

        Classes are compared in outputs (batch, classes). Others, such as all boxes in a row, have a difference alone.

        Args:
            samples: number of samples in the batch, if that is not the length of the outputs.

        Raises:
            InputError: the builds return different shapes, or the model has no class for a label.
        """
        row = self.row
        if outputs.shape != reference.shape:
            raise InputError(
                f"{row.name} returns a different shape from the model",
                expected=tuple(reference.shape),
                found=tuple(outputs.shape),
            )
        row.samples += len(outputs) if samples is None else samples
        self.error += float((outputs - reference).double().square().sum())
        self.energy += float(reference.double().square().sum())
        if outputs.dim() != 2:
            return
        self.agreeing = (self.agreeing or 0) + int((outputs.argmax(-1) == reference.argmax(-1)).sum())
        if labels is not None:
            hits, dense_hits = top1_hits(outputs, labels), top1_hits(reference, labels)
            row.correct = (row.correct or 0) + int(hits.sum())
            row.lost = (row.lost or 0) + int((dense_hits & ~hits).sum())
            row.won = (row.won or 0) + int((hits & ~dense_hits).sum())

    def finish(self) -> None:
        """Compute the shares in the row from the sums."""
        row = self.row
        row.difference = (self.error / max(self.energy, 1e-60)) ** 0.5
        row.agree = None if self.agreeing is None else self.agreeing / row.samples
        if row.correct is not None:
            interval = binomtest(row.correct, row.samples).proportion_ci(0.95, "wilson")
            row.interval = (float(interval.low), float(interval.high))
