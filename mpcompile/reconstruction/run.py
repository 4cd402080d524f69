"""A run of reconstruction: region after region, then the whole model."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

from mpcompile.calibration.norms import own_statistics, write
from mpcompile.data import ranks
from mpcompile.errors import GraphError, first_line
from mpcompile.ir.effects import storage
from mpcompile.ir.module import IRModule, masked
from mpcompile.ir.nodes import shape_of
from mpcompile.ir.parts import device_of
from mpcompile.kernels.machine import has_bf16
from mpcompile.reconstruction.activations.rows import Shelf, count_of
from mpcompile.reconstruction.activations.samples import Samples
from mpcompile.reconstruction.activations.walk import Step, Walk
from mpcompile.reconstruction.budget import Cost, lengths, timed
from mpcompile.reconstruction.finish import Finish, Outputs
from mpcompile.reconstruction.fit import Fit, Task, decisive, errors, fit, masks_of, trainable
from mpcompile.reconstruction.importance import Importance, Weigher, Whole
from mpcompile.reconstruction.norms import Matching, norms_of
from mpcompile.reconstruction.options import Reconstruction
from mpcompile.reconstruction.records import Records, stamp
from mpcompile.reconstruction.regions import Region
from mpcompile.reconstruction.views import Views

_BAR = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
_KNOWN = 4  # batches of the training set on which the loss of the final pass is taken


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        fits: errors of each region, in order.
        values: new values of parameters and statistics, by name.
        images, held: number of images, and how many of them were held out.
        views, epochs: rounds over the images, and epochs in each region.
        final: losses of the pass over the whole model, or None without one.
        outputs: losses of the model's outputs, or None if they could not be computed.
        notes: remarks.
    """

    fits: list[tuple[Region, Fit]]
    values: dict[str, Tensor]
    images: int
    held: int
    views: int
    epochs: int
    final: Fit | None = None
    outputs: Outputs | None = None
    notes: list[str] = field(default_factory=list)


def run(
    student: IRModule,
    twin: IRModule,
    regions: Sequence[Region],
    batches: Iterable[Sequence[Any]],
    options: Reconstruction,
    *,
    fixed: int | None = None,
    folder: Path | None = None,
    memory: float = 2 << 30,
    shared: bool = False,
) -> Result:
    """Train the regions of a student, one after the other, towards the outputs of its dense twin.

    Args:
        student: a masked graph; its parameters are trained in place.
        twin: a copy of it with the dense weights, all masks full.
        regions: regions of the student.
        batches: calibration images, as lists of graph inputs; read once.
        options: lengths, learning rates, and so on.
        fixed: the one batch size that the graphs take, or None.
        folder: a folder that keeps the values of finished regions, from which an interrupted run resumes.
        memory: bytes of activations to hold in memory; the rest goes to a temporary folder.
        shared: share the images with the other ranks.

    Raises:
        MPCompileError: there are no images, or the time budget is too short.
    """
    with Shelf(memory) as shelf:
        return _Run(student, twin, regions, batches, options, fixed, folder, shelf, shared).complete()


