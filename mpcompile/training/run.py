"""One distillation run: its loop, its checkpoints, its result."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile.data import batches as data
from mpcompile.data import ranks
from mpcompile.data.labels import check_range
from mpcompile.errors import ArtifactError, ConfigError, InputError
from mpcompile.io.lock import locked
from mpcompile.io.writing import make_folder
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import device_of
from mpcompile.measure.evaluate import evaluate
from mpcompile.training import checkpoint, events, features, norms, sharding
from mpcompile.training import policies as masks
from mpcompile.training.losses import distillation_loss, parameter_groups
from mpcompile.training.options import Training

LOG = "log.jsonl"
log = logging.getLogger(__name__)


@dataclass
class Distilled:
    """What a run did.

    Attributes:
        losses: mean training loss of each epoch, over all ranks.
        accuracy: share of ``val`` that is right after each epoch, of the weights that would be the result; one more
            at the end if BatchNorm statistics were estimated anew. With ``sharding="fsdp"``, the last one alone.
        steps: optimiser steps.
        images: training images seen, with repetitions, on all ranks.
        resumed: the step at which this process took up an earlier run, or 0.
    """

    losses: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    steps: int = 0
    images: int = 0
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)


class Run:
    """One run: what is trained, and where it stands. Arguments and errors are those of :func:`mpcompile.distill`."""

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
        self.original, self.train, self.val, self.options, self.folder = student, train, val, training, folder
        self.fingerprint, self.progress = fingerprint, progress and ranks.rank() == 0
        self.trackers = trackers if ranks.rank() == 0 else ()
        self.device = device_of(student)
        events.check_trackers(trackers)
        _check(student, val)
        ranks.check_code()
        ranks.check_masks(student)
        self.batches = data.length(train)
        ranks.check_equal("the number of batches", self.batches)
        self.updates = -(-self.batches // training.accumulate)  # optimiser steps an epoch
        self.steps = self.updates * training.epochs
        self.result, self.loss_sum, self.classes = Distilled(), 0.0, 0
        self.last = torch.empty(0)  # images of the last step
        self.writes = folder is not None and ranks.rank() == 0
        if self.writes:
            make_folder(Path(str(folder)))
        self._build(student, teacher)
        self.identity = {} if folder is None else self._identity(teacher)

    def _build(self, student: nn.Module, teacher: nn.Module) -> None:
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        training = self.options
        self.pair: features.Pair | None = None
        self.sharded = ranks.active() and training.sharding == "fsdp"
        self.student = copy.deepcopy(student) if self.sharded else student
        self.ema = None if training.ema is None else ModelEmaV3(student, decay=training.ema, use_warmup=True)
        module, target = self.student, teacher
        if training.features:
            if training.cache:
                raise ConfigError("cache=True keeps logits alone", expected="features=0", found=training.features)
            first = next(data.epoch_batches(self.train, training.seed, 0, ranks.rank(), 0, None, self.where))
            example = data.unpack(first, need_labels=False).images
            self.pair = features.pair(student, teacher, [example.to(self.device)])
            module, target = self.pair.student, self.pair.teacher
        self.teacher = data.Teacher(target, training.cache)
        self.module: Any = module
        if self.sharded:
            self.module = sharding.shard(self.student)
        elif ranks.active():
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.module = nn.parallel.DistributedDataParallel(module, device_ids=ids)
        groups = parameter_groups(self.student, training.weight_decay)
        if training.optimizer == "sgd":
            momentum = training.momentum
            self.optimizer: Any = torch.optim.SGD(groups, lr=training.lr, momentum=momentum, nesterov=momentum > 0)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=training.lr)
        ramp = training.warmup_steps(self.steps)
        if self.steps > 1 and ramp > self.steps / 2 and ranks.rank() == 0:
            log.warning(
                "the learning rate rises for %d of %d steps; set warmup to a share of them, such as 0.1",
                ramp,
                self.steps,
            )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps - ramp,
            warmup_t=ramp,
            warmup_lr_init=training.lr / max(1, ramp),
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.policy = masks.policy(training.method, self.student, training.sr_ste_decay)

    @property
    def where(self) -> str:
        """Where the last checkpoint lies, as a hint."""
        path = None if self.folder is None else self.folder / checkpoint.NAME
        return f"The last good checkpoint is {path}" if path is not None and path.exists() else "No checkpoint yet"

    def all(self, resume: bool) -> Distilled:
        """Every epoch that is left, and what comes after the last."""
        try:
            with self._alone():
                return self._all(resume)
        finally:
            self.policy.leave()

    def _alone(self) -> contextlib.AbstractContextManager[Any]:
        """The folder's lock, which the first rank holds for all."""
        return locked(self.folder) if self.writes and self.folder is not None else contextlib.nullcontext()

    def _all(self, resume: bool) -> Distilled:
        state = self._resume(resume)
        step = 0 if state is None else int(state["step"])
        path = self.folder / LOG if self.writes and self.folder is not None else None
        told = {"end"} if state is None or state["evaluated"] else {"end", "epoch"}  # what will be said again
        # A run that was killed before its first checkpoint starts again, and so does its log.
        resume_at = step + 1 if state is not None else 0 if resume else None
        sinks = events.trackers(self.trackers, self.folder, resume_at)
        with events.EventLog(path, resume_at=resume_at, again=told, sinks=sinks) as self.log:
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
        """The rest of an epoch; returns the number of steps done."""
        training, epoch = self.options, step // self.updates
        skip = (step - epoch * self.updates) * training.accumulate
        random = None if state is None else state["random"][ranks.rank()]
        stream = data.epoch_batches(self.train, training.seed, epoch, ranks.rank(), skip, random, self.where)
        if not skip:
            self.loss_sum = 0.0
        title = f"distil {epoch + 1}/{training.epochs}"
        hidden = None if self.progress else True
        start = step - epoch * self.updates
        with tqdm(total=self.updates, initial=start, desc=title, unit="step", disable=hidden) as bar:
            for group in data.grouped(stream, training.accumulate):
                self.loss_sum += self._step(group, step, epoch)
                step += 1
                bar.update()
                if step == (epoch + 1) * self.updates:
                    break
                if training.checkpoint_steps and step % training.checkpoint_steps == 0:
                    self._check_sound()
                    self._save(step)
        if step != (epoch + 1) * self.updates:
            raise InputError(
                "the training loader yielded fewer batches than its length",
                expected=f"{self.batches} batches",
                found=f"the data ended at step {step - epoch * self.updates} of {self.updates}",
                hint=self.where,
            )
        self._check_sound()
        self.result.losses.append(self.loss_sum / self.updates)
        if self._evaluates:
            self._save(step, evaluated=False)  # an epoch isn't lost to an evaluation image that can't be read
        self._end_epoch(step)
        return step

    @property
    def _evaluates(self) -> bool:
        """Whether there is an evaluation after each epoch."""
        return self.val is not None and not self.sharded

    def _end_epoch(self, step: int) -> None:
        """Evaluate, tell, keep."""
        record: dict[str, Any] = {"epoch": step // self.updates, "loss": self.result.losses[-1]}
        if self._evaluates:
            self.result.accuracy.append(self._accuracy(self._would_be()))
            record["accuracy"] = self.result.accuracy[-1]
        self.log.write("epoch", step=step, **record)
        self._save(step)

    def _would_be(self) -> nn.Module:
        """What the result would be now."""
        if self.options.method == "frozen":
            return self.student if self.ema is None else self.ema.module
        model = copy.deepcopy(self.student)
        if self.ema is not None:
            model.load_state_dict(self.ema.module.state_dict())
        self.policy.finish(model)
        return model

    def _accuracy(self, model: nn.Module) -> float:
        assert self.val is not None
        ranks.share_buffers(model)
        try:
            return evaluate(model, self.val)
        except InputError as error:
            raise InputError(f"evaluation failed: {error}. {self.where}") from error

    def _step(self, group: list[Any], step: int, epoch: int) -> float:
        """One optimiser step on a group of batches; returns their mean loss over all ranks."""
        self.policy.before_step(step / self.steps)
        self.scheduler.step_update(step)
        loss_sum = 0.0
        for index, item in enumerate(group):
            with self._sync(index + 1 == len(group)):
                loss = self._loss(item, epoch) / len(group)
                mean, bad = ranks.total(float(loss.detach()), float(not torch.isfinite(loss)), device=self.device)
                if bad:
                    raise self._diverged(f"the loss of step {step} is not finite")
                with data.enough_memory(self.last):
                    loss.backward()
            loss_sum += mean / ranks.world()
        norm = self._clipped_norm()
        if not math.isfinite(norm):
            raise self._diverged(f"the gradient of step {step} is not finite")
        with data.enough_memory(self.last):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.after_step()
        if self.ema is not None:
            self.ema.update(self.student, step=step + 1)
        self.result.steps = step + 1
        lr = self.optimizer.param_groups[0]["lr"]
        self.log.write("step", step=step + 1, loss=loss_sum, lr=lr, gradient=norm, images=self.result.images)
        return loss_sum

    def _clipped_norm(self) -> float:
        """The norm of the whole gradient, which is clipped if it is too large."""
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        if self.options.clip is None:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = nn.utils.clip_grad_norm_(parameters, self.options.clip)
        return float(sharding.whole(norm))

    def _diverged(self, what: str) -> InputError:
        hint = f"lower the learning rate (now {self.options.lr:g}) or clip gradients. {self.where}"
        return InputError(what, hint=hint)

    @torch.no_grad()
    def _check_sound(self) -> None:
        """Weights are finite, and logits of the last images too: what is about to be kept can be gone on with."""
        bad = not all(bool(torch.isfinite(sharding.local(p)).all()) for p in self.student.parameters())
        if len(self.last):
            with training_flags(self.student, False), self._autocast():
                bad |= not bool(torch.isfinite(self.student(self.last)).all())
        if ranks.total(float(bad), device=self.device)[0]:
            raise self._diverged(f"after step {self.result.steps} the student's weights or outputs are not finite")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are exchanged with the last batch of a group alone."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
        elif ranks.active() and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def _loss(self, item: Any, epoch: int) -> Tensor:
        training = self.options
        batch = data.unpack(item, need_labels=training.alpha < 1)
        self.result.images += len(batch.images) * ranks.world()
        if self.classes and batch.labels is not None:
            check_range(batch.labels, self.classes)
        batch.images = self.last = batch.images.to(self.device, non_blocking=True)
        with self._autocast():
            wanted, found = self.teacher(batch), data.forward(self.module, batch.images, "student")
        extra: Tensor | float = 0.0
        if self.pair is not None:
            (found, ours), (wanted, theirs) = found, wanted
            counts = training.feature_epochs is None or epoch < training.feature_epochs
            # Added in every epoch, with weight zero later, so that the same parameters get gradients on all ranks.
            extra = training.features * float(counts) * self.pair.loss(ours, theirs)
        if not self.classes:
            self.classes = data.check_logits(found, wanted)
            if batch.labels is not None:
                check_range(batch.labels, self.classes)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        return extra + distillation_loss(
            found, wanted, labels, training.alpha, training.temperature, training.smoothing
        )

    def _finish(self) -> None:
        """The result: averaged weights where asked for, masks applied, BatchNorm statistics estimated anew."""
        if self.ema is not None:
            self.student.load_state_dict(self.ema.module.state_dict())
        self.policy.finish(self.student)
        if self.sharded:
            self.original.load_state_dict(sharding.whole_weights(self.student))
            masks.apply_masks(self.original)
        ranks.share_buffers(self.original)
        if self.options.bn_batches:
            stream = data.epoch_batches(
                self.train, self.options.seed, self.options.epochs, ranks.rank(), 0, None, self.where
            )
            norms.reestimate(self.original, itertools.islice(stream, self.options.bn_batches), self.device)
        if self.val is not None and (self.sharded or self.options.bn_batches):
            self.result.accuracy.append(self._accuracy(self.original))
        ranks.check_masks(self.original)
        self.log.write(
            "end", step=self.result.steps, **{k: v for k, v in self.result.to_dict().items() if k != "steps"}
        )

    # Checkpoints.

    def _identity(self, teacher: nn.Module) -> dict[str, Any]:
        """What has to be the same when a run is taken up again."""
        trained = {k: v for k, v in self.options.to_dict().items() if k != "checkpoint_steps"}
        frozen = masks.digest(self.original) if self.options.method == "frozen" else ""
        return {
            "options": trained,
            "masks": frozen,
            "teacher": checkpoint.digest(teacher),
            "images": self.fingerprint,
            "batches": self.batches,
            "world": ranks.world(),
        }

    def _save(self, step: int, evaluated: bool = True) -> None:
        if self.folder is None:
            return
        random = ranks.gather(checkpoint.random_state())
        if self.sharded:
            student, optimizer = sharding.states(self.student, self.optimizer)
        else:
            student, optimizer = self.student.state_dict(), self.optimizer.state_dict()
        if self.writes:
            state = {
                "identity": self.identity,
                "step": step,
                "evaluated": evaluated,
                "loss_sum": self.loss_sum,
                "result": self.result.to_dict(),
                "student": student,
                "optimizer": optimizer,
                "scheduler": self.scheduler.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "random": random,
            }
            checkpoint.write(self.folder / checkpoint.NAME, state)
        ranks.barrier()

    def _resume(self, resume: bool) -> dict[str, Any] | None:
        """Take up an earlier run; returns its state, or None where there is none."""
        if self.folder is None:
            return None
        path = self.folder / checkpoint.NAME
        seen = ranks.gather(path.exists())
        if not seen[0]:
            return None
        if not resume:
            raise checkpoint.in_the_way(path)
        if not all(seen):
            raise ArtifactError(
                f"{path} isn't there on every process",
                expected="a folder that all machines share",
                found=f"ranks without it: {', '.join(str(rank) for rank, there in enumerate(seen) if not there)}",
            )
        if self.writes:
            checkpoint.left_behind(self.folder)
        state = checkpoint.read(path)
        checkpoint.check_state(path, state)
        checkpoint.check_same(path, state["identity"], self.identity)
        self._check_progress(path, state)
        self._load(path, state)
        fields = {field.name for field in dataclasses.fields(Distilled)}
        known = {key: value for key, value in state["result"].items() if key in fields}
        self.result = Distilled(**{**known, "resumed": state["step"]})
        self.loss_sum = state["loss_sum"]
        return state

    def _check_progress(self, path: Path, state: dict[str, Any]) -> None:
        """Where a checkpoint says that the run stands is somewhere in this run.

        Raises:
            ArtifactError: it isn't; names the field.
        """
        step, result = state["step"], state["result"]
        if step > self.steps:
            raise checkpoint.malformed(path, "step", f"at most {self.steps}", step)
        if not state["evaluated"] and (step % self.updates or not step):
            raise checkpoint.malformed(path, "evaluated", "true within an epoch", "false")
        if len(state["random"]) != ranks.world():
            raise checkpoint.malformed(path, "random", f"{ranks.world()} of them", len(state["random"]))
        if result["steps"] != step:
            raise checkpoint.malformed(path, "result.steps", step, result["steps"])
        epochs = step // self.updates
        if len(result["losses"]) != epochs:
            raise checkpoint.malformed(path, "result.losses", f"one for each of {epochs} epochs", len(result["losses"]))
        if not all(map(math.isfinite, result["losses"])):
            raise checkpoint.malformed(path, "result.losses", "finite numbers", result["losses"])

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        student, optimizer = state["student"], state["optimizer"]
        with checkpoint.loading(path, "random"):
            now = checkpoint.random_state()
            try:
                checkpoint.set_random_state(state["random"][ranks.rank()])
            finally:
                checkpoint.set_random_state(now)
        with checkpoint.loading(path, "scheduler"):
            checkpoint.check_settings(state["scheduler"], self.scheduler.state_dict(), "metric")
            self.scheduler.load_state_dict(state["scheduler"])
        if self.sharded:
            with checkpoint.loading(path, "student and optimizer"):
                sharding.load_states(self.student, self.optimizer, student, optimizer)
        else:
            with checkpoint.loading(path, "student"):
                self.student.load_state_dict(student)
            with checkpoint.loading(path, "optimizer"):
                checkpoint.check_optimizer(optimizer, self.optimizer, state["step"])
                self.optimizer.load_state_dict(optimizer)
        if self.ema is not None:
            with checkpoint.loading(path, "ema"):
                self.ema.module.load_state_dict(state["ema"])


def _check(student: nn.Module, val: Iterable[Any] | None) -> None:
    """The student can be trained, and ``val`` read after every epoch."""
    merges = isinstance(student, IRModule) and "mpcompile.plan" in student.meta and bool(student.plan.tokens)
    if not masks.masked_weights(student) and not merges:
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
                "weights in half precision can't be trained",
                layer=name,
                expected="float32",
                found=parameter.dtype,
                hint="student.float(); precision='bf16' computes in bf16 all the same",
            )
    try:
        count = None if val is None else len(val)  # type: ignore[arg-type]
    except TypeError:  # of a stream
        count = None
    counts = ranks.gather(count)  # a small set leaves some ranks without any
    once = isinstance(val, Iterator)
    if once or (None not in counts and not sum(counts)):
        raise InputError(
            "val can't be evaluated on after every epoch",
            expected="a list of batches or a DataLoader",
            found="an iterator, which can be read once" if once else "no batch",
        )
