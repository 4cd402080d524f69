"""Saving the state of a run in its folder, and resuming from it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import nn

from mpcompile.data import ranks
from mpcompile.data.seeding import random_state, set_random_state
from mpcompile.errors import ArtifactError
from mpcompile.training import checkpoint, policies, sharding
from mpcompile.training.options import Training
from mpcompile.training.result import Distilled
from mpcompile.training.setup import Setup


def identity(student: nn.Module, teacher: nn.Module, training: Training, images: str, batches: int) -> dict[str, Any]:
    """Return the options and checksums that must be the same when a run is resumed.

    Args:
        student, teacher, training: arguments of :func:`mpcompile.distill`.
        images: the ``fingerprint`` that was passed to it.
        batches: number of batches per epoch.
    """
    trained = {k: v for k, v in training.to_dict().items() if k != "checkpoint_steps"}
    return {
        "options": trained,
        "masks": policies.masks_digest(student) if training.method == "frozen" else "",
        "teacher": checkpoint.weights_digest(teacher),
        "images": images,
        "batches": batches,
        "world": ranks.world(),
    }


class Checkpointer:
    """Saves a run in its folder and resumes it from there. Without a folder, it does neither.

    Args:
        folder: folder of the run, or None.
        setup: the parts whose state is saved.
        identity: see :func:`identity`.
        updates: optimiser steps per epoch.
        steps: optimiser steps of the whole run.
    """

    def __init__(self, folder: Path | None, setup: Setup, identity: dict[str, Any], updates: int, steps: int) -> None:
        self.folder, self.setup, self.identity = folder, setup, identity
        self.updates, self.steps = updates, steps

    def save(self, step: int, result: Distilled, loss_sum: float, evaluated: bool = True) -> None:
        """Write the state after ``step``. All ranks take part; the first one writes.

        Args:
            step: optimiser steps done.
            result: figures so far.
            loss_sum: sum of the step losses of the current epoch.
            evaluated: False after the last step of an epoch whose evaluation is still to come.

        Raises:
            ArtifactError: the folder cannot be written, or the disk is full.
        """
        if self.folder is None:
            return
        setup, random = self.setup, ranks.gather(random_state())
        if setup.sharded:
            student, optimizer = sharding.states(setup.student, setup.optimizer)
        else:
            student, optimizer = setup.student.state_dict(), setup.optimizer.state_dict()
        if ranks.rank() == 0:
            state = {
                "identity": self.identity,
                "step": step,
                "evaluated": evaluated,
                "loss_sum": loss_sum,
                "result": result.to_dict(),
                "student": student,
                "optimizer": optimizer,
                "scheduler": setup.scheduler.state_dict(),
                "ema": None if setup.ema is None else setup.ema.module.state_dict(),
                "random": random,
            }
            checkpoint.write(self.folder / checkpoint.NAME, state)
        ranks.barrier()

    def resume(self, allowed: bool) -> tuple[dict[str, Any], Distilled] | None:
        """Load the state of an earlier run into the parts of this one.

        Returns:
            The checkpoint and the figures so far, or None if there is no checkpoint.

        Raises:
            ArtifactError: there is a checkpoint, but resuming is not ``allowed``, some rank does not see it, it is
                damaged, or it belongs to another run.
        """
        if self.folder is None:
            return None
        path = self.folder / checkpoint.NAME
        seen = ranks.gather(path.exists())
        if not seen[0]:
            return None
        if not allowed:
            raise checkpoint.earlier_run(path)
        if not all(seen):
            raise ArtifactError(
                f"{path} does not exist on every process",
                expected="a folder that all machines share",
                found=f"ranks without it: {', '.join(str(rank) for rank, exists in enumerate(seen) if not exists)}",
            )
        if ranks.rank() == 0:
            checkpoint.remove_temporary_files(self.folder)
        state = checkpoint.read(path)
        checkpoint.check_state(path, state)
        checkpoint.check_same_run(path, state["identity"], self.identity)
        self._check_progress(path, state)
        self._load(path, state)
        fields = {field.name for field in dataclasses.fields(Distilled)}
        known = {key: value for key, value in state["result"].items() if key in fields}
        return state, Distilled(**{**known, "resumed": state["step"]})

    def _check_progress(self, path: Path, state: dict[str, Any]) -> None:
        """Check that the steps and epochs that a checkpoint records are possible in this run.

        Raises:
            ArtifactError: they are not; the message names the field.
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
        setup, optimizer = self.setup, state["optimizer"]
        with checkpoint.loading(path, "random"):  # a trial: it is restored once the epoch's batches have been skipped
            before = random_state()
            try:
                set_random_state(state["random"][ranks.rank()])
            finally:
                set_random_state(before)
        with checkpoint.loading(path, "scheduler"):
            checkpoint.check_settings(state["scheduler"], setup.scheduler.state_dict(), "metric")
            setup.scheduler.load_state_dict(state["scheduler"])
        if setup.sharded:
            with checkpoint.loading(path, "student and optimizer"):
                sharding.load_states(setup.student, setup.optimizer, state["student"], optimizer)
        else:
            with checkpoint.loading(path, "student"):
                setup.student.load_state_dict(state["student"])
            with checkpoint.loading(path, "optimizer"):
                checkpoint.check_optimizer(optimizer, setup.optimizer, state["step"])
                setup.optimizer.load_state_dict(optimizer)
        if setup.ema is not None:
            with checkpoint.loading(path, "ema"):
                setup.ema.module.load_state_dict(state["ema"])