class _Run:
    def __init__(
        self,
        student: IRModule,
        twin: IRModule,
        regions: Sequence[Region],
        batches: Iterable[Sequence[Any]],
        options: Reconstruction,
        fixed: int | None,
        folder: Path | None,
        shelf: Shelf,
        shared: bool,
    ) -> None:
        self.start = time.perf_counter()
        self.student, self.twin, self.regions, self.options = student, twin, regions, options
        self.fixed, self.shelf, self.shared = fixed, shelf, shared and ranks.active()
        rank, world = (ranks.rank(), ranks.world()) if self.shared else (0, 1)
        self.samples = Samples(batches, options, fixed, rank, world)
        for side in (student, twin):
            for parameter in side.parameters():
                parameter.requires_grad_(False)
        self.before = {name: tensor.detach().clone() for name, tensor in _floats(student).items()}
        self.parameters = trainable(student, regions)
        self.records = Records(None, "")
        if folder is not None:
            self.records = Records(
                folder, stamp([student, twin], self.samples.contents(), options, world), write=rank == 0
            )
        self.bf16 = _multiplies_bf16(student) if options.precision == "auto" else options.precision == "bf16"
        if self.shared:
            self.bf16 = all(ranks.gather(self.bf16))
        self.views, self.epochs = self._lengths()
        self.samples.multiply(self.views)
        self.walk = self._walk(shelf)
        self.result = Result([], {}, self.samples.images, self.samples.held, self.samples.views, self.epochs)

    def _walk(self, shelf: Shelf) -> Walk:
        samples, chunk = self.samples, self.fixed or self.options.batch
        return Walk(self.student, self.twin, self.regions, samples, samples.count, chunk, self.fixed, shelf)

    def _lengths(self) -> tuple[int, int]:
        """Return the numbers of views and epochs: as given, as in the run that is resumed, or what time allows."""
        options = self.options
        if options.views is not None and options.epochs is not None:
            return options.views, options.epochs
        known = self.records.lengths()
        if known is None:
            example = self.samples.example()
            cost = self._cost(example)
            spent = (time.perf_counter() - self.start) / 60
            known = lengths(options, self.samples.train, cost, example.note is None, spent)
        known = ranks.broadcast(known) if self.shared else known
        self.records.put_lengths(*known)
        return known

    def _cost(self, example: Views) -> Cost:
        """Time a few steps on the first images."""
        inputs, size = next(example.round(0)), example.images
        whole = Whole(self._walk(self.shelf), [region.output for region in self.regions])
        parameters = {n: p for group in self.parameters for n, p in group.items()}

        def forward() -> Any:
            return whole.student(inputs)[1]

        def step() -> None:
            with torch.enable_grad(), _training(parameters):
                loss = torch.stack([value.float().square().mean() for value in forward()]).sum()
                torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)

        with torch.no_grad(), self._autocast():
            view = timed(lambda: next(example.round(example.rounds - 1)), size)
            return Cost(view, timed(forward, size), timed(step, size))

    def _autocast(self) -> torch.autocast:
        # Without its cache, which would keep casts of parameters that are then trained.
        return torch.autocast(device_of(self.student).type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    def complete(self) -> Result:
        """Train all regions, then the whole model."""
        with self._autocast():
            return self._complete()

    def _complete(self) -> Result:
        samples, epochs, options = self.samples, self.epochs, self.options
        final = samples.train // samples.views * options.final_views * options.final_epochs
        total = samples.count * len(self.regions) * (2 + 3 * epochs) + 3 * len(self.regions) * samples.count + final
        with tqdm(total=total, desc="reconstruct", bar_format=_BAR, disable=None if ranks.rank() == 0 else True) as bar:
            self.bar = bar
            weights = self._importance()
            for place, (step, importance) in enumerate(zip(self.walk.steps, weights, strict=True)):
                bar.set_postfix_str(step.region.name, refresh=False)
                try:
                    self.walk.enter(step)
                    outcome = self._region(place, step, importance)
                    self.result.fits.append((step.region, outcome))
                    self.walk.leave(step)
                except (RuntimeError, GraphError) as error:
                    if self.shared:  # the other ranks would wait for this one
                        raise
                    why = f"its values could not be computed: {first_line(error)}"
                    rest = self.walk.steps[len(self.result.fits) :]
                    self.result.fits.extend((step.region, Fit(math.nan, math.nan, reason=why)) for step in rest)
                    break
                bar.update(samples.count * 2)
                bar.set_postfix_str(f"{step.region.name} {outcome.before:.3g} -> {outcome.after:.3g}")
            return self._finished()

    def _importance(self) -> list[Importance]:
        if not self.options.importance:
            return [Importance() for _ in self.regions]
        weigher, start = Weigher(self.walk, self.regions, self.options.importance, self.options.seed), 0
        for inputs in self.samples:
            try:
                weigher.add(start, inputs)
            except RuntimeError as error:
                self.samples.notes.append(f"all errors have the same weight: {first_line(error)}")
                return [Importance() for _ in self.regions]
            size = count_of(inputs)
            start += size
            self.bar.update(3 * len(self.regions) * size)
        return weigher.result()

    def _region(self, place: int, step: Step, importance: Importance) -> Fit:
        """Train one region, or read its values from the folder."""
        parameters, region = self.parameters[place], step.region
        norms = norms_of(self.student, region)
        running = {path: value for norm in norms for path, value in own_statistics(self.student, norm).items()}
        state = {**parameters, **running}
        known = self._recorded(place, state)
        if known is not None:
            self.bar.update(self.samples.train * self.epochs * 3)
            return known
        task = self._task(step, importance)
        if not parameters:
            now, held = errors(task, self.samples.batch, self.shared)
            return Fit(now, now, held, held, "its weights are shared with other parts of the model")
        images = torch.arange(self.samples.train // self.samples.views)
        matching = Matching(self.walk, region, norms, images, self.samples.batch, self.shared)
        before = self._matched(task, running, matching) if norms else None
        with _training(parameters), torch.enable_grad():
            outcome = fit(
                task,
                parameters,
                masks_of(self.student, parameters),
                self.options,
                self.epochs,
                self.options.seed + 1_000_003 * (place + 1),
                shared=self.shared,
                tick=lambda samples: self.bar.update(3 * samples),
                statistics=running,
                settle=matching,
            )
        if before is not None:  # better statistics are new values even if training them brought nothing
            outcome = dataclasses.replace(outcome, before=before[0], held_before=before[1], reason=None)
        self.records.put(place, state, outcome)
        return outcome

    def _task(self, step: Step, importance: Importance) -> Task:
        region, trunk = step.region, _trunk(step.region)
        side = self.walk.values if self.options.inputs == "pruned" else self.walk.targets
        return Task(
            self.walk.part(self.student, region),
            [side[node] for node in region.inputs],
            self.walk.targets[region.output],
            None if trunk is None else self.walk.targets[trunk],
            importance,
            self.samples.train,
            self.samples.count,
            self.fixed,
            self.walk.device,
        )

    def _matched(
        self, task: Task, running: Mapping[str, Tensor], match: Callable[[], object]
    ) -> tuple[float, float | None] | None:
        """Match BatchNorm statistics to the dense model if that lowers the error -> the error before."""
        kept = {path: value.clone() for path, value in running.items()}
        before = errors(task, self.samples.batch, self.shared)
        match()
        if decisive(*errors(task, self.samples.batch, self.shared)) < decisive(*before):
            return before
        write(self.student, kept)
        return None

    def _recorded(self, place: int, parameters: Mapping[str, Tensor]) -> Fit | None:
        """Read a region's values from the folder, which the first rank shares; None if there are none."""
        known = self.records.get(place, parameters)
        if not self.shared:
            return known
        known, values = ranks.broadcast((known, None if known is None else {n: p.cpu() for n, p in parameters.items()}))
        with torch.no_grad():
            for name, value in (values or {}).items():
                parameters[name].copy_(value)
        return known

    def _check_masks(self) -> None:
        """Check that masked weights are zero, as they were.

        Raises:
            GraphError: one is not.
        """
        for weight, mask, pattern in masked(self.student):
            if bool(weight[~mask].any()):
                names = (n for n, p in self.student.named_parameters() if storage(p) == storage(weight))
                raise GraphError("a masked weight is not zero", layer=next(names, None), expected=f"its {pattern} mask")

    def _finished(self) -> Result:
        """Run the pass over the whole model, if one is asked for, check its outputs, and collect the new values."""
        options, samples = self.options, self.samples
        result, student = self.result, self.student
        final, finish = None, Finish(self.walk, [region.output for region in self.regions], self.shared)
        if options.final_epochs:
            parameters = {n: p for n, p in student.named_parameters() if p.is_floating_point()}
            self.bar.set_postfix_str("whole model")
            batches = options.final_views * -(-(samples.train // samples.views) // samples.batch)
            with _training(parameters), torch.enable_grad():
                final = finish.run(
                    parameters,
                    masks_of(student, parameters),
                    lambda epoch: samples.fresh(options.final_views, epoch),
                    samples.held_out,
                    itertools.islice(samples, _KNOWN),
                    options.final_lr,
                    options.final_epochs,
                    batches,
                    self.bar.update,
                )
        outputs = self._settled(finish)
        self._check_masks()
        changed = {n: t.detach() for n, t in _floats(student).items() if not torch.equal(t, self.before[n])}
        return dataclasses.replace(result, values=changed, final=final, outputs=outputs, notes=samples.notes)

    def _settled(self, finish: Finish) -> Outputs | None:
        """Check the outputs of the whole model; they may not get worse."""
        floats, samples = _floats(self.student), self.samples
        values = {name: value for name, value in floats.items() if not torch.equal(value, self.before[name])}
        if not values:
            return None
        few = None if samples.held else list(itertools.islice(samples, _KNOWN))
        try:
            outputs = finish.settle(values, self.before, samples.held_out if few is None else lambda: few)
            if outputs is None:
                samples.notes.append("the outputs of the whole model are not finite")
            return outputs
        except RuntimeError as error:
            if self.shared:  # the other ranks would wait for this one
                raise
            samples.notes.append(f"the outputs of the whole model were not compared: {first_line(error)}")
            return None


def _floats(gm: IRModule) -> dict[str, Tensor]:
    """Return the parameters and buffers of floats, by name."""
    tensors = itertools.chain(gm.named_parameters(), gm.named_buffers())
    return {name: tensor for name, tensor in tensors if tensor.is_floating_point()}


def _multiplies_bf16(gm: nn.Module) -> bool:
    """Return True if the processor of a model multiplies bf16 natively, and the model is in fp32."""
    device = device_of(gm)
    native = has_bf16() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    return native and all(p.dtype == torch.float32 for p in gm.parameters() if p.is_floating_point())


def _trunk(region: Region) -> fx.Node | None:
    """Return the input that a residual region adds to."""
    if region.kind == "layer":
        return None
    return next((node for node in region.inputs if shape_of(node) == shape_of(region.output)), None)


@contextlib.contextmanager
def _training(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Record gradients of these parameters."""
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
