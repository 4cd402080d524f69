"""Trials: the calibration images in two halves, and the divergence of a schedule from the dense model on each image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from tqdm import tqdm

from mpcompile.calibration.sensitivity import Batch, batch_length, divergences, outputs, samples
from mpcompile.capture.signature import call_graph
from mpcompile.data.outputs import class_scores
from mpcompile.ir.effects import own_copies
from mpcompile.ir.module import Imported, IRModule
from mpcompile.ir.numerics import exact, training_flags
from mpcompile.layers import fixed_batch
from mpcompile.passes.merge_tokens.schedules.search import PASSES
from mpcompile.passes.merge_tokens.schedules.solve import Schedule

IMAGES = 1024  # the first ones of the calibration data; more are not read
LEAST = 32  # images below which there is no search
_PART = 16  # images that run at once


def divide(
    model: Imported, values: Iterable[Batch], memory: int, seed: int
) -> tuple[list[Batch], list[int], list[int]]:
    """Divide calibration images into parts of equal size, half of them for a search and half for a check.

    Images are drawn at random, so that both halves hold the same kinds. A graph that was captured for one batch size
    gets its batches as they are.

    Args:
        model: the graph, with its lifted parameters.
        values: inputs of the graph, batch by batch; at most :data:`IMAGES` samples are read.
        memory: bytes that the inputs may take.
        seed: seeds the draw.

    Returns:
        The parts, and the numbers of those for the search and for the check. Both are empty if there are fewer than
        :data:`LEAST` samples that fit into memory, or only one batch that cannot be divided.
    """
    own = [n.name not in model.lifted.tensors for n in model.gm.graph.nodes if n.op == "placeholder"]
    units: list[Batch] = []
    count = taken = 0
    for batch in values:
        for unit in samples(batch, model, 1):
            size = sum(v.nbytes for v, mine in zip(unit, own, strict=True) if mine and isinstance(v, Tensor))
            if count >= IMAGES or (units and taken + size > memory):
                break
            units.append(unit)
            count, taken = count + batch_length(unit, model), taken + size
        else:
            continue
        break
    if count < LEAST or len(units) < 2:
        return [], [], []
    random.Random(seed).shuffle(units)
    single = all(batch_length(unit, model) == 1 for unit in units) and fixed_batch(model.gm) is None
    middle = len(units) // 2
    halves = [_joined(half, own, single) for half in (units[:middle], units[middle:])]
    first = len(halves[0])
    return halves[0] + halves[1], list(range(first)), list(range(first, first + len(halves[1])))


def _joined(units: Sequence[Batch], own: Sequence[bool], single: bool) -> list[Batch]:
    """Return single samples in parts of :data:`_PART`; other units as they are."""
    if not single or len(units) == 1:
        return list(units)
    return [_cat(units[start : start + _PART], own) for start in range(0, len(units), _PART)]


def _cat(units: Sequence[Batch], own: Sequence[bool]) -> Batch:
    joined: list[Any] = []
    for position, mine in enumerate(own):
        values = [unit[position] for unit in units]
        whole = mine and isinstance(values[0], Tensor) and values[0].dim()
        joined.append(torch.cat(values) if whole else values[0])
    return joined


class Trials:
    """Runs schedules on parts of the images, each in a graph of its own that shares the model's tensors.

    Args:
        model: the graph, without merges.
        insert: a schedule -> a copy of the graph with its merges.
        parts: inputs of the graph.
        memory: bytes that outputs of the model may take; beyond that, they are computed again when needed.
    """

    def __init__(
        self, model: Imported, insert: Callable[[Schedule], IRModule], parts: list[Batch], memory: int
    ) -> None:
        self.model, self.insert, self.parts, self.memory = model, insert, parts, memory
        self.graphs: dict[Schedule, IRModule] = {}
        self.wanted: dict[int, list[Tensor]] = {}
        planned = PASSES * sum(batch_length(part, model) for part in parts)
        self.bar = tqdm(total=planned, desc="schedule", unit="image", disable=None)
        first = self._run(model.gm, 0)
        scores = class_scores(first)
        self.logits = scores is not None and scores.shape[1] > 1

    @property
    def measure(self) -> str:
        """What the divergence is, in words."""
        return "KL of class scores" if self.logits else "relative squared error of outputs"

    def __call__(self, schedule: Schedule, part: int) -> Tensor:
        """Return the divergence between the outputs with and without merges, for every image in a part."""
        if schedule not in self.graphs:
            self.graphs[schedule] = self.insert(schedule)
        wanted, actual = self._dense(part), self._compared(self._run(self.graphs[schedule], part))
        count = batch_length(self.parts[part], self.model)
        self.bar.update(count)
        if any(a.dim() == 0 or len(a) != count for a in wanted):  # outputs that are not one per image
            wanted, actual = ([y.reshape(1, -1) for y in ys] for ys in (wanted, actual))
            return divergences(wanted, actual, False).expand(count)
        return divergences(wanted, actual, self.logits)

    def _dense(self, part: int) -> list[Tensor]:
        """Return the outputs of the model without merges."""
        wanted = self.wanted.get(part)
        if wanted is None:
            wanted = self._compared(self._run(self.model.gm, part))
            if sum(y.nbytes for ys in self.wanted.values() for y in ys) < self.memory:
                self.wanted[part] = wanted
        return wanted

    def _compared(self, output: Any) -> list[Tensor]:
        scores = class_scores(output) if self.logits else None
        return outputs(output) if scores is None else [scores]

    @exact()
    @torch.no_grad()
    def _run(self, gm: fx.GraphModule, part: int) -> Any:
        with training_flags(gm, False):
            return call_graph(gm, own_copies(gm, self.parts[part]))
