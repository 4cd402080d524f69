"""The measurements behind a search: what merging and patterns damage on calibration images, and what they cost here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from mpcompile.capture.importers import import_model
from mpcompile.config import Config
from mpcompile.errors import ConfigError, NotEligibleError
from mpcompile.ir.macs import node_macs
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import shape_of
from mpcompile.ir.view import LayerOp, layers, parameter_read
from mpcompile.kernels.dispatch import LayerSpec, choose, choose_dense
from mpcompile.kernels.nm_format import Pattern, packed_bytes
from mpcompile.optimization.accuracy.images import Images
from mpcompile.optimization.numbers.model import Drops, Level, Menu, Model, interpolated
from mpcompile.optimization.numbers.timetable import Times
from mpcompile.passes.allocate.menu import Candidate, find_candidates, label
from mpcompile.passes.allocate.prediction import CALIBRATED, predict, split_samples
from mpcompile.passes.base import Context, Request
from mpcompile.passes.dead_tokens import SkipDeadTokens
from mpcompile.passes.lower import spec_of
from mpcompile.passes.merge_tokens.insert import MergeTokens
from mpcompile.pipeline import Pipeline, run_pipeline, transform

REDUCTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # shares of the multiply-accumulates at which merging is measured
GENTLE = 0.3  # up to here, one level in between; beyond, two
_SIZES = (1.0, 0.5, 0.25)  # shares of a layer's rows at which patterns are timed
LATENCY, MACS, BYTES = "latency", "macs", "bytes"
OBJECTIVES = (LATENCY, MACS, BYTES)


class Space:
    """Measures a model for a search.

    Args:
        model: the dense model.
        example: one batch of the size that latency counts for.
        config: the options that recipes leave alone.
        fit: images for fits.
        objective: what a choice costs, of :data:`OBJECTIVES`.
        seed: seeds every random choice.
        progress: show progress bars (on a terminal).
        times: times of layers on another machine, in place of this one's.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        config: Config,
        fit: Images,
        objective: str,
        seed: int,
        progress: bool,
        times: Times | None = None,
    ) -> None:
        self.model, self.example, self.config, self.fit = model, example, config, fit
        self.objective, self.seed, self.hidden = objective, seed, None if progress else True
        self.times = times
        self.notes: list[str] = []
        self.pairs: list[tuple[float, float]] = []  # damage, expected drop
        self._us: dict[str, float] = {}
        self._tops: dict[tuple[int, ...], int] = {}  # rows of each shape in the dense graph

    def measure(self, tokens: bool, masks: bool, exact_us: float) -> Model:
        """Return the numbers of a search.

        Args:
            tokens, masks: what the search may use.
            exact_us: microseconds that the model without its dead tokens takes for ``example`` on our engine.
        """
        schedules = [((), 0.0, self._merged(tome_r=0)), *(self._schedules() if tokens else [])]
        menus = self._menus() if masks else []
        costs = self._costs([graph for _, _, graph in schedules], menus, exact_us)
        levels = [Level(merges, d, cost) for (merges, d, _), (cost, _) in zip(schedules, costs, strict=True)]
        found = [_menu(candidate, [each[number] for _, each in costs]) for number, candidate in enumerate(menus)]
        return Model(levels, found, drops=Drops().fit(self.pairs))

    def _merged(self, **options: Any) -> IRModule:
        """Return the model with a schedule of merging, no masks, and without its dead tokens."""
        changes = {"pattern": "dense", "mac_reduction": None, "patterns": (), "layer_patterns": ()}
        config = replace(self.config, **{**changes, "tome_reduction": None, "tome_schedule": "auto", **options})
        pipeline = Pipeline([MergeTokens(), SkipDeadTokens()])
        return transform(self.model, self.example, config, pipeline=pipeline, seed=self.seed)

    def _schedules(self) -> list[tuple[tuple[int, ...], float, IRModule]]:
        """Return schedules of merging with their damage and their graphs, by rising damage.

        Those of :data:`REDUCTIONS` are measured; the damage of those in between is interpolated. Damage grows by
        powers, so that late levels are closer together.
        """
        found: list[tuple[tuple[int, ...], float, IRModule]] = []
        last = before = 0.0
        for reduction in tqdm(REDUCTIONS, desc="tokens", unit="level", disable=self.hidden):
            between = 1 if reduction <= GENTLE else 2
            shares = [last + (reduction - last) * k / (between + 1) for k in range(1, between + 2)]
            try:
                solved = [self._solved(share) for share in shares]
            except NotEligibleError as error:
                self.notes.append(f"no tokens merge: {error.message}")
                return []
            except ConfigError:  # more than merging can save
                break
            outcome = self.fit.judge(solved[-1][1])
            self.pairs.append((outcome.divergence, outcome.expected))
            damage = max(outcome.divergence, before, 1e-9)
            ends = (before or damage / 16, damage)
            damages = [ends[0] * (ends[1] / ends[0]) ** (k / len(solved)) for k in range(1, len(solved) + 1)]
            found += [(merges, d, gm) for (merges, gm), d in zip(solved, damages, strict=True)]
            last, before = reduction, damage
        distinct = {merges: (merges, damage, gm) for merges, damage, gm in found if any(merges)}
        return list(distinct.values())

    def _solved(self, share: float) -> tuple[tuple[int, ...], IRModule]:
        """Return the tokens to merge per block that save a share of the multiply-accumulates, and the merged graph."""
        gm = self._merged(tome_r="auto", tome_reduction=share)
        record = next(r.decision for r in gm.plan.passes if r.name == MergeTokens.name)
        streams = record.get("streams", [record])
        return tuple(int(r) for stream in streams for r in stream["r"]), gm

    def _menus(self) -> list[Candidate]:
        """Return every weight that may be masked, with the damage of its patterns."""
        offered = () if self.times is None else tuple(dict.fromkeys(["dense", *(pattern for _, pattern in self.times)]))
        config = replace(self.config, mac_reduction=0.5, patterns=offered, layer_patterns=(), tome_r=0)
        imported = import_model(self.model, self.example)
        ctx = Context(
            config,
            imported.inputs,
            imported.lifted,
            calibration=list(self.fit.batches),
            requests=[Request.REFIT],
            seed=self.seed,
        )
        gm = run_pipeline(imported, replace(config, mac_reduction=None, patterns=(), pattern="dense"), Pipeline([]))
        try:
            candidates = find_candidates(gm, ctx)
        except NotEligibleError as error:
            self.notes.append(f"nothing is masked: {error.message}")
            return []
        data = split_samples(gm, ctx, candidates, CALIBRATED, False)
        predict(gm, ctx, candidates, CALIBRATED, data, 0.0)
        return candidates

    def _costs(
        self, graphs: Sequence[IRModule], menus: Sequence[Candidate], exact_us: float
    ) -> list[tuple[float, list[list[float]]]]:
        """Return for each graph the cost of the whole with dense weights, and of every pattern of every weight."""
        names = {c.uses[0].weight.name: number for number, c in enumerate(menus)}
        found = []
        rest: float | None = None
        first_rows = 1.0
        for gm in tqdm(graphs, desc="cost", unit="level", disable=self.hidden):
            each = [[0.0] * len(c.options) for c in menus]
            total = rows = 0.0
            macs = node_macs(gm, Lifted()) if self.objective == MACS else {}
            for layer in layers(gm):
                name = _stored(gm, layer)
                number = names.get(name)
                options = [None] if number is None else menus[number].options
                values = [self._cost(layer, pattern, macs) for pattern in options]
                total += values[0]
                rows += _rows(layer)
                if number is not None:
                    each[number] = [a + b for a, b in zip(each[number], values, strict=True)]
            if self.objective == LATENCY and self.times is None:
                if rest is None:
                    rest, first_rows = max(0.0, exact_us - total), rows
                total += rest * rows / first_rows
            elif self.objective == MACS:
                total = float(gm.plan.macs.executed)
            found.append((total, each))
        return found

    def _cost(self, layer: LayerOp, pattern: Pattern | None, macs: dict[str, int]) -> float:
        density = 1.0 if pattern is None else pattern.density
        weight = layer.weight.tensor
        if self.objective == MACS:
            return macs.get(layer.name, 0) * density
        if self.objective == BYTES:
            size = weight.numel() * weight.itemsize
            return float(size if pattern is None else packed_bytes(weight.shape, weight.itemsize, *pattern))
        return self._microseconds(layer, pattern)

    def _microseconds(self, layer: LayerOp, pattern: Pattern | None) -> float:
        """Return the time of a layer, interpolated between numbers of rows at which its shape was timed."""
        spec = spec_of(layer, pattern or Pattern(1, 1))
        if spec.inputs is None:
            return 0.0
        if self.times is not None:
            known = self.times.get((spec.shape, label(pattern)))
            if known is None:  # not offered; a dense layer that was not timed costs nothing that a choice could save
                return 0.0 if pattern is None else math.inf
            return interpolated(known, spec.tokens or 1)
        if spec.geometry is not None:
            return self._timed(spec, pattern is None)
        full = max(1, spec.tokens or 1)
        top = self._tops.setdefault(spec.shape, full)  # the dense graph comes first, and has the most rows
        at = {}
        for share in _SIZES:
            count = max(1, round(top * share))
            at[count] = self._timed(replace(spec, inputs=(1, count, spec.shape[1])), pattern is None)
        return interpolated(at, full)

    def _timed(self, spec: LayerSpec, dense: bool) -> float:
        key = f"{spec} {dense}"
        if key not in self._us:
            choice = choose_dense(spec) if dense and spec.geometry is None else choose(spec, frozen=True)
            us = choice.dense_us if dense and spec.geometry is not None else choice.us
            self._us[key] = us or 0.0
        return self._us[key]


def _menu(candidate: Candidate, costs: Sequence[Sequence[float]]) -> Menu:
    """Return the menu of a weight, without patterns whose cost is not known."""
    places = [i for i in range(len(candidate.options)) if all(math.isfinite(level[i]) for level in costs)]
    return Menu(
        tuple(candidate.names),
        tuple(label(candidate.options[i]) for i in places),
        tuple(candidate.costs[i] for i in places),
        tuple(tuple(level[i] for i in places) for level in costs),
    )


def _stored(gm: IRModule, layer: LayerOp) -> str:
    """Return the name of the weight that a layer takes all or some rows of."""
    whole = None if layer.weight.whole is None else parameter_read(gm, layer.weight.whole, Lifted())
    return layer.weight.name if whole is None else whole.name


def _rows(layer: LayerOp) -> float:
    """Return the number of rows of the layer's input: what the elementwise operators around it are proportional to."""
    shape = shape_of(layer.input)
    if shape is None or len(shape) < 2:
        return 0.0
    return float(torch.Size(shape).numel() / (shape[-1] if layer.geometry is None else shape[1]))
