"""Distillation with masks: a masked student learns back what its dense teacher knows.

The same loop runs on one device and, under torchrun, on many; an interrupted run goes on where it was, to the same
weights as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile import events
from mpcompile.errors import ArtifactError, ConfigError, InputError
from mpcompile.graph import IRModule, training_flags
from mpcompile.training import batches as data
from mpcompile.training import checkpoint, features, masks, ranks
from mpcompile.training.losses import distillation_loss, parameter_groups
from mpcompile.training.masks import apply_masks
from mpcompile.training.options import Training

__all__ = ["Distilled", "Training", "apply_masks", "distill", "distillation_loss", "evaluate", "parameter_groups"]

RESUME = ("never", "auto")
LOG = "log.jsonl"


@dataclass
class Distilled:
    """What a run did.

    Attributes:
        losses: mean training loss of each epoch, over all ranks.
        accuracy: share of ``val`` that is right after each epoch, of the weights that would be the result.
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


@torch.no_grad()
def evaluate(model: nn.Module, val: Iterable[Any]) -> float:
    """Share of labelled batches (images, labels, ...) that the model gets right, over the shards of all ranks.

    Raises:
        InputError: nothing to evaluate on, or batches without labels.
    """
    device = _device(model)
    right = seen = 0.0
    with training_flags(model, False):
        for item in val:
            batch = data.unpack(item, need_labels=True)
            assert batch.labels is not None
            right += float((model(batch.images.to(device)).argmax(1).cpu() == batch.labels.cpu()).sum())
            seen += len(batch.labels)
    right, seen = ranks.total(right, seen, device=device)
    if not seen:
        raise InputError("there is nothing to evaluate on", expected="at least one batch", found="none")
    return right / seen


