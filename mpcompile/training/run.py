"""One distillation run: the steps, and the loop over epochs around them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile.data import batches as data
from mpcompile.data import ranks
from mpcompile.data.labels import check_range
from mpcompile.data.outputs import logits_of
from mpcompile.errors import InputError
from mpcompile.io.lock import locked
from mpcompile.io.writing import make_folder
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import device_of
from mpcompile.training import checkpoint, events, policies, result, sharding
from mpcompile.training.checkpointer import Checkpointer, identity
from mpcompile.training.losses import distillation_loss
from mpcompile.training.options import Training
from mpcompile.training.result import Distilled
from mpcompile.training.setup import Setup, check_readable, check_trainable, set_up

LOG = "log.jsonl"


class Stepper:
    """Optimiser steps: forward and backward over a group of batches, clipping, update, masks.

    Args:
        setup: the parts of the run.
        training: training options.
        steps: optimiser steps of the whole run.
        device: device of the student.
        folder: folder of the run, for hints in errors.
    """

    def __init__(self, setup: Setup, training: Training, steps: int, device: torch.device, folder: Path | None) -> None:
        self.setup, self.training, self.steps, self.device, self.folder = setup, training, steps, device, folder
        self.classes = 0  # unknown until the first batch
        self.images = torch.empty(0)  # those of the last batch

    def step(self, group: Sequence[Any], step: int, epoch: int, progress: Distilled) -> dict[str, float]:
        """Do one optimiser step.

        Args:
            group: batches whose gradients are accumulated.
            step, epoch: numbers of this step and this epoch, from 0.
            progress: figures of the run; steps and images are counted in it.

        Returns:
            ``loss``: mean over the group and all ranks; ``lr``: learning rate; ``gradient``: norm before clipping.

        Raises:
            InputError: a batch cannot be used, or loss or gradient is not finite.
        """
        setup = self.setup
        setup.policy.before_step(step / self.steps)
        setup.scheduler.step_update(step)
        loss_sum = 0.0
        for index, batch in enumerate(group):
            with self._gradient_sync(index + 1 == len(group)):
                loss = self._loss(batch, epoch, progress) / len(group)
                mean, bad = ranks.total(float(loss.detach()), float(not torch.isfinite(loss)), device=self.device)
                if bad:
                    raise self._diverged(f"the loss of step {step} is not finite")
                with data.enough_memory(self.images):
                    loss.backward()
            loss_sum += mean / ranks.world()
        norm = self._clipped_norm()
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient of step {step} is not finite")
        with data.enough_memory(self.images):
            setup.optimizer.step()
        setup.optimizer.zero_grad(set_to_none=True)
        setup.policy.after_step()
        if setup.ema is not None:
            setup.ema.update(setup.student, step=step + 1)
        progress.steps = step + 1
        return {"loss": loss_sum, "lr": setup.optimizer.param_groups[0]["lr"], "gradient": norm}

    def _loss(self, item: Any, epoch: int, progress: Distilled) -> Tensor:
        """Return the loss of one batch, in the form that the loader yields."""
        training, setup = self.training, self.setup
        batch = data.unpack(item, need_labels=training.alpha < 1)
        progress.images += len(batch.images) * ranks.world()
        if self.classes and batch.labels is not None:
            check_range(batch.labels, self.classes)
        batch.images = self.images = batch.images.to(self.device, non_blocking=True)
        with self._autocast():
            target, logits = setup.teacher(batch), data.forward(setup.module, batch.images, "student")
        extra: Tensor | float = 0.0
        if setup.pair is not None:
            (logits, ours), (target, theirs) = logits, target
            counts = training.feature_epochs is None or epoch < training.feature_epochs
            # Added in every epoch, with weight zero later, so that the same parameters get gradients on all ranks.
            extra = training.features * float(counts) * setup.pair.loss(ours, theirs)
        logits, target = logits_of(logits, "student"), logits_of(target, "teacher")
        if not self.classes:
            self.classes = data.check_logits(logits, target)
            if batch.labels is not None:
                check_range(batch.labels, self.classes)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        return extra + distillation_loss(
            logits, target, labels, training.alpha, training.temperature, training.smoothing
        )

    def _clipped_norm(self) -> float:
        """Clip the gradient if requested, and return its norm before clipping, over the parts of all ranks."""
        parameters = [p for p in self.setup.student.parameters() if p.grad is not None]
        if self.training.clip is None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(parameters, self.training.clip)
        return float(sharding.whole(norm))

    @torch.no_grad()
    def check_finite(self, step: int) -> None:
        """Check, before the student is saved, that its weights and its logits on the last batch are finite.

        Raises:
            InputError: they are not, on some rank.
        """
        student = self.setup.student
        bad = not all(bool(torch.isfinite(sharding.local(p)).all()) for p in student.parameters())
        if len(self.images):
            with training_flags(student, False), self._autocast():
                bad |= not bool(torch.isfinite(logits_of(student(self.images), "student")).all())
        if ranks.total(float(bad), device=self.device)[0]:
            raise self._diverged(f"after step {step} the student's weights or outputs are not finite")

    def _diverged(self, what: str) -> InputError:
        hint = f"lower the learning rate (now {self.training.lr:g}) or clip gradients"
        return InputError(what, hint=f"{hint}. {checkpoint.last_good(self.folder)}")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16")

    def _gradient_sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients between ranks only in the last batch of a group."""
        if self.setup.sharded:
            self.setup.module.set_requires_gradient_sync(last)
        elif ranks.active() and not last:
            return self.setup.module.no_sync()
        return contextlib.nullcontext()


