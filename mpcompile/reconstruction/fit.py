"""Fit: train one region so that its output comes close to the dense model's, masks frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.data import ranks
from mpcompile.errors import first_line
from mpcompile.ir.effects import storage
from mpcompile.ir.module import IRModule, masked
from mpcompile.ir.parts import attribute
from mpcompile.reconstruction.activations.rows import Index, Rows
from mpcompile.reconstruction.importance import Importance
from mpcompile.reconstruction.options import Reconstruction
from mpcompile.reconstruction.regions import Region

_WARM_UP = 0.1  # share of the steps during which the learning rate rises
_LEAST = 128  # samples of the training set on which the error is taken


@dataclass(frozen=True)
class Fit:
    """The result of training a region: relative squared errors of its output, and why it was left as it was, if so.

    Attributes:
        before, after: on samples of the training set.
        held_before, held_after: on held-out samples; None if there are none.
        reason: why the region keeps the values that it had; None if it has new ones.
    """

    before: float
    after: float
    held_before: float | None = None
    held_after: float | None = None
    reason: str | None = None


@dataclass
class Task:
    """What a region is trained on.

    Attributes:
        part: the student's region as a graph.
        inputs: values that it reads, one per input of ``part``.
        target: the dense region's output.
        trunk: the value that the dense region adds to, or None: errors are relative to what it adds.
        importance: weights of the squared error.
        train: number of samples to train on, the first ones.
        count: number of samples; the others are held out.
        fixed: the one batch size that the graph takes, or None.
    """

    part: Any
    inputs: Sequence[Rows]
    target: Rows
    trunk: Rows | None
    importance: Importance
    train: int
    count: int
    fixed: int | None
    device: torch.device

    def values(self, index: Index) -> list[Any]:
        """Return what the region reads for the samples at an index."""
        return [rows.take(index, self.device) for rows in self.inputs]

    def output(self, index: Index) -> Tensor:
        """Return the region's output for the samples at an index."""
        value: Tensor = self.part(*self.values(index))
        return value

    def error(self, index: Index) -> Tensor:
        """Return the weighted squared error of the samples at an index."""
        difference = self.output(index).float() - self.target.take(index, self.device).float()
        return (difference.square() * self.importance.of(index, self.device)).sum()

    def energy(self, index: Index) -> Tensor:
        """Return the weighted energy of what the dense region adds; without a trunk, of its deviation from the mean."""
        target = self.target.take(index, self.device).float()
        base = target.mean() if self.trunk is None else self.trunk.take(index, self.device).float()
        return ((target - base).square() * self.importance.of(index, self.device)).sum()