def distill(
    student: nn.Module,
    teacher: nn.Module,
    train: Any,
    val: Iterable[Any] | None = None,
    training: Training | None = None,
    *,
    out: str | Path | None = None,
    resume: str = "never",
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
        resume: ``"auto"`` goes on from the checkpoint in ``out`` where there is one. The run then ends with the very
            weights of an undisturbed one, as long as the batches of an epoch depend on nothing but Python's, NumPy's
            and torch's random numbers, and kernels and threads are the same.
        trackers: ``"tensorboard"``, ``"wandb"``.
        progress: bars on the first rank.

    Returns:
        Losses and accuracies; see :class:`Distilled`. Source: arXiv 2606.02608, fine-tuning recipe.

    Raises:
        InputError: nothing to train on, labels out of range, other classes than the teacher's, a student without
            masks and merges to recover from, a loss that is not finite, ranks that differ.
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
            return _Run(student, teacher, train, val, training, folder, trackers, progress).all(resume)
    finally:
        checkpoint.set_random_state(before)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _merges(student: nn.Module) -> bool:
    return isinstance(student, IRModule) and "mpcompile.plan" in student.meta and bool(student.plan.tokens)


class _Run:
    """One run: what is trained, and where it stands."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        train: Any,
        val: Iterable[Any] | None,
        training: Training,
        folder: Path | None,
        trackers: Sequence[str],
        progress: bool,
    ) -> None:
        self.original, self.train, self.val, self.options, self.folder = student, train, val, training, folder
        self.progress = progress and ranks.rank() == 0
        self.sinks = events.trackers(trackers, folder) if ranks.rank() == 0 else ()
        self.device = _device(student)
        if not masks.masked_weights(student) and not _merges(student):
            raise InputError(
                "the student has no masks and no merged tokens: there is nothing to recover from",
                expected="a student from mpcompile.transform",
                found=type(student).__name__,
            )
        ranks.check_code()
        ranks.check_masks(student)
        self.batches = data.length(train)
        ranks.check_equal("the number of batches", self.batches)
        self.updates = -(-self.batches // training.accumulate)  # optimiser steps an epoch
        self.steps = self.updates * training.epochs
        self.result, self.loss_sum, self.classes = Distilled(), 0.0, 0
        self.writes = folder is not None and ranks.rank() == 0
        if self.writes:
            try:
                Path(str(folder)).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ArtifactError(f"can't make the folder {folder}", found=error.strerror or str(error)) from error
        self._build(student, teacher)

    def _build(self, student: nn.Module, teacher: nn.Module) -> None:
        from timm.scheduler import CosineLRScheduler
        from timm.utils import ModelEmaV3

        training = self.options
        self.pair: features.Pair | None = None
        self.student = copy.deepcopy(student) if training.sharding == "fsdp" and ranks.active() else student
        self.ema = None if training.ema is None else ModelEmaV3(student, decay=training.ema, use_warmup=True)
        self.policy = masks.policy(training.method, self.student, training.sr_ste_decay)
        module, target = self.student, teacher
        if training.features:
            example = data.unpack(next(iter(self.train)), need_labels=False).images
            self.pair = features.pair(student, teacher, [example.to(self.device)])
            module, target = self.pair.student, self.pair.teacher
        self.teacher = data.Teacher(target, training.cache and self.pair is None)
        if training.cache and self.pair is not None:
            raise ConfigError("cache=True keeps logits alone", expected="features=0", found=training.features)
        self.module: Any = module
        self.sharded = ranks.active() and training.sharding == "fsdp"
        if self.sharded:
            self.module = _shard(self.student)
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
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps - ramp,
            warmup_t=ramp,
            warmup_lr_init=training.lr / max(1, ramp),
            warmup_prefix=True,
            t_in_epochs=False,
        )

    @property
    def where(self) -> str:
        """Where the last checkpoint lies, as a hint."""
        path = None if self.folder is None else self.folder / checkpoint.NAME
        return f"The last good checkpoint is {path}" if path is not None and path.exists() else "No checkpoint yet"

    def all(self, resume: str) -> Distilled:
        """Every epoch that is left, and what comes after the last."""
        step, state = self._resume(resume)
        path = self.folder / LOG if self.writes and self.folder is not None else None
        resume_at = step + 1 if state is not None else None
        with events.EventLog(path, resume_at=resume_at, sinks=self.sinks) as self.log:
            if state is not None:
                self.log.write("resume", step=step)
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
                    self._save(step)
        if step != (epoch + 1) * self.updates:
            raise InputError(
                "the training loader yielded fewer batches than its length",
                expected=f"{self.batches} batches",
                found=f"the data ended at step {step - epoch * self.updates} of {self.updates}",
                hint=self.where,
            )
        self.result.losses.append(self.loss_sum / self.updates)
        record: dict[str, Any] = {"epoch": epoch + 1, "loss": self.result.losses[-1]}
        if self.val is not None and not self.sharded:
            self.result.accuracy.append(evaluate(self.student if self.ema is None else self.ema.module, self.val))
            record["accuracy"] = self.result.accuracy[-1]
        self.log.write("epoch", step=step, **record)
        self._save(step)
        return step

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
                    raise InputError(
                        f"the loss of step {step} is not finite",
                        hint=f"lower the learning rate (now {self.options.lr:g}) or clip gradients. {self.where}",
                    )
                loss.backward()
            loss_sum += mean / ranks.world()
        if self.options.clip is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.policy.after_step()
        if self.ema is not None:
            self.ema.update(self.student, step=step + 1)
        self.result.steps = step + 1
        lr = self.optimizer.param_groups[0]["lr"]
        self.log.write("step", step=step + 1, loss=loss_sum, lr=lr, images=self.result.images)
        return loss_sum

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
            data.check_labels(batch.labels, len(batch.images), self.classes)
        batch.images = batch.images.to(self.device, non_blocking=True)
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16")
        with half:
            wanted, found = self.teacher(batch), self.module(batch.images)
        extra: Tensor | float = 0.0
        if self.pair is not None:
            (found, ours), (wanted, theirs) = found, wanted
            counts = training.feature_epochs is None or epoch < training.feature_epochs
            # Added in every epoch, with weight zero later, so that the same parameters get gradients on all ranks.
            extra = training.features * float(counts) * self.pair.loss(ours, theirs)
        if not self.classes:
            self.classes = data.check_logits(found, wanted)
            if batch.labels is not None:
                data.check_labels(batch.labels, len(batch.images), self.classes)
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        return extra + distillation_loss(
            found, wanted, labels, training.alpha, training.temperature, training.smoothing
        )

    def _finish(self) -> None:
        """The result: averaged weights where asked for, masks applied, BatchNorm statistics estimated anew."""
        if self.ema is not None:
            self.student.load_state_dict(self.ema.module.state_dict())
        self.policy.finish()
        if self.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            full = get_model_state_dict(self.student, options=StateDictOptions(full_state_dict=True))
            self.original.load_state_dict(full)
            apply_masks(self.original)
        if self.options.bn_batches:
            stream = data.epoch_batches(
                self.train, self.options.seed, self.options.epochs, ranks.rank(), 0, None, self.where
            )
            _reestimate(self.original, itertools.islice(stream, self.options.bn_batches), self.device)
        if self.val is not None and (self.sharded or self.options.bn_batches):
            self.result.accuracy.append(evaluate(self.original, self.val))
        ranks.check_masks(self.original)
        self.log.write(
            "end", step=self.result.steps, **{k: v for k, v in self.result.to_dict().items() if k != "steps"}
        )

    # Checkpoints.

    def _identity(self) -> dict[str, Any]:
        """What has to be the same when a run is taken up again."""
        trained = {k: v for k, v in self.options.to_dict().items() if k != "checkpoint_steps"}
        frozen = masks.digest(self.original) if self.options.method == "frozen" else ""
        return {"options": trained, "masks": frozen, "batches": self.batches, "world": ranks.world()}

    def _save(self, step: int) -> None:
        if self.folder is None:
            return
        random = ranks.gather(checkpoint.random_state())
        student, optimizer = self._states()
        if self.writes:
            state = {
                "identity": self._identity(),
                "step": step,
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

    def _states(self) -> tuple[Any, Any]:
        """State dicts of student and optimiser, whole on the first rank."""
        if not self.sharded:
            return self.student.state_dict(), self.optimizer.state_dict()
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        student, optimizer = get_state_dict(self.student, self.optimizer, options=whole)
        return student, optimizer

    def _resume(self, resume: str) -> tuple[int, Any]:
        """Steps done so far, and the checkpoint's state or None."""
        if self.folder is None:
            return 0, None
        path = self.folder / checkpoint.NAME
        if not ranks.broadcast(path.exists()):
            return 0, None
        if resume == "never":
            raise ArtifactError(
                f"{self.folder} holds the checkpoint of an earlier run",
                expected="a new folder, or resume='auto'",
                found=path,
                hint="remove the checkpoint to start again",
            )
        if self.writes:
            checkpoint.left_behind(self.folder)
        state = checkpoint.read(path)
        identity = self._identity()
        differing = {k: (v, identity[k]) for k, v in state["identity"].items() if v != identity.get(k)}
        if differing:
            raise ArtifactError(
                f"{path} belongs to another run", expected=_told(differing, 0), found=_told(differing, 1)
            )
        self._load(state)
        self.result = Distilled(**{**state["result"], "resumed": state["step"]})
        self.loss_sum = state["loss_sum"]
        return int(state["step"]), state

    def _load(self, state: dict[str, Any]) -> None:
        if self.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

            set_state_dict(
                self.student,
                self.optimizer,
                model_state_dict=state["student"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
        else:
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])


def _told(differing: dict[str, tuple[Any, Any]], side: int) -> str:
    """The values of one side that differ, options one by one."""
    parts = []
    for key, values in differing.items():
        if key == "options":
            parts += [f"{k}={values[side][k]}" for k in values[side] if values[0].get(k) != values[1].get(k)]
        else:
            parts.append(f"{key} {str(values[side])[:12]}")
    return ", ".join(parts)


def _shard(student: nn.Module) -> nn.Module:
    """Spread parameters over all ranks, layer by layer (FSDP2)."""
    from torch.distributed.fsdp import fully_shard

    for module in list(student.modules()):
        if isinstance(module, (masks.MaskedLinear, masks.MaskedConv2d)):
            fully_shard(module)
    fully_shard(student)
    return student


def _reestimate(model: nn.Module, stream: Iterator[Any], device: torch.device) -> None:
    """BatchNorm statistics as plain averages over a few batches, averaged over all ranks."""
    from torch.optim.swa_utils import update_bn

    update_bn((data.unpack(item, need_labels=False).images for item in stream), model, device=device)
    if ranks.active():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                for tensor in (module.running_mean, module.running_var):
                    assert tensor is not None
                    torch.distributed.all_reduce(tensor)
                    tensor /= ranks.world()