class Run:
    """One run over all its epochs. Arguments and errors are those of :func:`mpcompile.distill`."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        train: Any,
        val: Iterable[Any] | None,
        training: Training,
        folder: Path | None,
        fingerprint: str,
        trackers: Sequence[str],
        progress: bool,
    ) -> None:
        first = ranks.rank() == 0
        self.train, self.val, self.training, self.folder = train, val, training, folder
        self.progress, self.trackers = progress and first, trackers if first else ()
        events.check_trackers(trackers)
        check_trainable(student)
        check_readable(val)
        ranks.check_code()
        policies.check_masks(student)
        self.batches = data.length(train)
        ranks.check_equal("the number of batches", self.batches)
        self.updates = -(-self.batches // training.accumulate)  # optimiser steps per epoch
        self.steps = self.updates * training.epochs
        self.result, self.loss_sum = Distilled(), 0.0
        self.own_folder = folder if first else None  # the first rank writes for all
        if self.own_folder is not None:
            make_folder(Path(str(self.own_folder)))
        self.device = device_of(student)
        self.setup = set_up(student, teacher, train, training, self.steps, self.device, self._hint())
        self.stepper = Stepper(self.setup, training, self.steps, self.device, folder)
        known = {} if folder is None else identity(student, teacher, training, fingerprint, self.batches)
        self.checkpointer = Checkpointer(folder, self.setup, known, self.updates, self.steps)

    def _hint(self) -> str:
        return checkpoint.last_good(self.folder)

    def complete(self, resume: bool) -> Distilled:
        """Train the remaining epochs and finish the result.

        Args:
            resume: continue from the checkpoint in the folder, if it holds one.
        """
        try:
            with contextlib.nullcontext() if self.own_folder is None else locked(self.own_folder):
                return self._complete(resume)
        finally:
            self.setup.policy.leave()

    def _complete(self, resume: bool) -> Distilled:
        resumed = self.checkpointer.resume(resume)
        state, step = None, 0
        if resumed is not None:
            state, self.result = resumed
            step, self.loss_sum = state["step"], state["loss_sum"]
        path = None if self.own_folder is None else self.own_folder / LOG
        repeated = {"end"} if state is None or state["evaluated"] else {"end", "epoch"}
        # A run that was killed before its first checkpoint starts again, and so does its log.
        resume_at = step + 1 if state is not None else 0 if resume else None
        sinks = events.trackers(self.trackers, self.folder, resume_at)
        with events.EventLog(path, resume_at=resume_at, again=repeated, sinks=sinks) as self.log:
            if state is not None:
                self.log.write("resume", step=step)
                if not state["evaluated"]:
                    self._end_epoch(step)
                    state = None
            while step < self.steps:
                step, state = self._epoch(step, state), None
            self._finish()
        return self.result

    def _epoch(self, step: int, state: Any) -> int:
        """Train the rest of an epoch, from ``step`` on, and return the number of steps done."""
        training, epoch = self.training, step // self.updates
        end = (epoch + 1) * self.updates
        start = step - epoch * self.updates
        random = None if state is None else state["random"][ranks.rank()]
        skip = start * training.accumulate
        stream = data.epoch_batches(self.train, training.seed, epoch, ranks.rank(), skip, random, self._hint())
        if not skip:
            self.loss_sum = 0.0
        title, hidden = f"distil {epoch + 1}/{training.epochs}", None if self.progress else True
        with tqdm(total=self.updates, initial=start, desc=title, unit="step", disable=hidden) as bar:
            for group in data.grouped(stream, training.accumulate):
                figures = self.stepper.step(group, step, epoch, self.result)
                self.loss_sum += figures["loss"]
                step += 1
                self.log.write("step", step=step, **figures, images=self.result.images)
                bar.update()
                if step == end:
                    break
                if training.checkpoint_steps and step % training.checkpoint_steps == 0:
                    self.stepper.check_finite(step)
                    self.checkpointer.save(step, self.result, self.loss_sum)
        if step != end:
            raise InputError(
                "the training loader yielded fewer batches than its length",
                expected=f"{self.batches} batches",
                found=f"the data ended at step {step - epoch * self.updates} of {self.updates}",
                hint=self._hint(),
            )
        self.stepper.check_finite(step)
        self.result.losses.append(self.loss_sum / self.updates)
        if self._evaluates:  # saved first: an unreadable evaluation image must not cost an epoch
            self.checkpointer.save(step, self.result, self.loss_sum, evaluated=False)
        self._end_epoch(step)
        return step

    @property
    def _evaluates(self) -> bool:
        """True if there is an evaluation after each epoch."""
        return self.val is not None and not self.setup.sharded

    def _end_epoch(self, step: int) -> None:
        """Evaluate, log and save."""
        record: dict[str, Any] = {"epoch": step // self.updates, "loss": self.result.losses[-1]}
        if self.val is not None and self._evaluates:
            model = result.preview(self.setup, self.training)
            self.result.accuracy.append(result.accuracy(model, self.val, self._hint()))
            record["accuracy"] = self.result.accuracy[-1]
        self.log.write("epoch", step=step, **record)
        self.checkpointer.save(step, self.result, self.loss_sum)

    def _finish(self) -> None:
        """Turn the student into the result, evaluate it if that changed it, and log the end of the run."""
        setup = self.setup
        result.finish(setup, self.training, self.train, self.device, self._hint())
        if self.val is not None and (setup.sharded or self.training.bn_batches):
            self.result.accuracy.append(result.accuracy(setup.original, self.val, self._hint()))
        policies.check_masks(setup.original)
        figures = {name: value for name, value in self.result.to_dict().items() if name != "steps"}
        self.log.write("end", step=self.result.steps, **figures)