@torch.no_grad()
def relative_error(task: Task, places: Tensor, batch: int, shared: bool) -> float:
    """Return the error of some samples over the energy of what the dense region adds, over all ranks."""
    size = task.fixed or batch
    error = energy = 0.0
    for index in places[: len(places) // size * size if task.fixed else len(places)].split(size):
        error += float(task.error(index))
        energy += float(task.energy(index))
    if shared:
        error, energy = ranks.total(error, energy, device=task.device)
    return error / max(energy, 1e-30)


def decisive(error: float, held: float | None) -> float:
    """Return the error that decides whether new values are kept: on held-out samples, if there are any."""
    return error if held is None else held


def errors(task: Task, batch: int, shared: bool) -> tuple[float, float | None]:
    """Return the relative error on samples of the training set, and on those held out, if there are any."""
    held = torch.arange(task.train, task.count)
    sample = torch.arange(0, task.train, max(1, task.train // max(_LEAST, len(held), task.fixed or 0)))
    return (
        relative_error(task, sample, batch, shared),
        relative_error(task, held, batch, shared) if len(held) else None,
    )


def fit(
    task: Task,
    parameters: Mapping[str, nn.Parameter],
    masks: Sequence[tuple[Tensor, Tensor]],
    options: Reconstruction,
    epochs: int,
    seed: int,
    *,
    shared: bool = False,
    tick: Callable[[int], object] = lambda samples: None,
    statistics: Mapping[str, Tensor] | None = None,
    settle: Callable[[], object] = lambda: None,
) -> Fit:
    """Train a region's parameters in place; they keep their values unless the error on held-out samples falls.

    Args:
        task: samples and error.
        parameters: those to train, by name.
        masks: weights of the region and their masks.
        options: learning rate and batch size.
        epochs: passes over the training samples.
        seed: seeds the order of the samples.
        shared: average gradients and errors over all ranks.
        tick: called with the number of samples after each step.
        statistics: BatchNorm statistics of the region, which keep their values if the parameters do.
        settle: called behind the last step; it may change the statistics.
    """
    batch = task.fixed or max(1, options.batch // (ranks.world() if shared else 1))
    before, held_before = errors(task, batch, shared)
    if not math.isfinite(before) or (held_before is not None and not math.isfinite(held_before)):
        return Fit(before, before, held_before, held_before, "its error is not finite before training")
    size = min(batch, task.train)
    places, steps = _places(task.train, size, epochs, seed), epochs * (task.train // size)
    values: dict[str, Tensor] = {**parameters, **(statistics or {})}
    kept = {name: value.detach().clone() for name, value in values.items()}
    reason = _train(task, Trainer(parameters, masks, options.lr, steps, shared), places, shared, tick)
    if reason is None:
        settle()
    after, held_after = errors(task, batch, shared) if reason is None else (before, held_before)
    if reason is None:
        old, new = decisive(before, held_before), decisive(after, held_after)
        if not new < old:  # also if it is not a number
            where = "training" if held_before is None else "held-out"
            reason = f"the error on {where} samples did not fall: {old:.3g} -> {new:.3g}"
    if reason is not None:
        with torch.no_grad():
            for name, value in values.items():
                value.copy_(kept[name])
    return Fit(before, after, held_before, held_after, reason)


def _train(
    task: Task,
    trainer: Trainer,
    places: Iterable[Tensor],
    shared: bool,
    tick: Callable[[int], object],
) -> str | None:
    """Run the steps, one for each batch of places, and return why they had to stop, or None."""
    scale: float | None = None
    for step, index in enumerate(places):
        if scale is None:
            scale = _scale(task, len(index), shared)
        try:
            loss = task.error(index) * scale
            loss.backward()
        except RuntimeError as error:
            return f"it cannot be trained: {first_line(error)}"
        value = float(loss.detach())
        if shared:
            value = ranks.total(value, device=task.device)[0]
        if not math.isfinite(value):
            return f"the error of step {step} is not finite"
        trainer.step()
        tick(len(index))
    return None


def _scale(task: Task, size: int, shared: bool) -> float:
    """Return one over the mean energy of a batch, by which errors become relative."""
    indices = torch.arange(task.train).split(size)
    with torch.no_grad():
        energy = sum(float(task.energy(index)) for index in indices if len(index) == size)
    count = sum(len(index) == size for index in indices)
    if shared:
        energy, count = ranks.total(energy, float(count), device=task.device)  # type: ignore[assignment]
    return count / max(energy, 1e-30)


def _places(count: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield the samples of every step: each epoch in another random order, without what is left of a batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


class Trainer:
    """AdamW on some parameters, with a learning rate that rises and falls once, and masks applied after each step.

    Args:
        parameters: those to train.
        masks: weights and their masks.
        lr: peak learning rate.
        steps: number of steps.
        shared: average gradients over all ranks.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Sequence[tuple[Tensor, Tensor]],
        lr: float,
        steps: int,
        shared: bool,
    ) -> None:
        self.parameters, self.shared = list(parameters.values()), shared
        self.weights = [weight for weight, _ in masks]
        self.masks = [mask.to(weight.dtype) for weight, mask in masks]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0)
        warm = max(_WARM_UP, min(0.5, 2 / steps))  # at least one step up
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=max(steps, 4), pct_start=warm if steps >= 4 else 0.5
        )

    def step(self) -> None:
        """Move the parameters along the gradients that a backward pass left, and clear these."""
        if self.shared and ranks.active():
            self._average()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.weights:
            with torch.no_grad():
                torch._foreach_mul_(self.weights, self.masks)

    def _average(self) -> None:
        """Average the gradients over all ranks, in one exchange."""
        held = [p for p in self.parameters if p.grad is not None]
        if not held:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in held])  # type: ignore[union-attr]
        ranks.average(flat)
        for parameter, part in zip(held, flat.split([p.numel() for p in held]), strict=True):
            parameter.grad = part.reshape(parameter.shape)


def trainable(gm: IRModule, regions: Sequence[Region]) -> list[dict[str, nn.Parameter]]:
    """Return the parameters that each region may train, by name: those that nothing outside it reads."""
    inside = [set(region.nodes) for region in regions]
    names: dict[int, str] = {}
    for name, parameter in gm.named_parameters():
        names.setdefault(id(parameter), name)
    readers: dict[int, set[int]] = {}
    for node in gm.graph.nodes:
        places = {place for place, nodes in enumerate(inside) if node in nodes} or {-1}
        for parameter in _read(gm, node):
            readers.setdefault(id(parameter), set()).update(places)
    groups: list[dict[str, nn.Parameter]] = [{} for _ in regions]
    for parameter in gm.parameters():
        places = readers.get(id(parameter), set())
        if len(places) == 1 and (place := next(iter(places))) >= 0 and parameter.is_floating_point():
            groups[place][names[id(parameter)]] = parameter
    masked_storages = {storage(weight) for weight, _, _ in masked(gm)}
    return [group if any(storage(p) in masked_storages for p in group.values()) else {} for group in groups]


def _read(gm: fx.GraphModule, node: fx.Node) -> Iterable[nn.Parameter]:
    """Return the parameters that a node reads."""
    if node.op == "call_module":
        return gm.get_submodule(str(node.target)).parameters()
    if node.op == "get_attr":
        value = attribute(gm, str(node.target))
        return [value] if isinstance(value, nn.Parameter) else []
    return []


def masks_of(gm: IRModule, parameters: Mapping[str, nn.Parameter]) -> list[tuple[Tensor, Tensor]]:
    """Return the weights among some parameters that have masks, or the rows of them that have, and their masks."""
    wanted = {storage(parameter) for parameter in parameters.values()}
    return [(weight.detach(), mask) for weight, mask, _ in masked(gm) if storage(weight) in wanted]
