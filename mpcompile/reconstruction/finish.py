"""Finish: what concerns the whole model. A gentle pass over it, and the check that its outputs came closer.

Trained from a pruned model at the learning rate of the regions, a whole model overfits a few hundred images; from
reconstructed regions and at a low rate, it removes what errors of different regions do together. Smaller errors of the
regions do not prove a smaller error of the outputs, so that one is measured, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.data import ranks
from mpcompile.data.outputs import class_scores, tensors_of
from mpcompile.errors import first_line
from mpcompile.reconstruction.activations.rows import count_of
from mpcompile.reconstruction.activations.walk import Walk
from mpcompile.reconstruction.fit import Fit, Trainer
from mpcompile.reconstruction.importance import Whole


def output_loss(named: Mapping[str, Any], wanted: Mapping[str, Any]) -> Tensor:
    """Return the divergence of a model's outputs from those wanted.

    It is the mean KL divergence of class scores, or, without these, the relative squared error of all values.
    """
    scores, goal = class_scores(dict(named)), class_scores(dict(wanted))
    if scores is not None and goal is not None:
        logs, goals = scores.float().log_softmax(-1), goal.float().log_softmax(-1)
        return F.kl_div(logs, goals, log_target=True, reduction="batchmean")
    pairs = zip(tensors_of(named), tensors_of(wanted), strict=True)
    return _relative([(a, b) for a, b in pairs if b.is_floating_point()])


def _relative(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean over pairs of the squared error over the energy."""
    parts = [
        (a.float() - b.float()).square().mean() / b.float().square().mean().clamp(min=1e-30)
        for a, b in pairs
        if b.numel()
    ]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def _mix(values: Mapping[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float) -> None:
    """Set values between old and new ones: exactly the old ones at 0, exactly the new ones at 1."""
    for name, value in values.items():
        value.copy_(torch.lerp(old[name], new[name], share) if share else old[name])


_SHARES = (1.0, 0.5, 0.25)  # of the change of all values, tried one after the other


@dataclass(frozen=True)
class Outputs:
    """The loss of the whole model's outputs on held-out samples (see :func:`output_loss`).

    Attributes:
        before, after: of the model as it was, and as it is.
        share: share of the change of all values that the model got: 1, or less where less was better, or 0.
    """

    before: float
    after: float
    share: float


class Finish:
    """The whole model as it is trained and checked.

    Args:
        walk: student and twin.
        nodes: outputs of the regions.
        shared: average over all ranks.
    """

    def __init__(self, walk: Walk, nodes: Sequence[fx.Node], shared: bool) -> None:
        self.whole, self.device, self.shared = Whole(walk, nodes), walk.device, shared

    def loss(self, inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return the loss of the outputs and that of the regions' outputs."""
        named, values, pairs = self.whole.student(inputs)
        with torch.no_grad():
            wanted, goals = self.whole.dense(inputs, pairs)
        return output_loss(named, wanted), _relative(list(zip(values, goals, strict=True)))

    @torch.no_grad()
    def measure(self, batches: Iterable[Sequence[Any]], outputs_only: bool = False) -> float:
        """Return the mean loss of some samples, over all ranks."""
        total = count = 0.0
        for inputs in batches:
            size = count_of(inputs)
            losses = self.loss(inputs)
            total += float(losses[0] if outputs_only else sum(losses)) * size
            count += size
        if self.shared:
            total, count = ranks.total(total, count, device=self.device)
        return total / max(count, 1.0)

    @torch.no_grad()
    def settle(
        self, values: Mapping[str, Tensor], old: Mapping[str, Tensor], held: Callable[[], Iterable[Sequence[Any]]]
    ) -> Outputs | None:
        """Keep as much of the change of all values as lowers the loss of the outputs: all, a half, a quarter, or none.

        All of it, and None is returned, if that loss was not finite before.

        Args:
            values: parameters and statistics of the student, changed in place.
            old: their values in the beginning.
            held: yields the samples that decide.
        """
        new = {name: value.clone() for name, value in values.items()}

        def loss(share: float) -> float:
            _mix(values, old, new, share)
            return self.measure(held(), outputs_only=True)

        try:
            before = loss(0.0)
            if not math.isfinite(before):
                _mix(values, old, new, 1.0)
                return None
            for share in _SHARES:
                after = loss(share)
                if after < before:
                    return Outputs(before, after, share)
        except RuntimeError:
            _mix(values, old, new, 1.0)
            raise
        _mix(values, old, new, 0.0)
        return Outputs(before, before, 0.0)

    def run(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Sequence[tuple[Tensor, Tensor]],
        epochs: Callable[[int], Iterable[Sequence[Any]]],
        held: Callable[[], Iterable[Sequence[Any]]],
        known: Iterable[Sequence[Any]],
        lr: float,
        count: int,
        steps: int,
        tick: Callable[[int], object],
    ) -> Fit:
        """Train in place; the parameters keep their values unless the loss falls on held-out samples.

        Args:
            parameters, masks: as for :func:`mpcompile.reconstruction.fit.fit`.
            epochs: number of an epoch -> its batches.
            held: yields the held-out samples; none if there are none.
            known: samples of the training set, on which the loss is taken too.
            lr: peak learning rate.
            count: number of epochs.
            steps: steps of one epoch.
            tick: called with the number of samples after each step.
        """
        known = list(known)
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        before, held_before = self.measure(known), self.measure(held())
        reason = self._train(Trainer(parameters, masks, lr, count * steps, self.shared), epochs, count, tick)
        after, held_after = (before, held_before) if reason else (self.measure(known), self.measure(held()))
        none = next(iter(held()), None) is None
        if reason is None and not (after < before if none else held_after < held_before):
            reason = "the loss on held-out samples did not fall" if not none else "the loss did not fall"
        if reason is not None:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(kept[name])
        return Fit(before, after, None if none else held_before, None if none else held_after, reason)

    def _train(
        self,
        trainer: Trainer,
        epochs: Callable[[int], Iterable[Sequence[Any]]],
        count: int,
        tick: Callable[[int], object],
    ) -> str | None:
        for epoch in range(count):
            for inputs in epochs(epoch):
                try:
                    loss = sum(self.loss(inputs), torch.zeros((), device=self.device))
                    loss.backward()
                except RuntimeError as error:
                    return f"the model cannot be trained as a whole: {first_line(error)}"
                value = float(loss.detach())
                if self.shared:
                    value = ranks.total(value, device=self.device)[0]
                if not math.isfinite(value):
                    return "the loss is not finite"
                trainer.step()
                tick(count_of(inputs))
        return None
