"""The contest: builds of dense model and recipes, judged where they are not exact, timed together, and the winner."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

from mpcompile.data import ranks
from mpcompile.errors import InputError, MPCompileError
from mpcompile.ir.module import IRModule
from mpcompile.kernels.nm_format import Pattern, packed_bytes
from mpcompile.measure.cost import dense_macs
from mpcompile.optimization.accuracy.images import Images
from mpcompile.optimization.accuracy.outcome import Outcome
from mpcompile.optimization.builds import ChannelsLast, Workshop, has_convolutions
from mpcompile.optimization.frontier import CHOSEN, Entry, Frontier
from mpcompile.optimization.goal import TORCH, Goal
from mpcompile.optimization.numbers.space import BYTES, LATENCY
from mpcompile.optimization.recipe import Recipe
from mpcompile.optimization.runner import Runner
from mpcompile.runtimes.catalogue import RUNTIMES

PROMISING = 1.5  # a runtime whose dense build takes this many times the best one's gets no further builds


class Contest:
    """Holds the entries of a frontier and their builds. Only the first rank builds and times.

    Args:
        model: the dense model.
        goal: what to reach.
        workshop: makes the builds.
        graph: a recipe -> its transformed graph.
        judges: a recipe -> the images that it was fitted to nothing of.
    """

    def __init__(
        self,
        model: nn.Module,
        goal: Goal,
        workshop: Workshop,
        graph: Callable[[Recipe], IRModule],
        judges: Callable[[Recipe], Images],
    ) -> None:
        self.model, self.goal, self.workshop, self.graph, self.judges = model, goal, workshop, graph, judges
        self.frontier = Frontier([], goal.max_drop, goal.confidence)
        self.builds: dict[Hashable, Callable[..., Any]] = {}

    # --- Entries ---

    def entry(self, recipe: Recipe, runtime: str | None, precision: str, outcome: Outcome | None) -> Entry:
        """Add an entry for a recipe, or replace that of the same build, and return it."""
        entry = Entry(title(recipe, runtime, precision), recipe, runtime, precision, outcome=outcome)
        for same in [e for e in self.frontier.entries if not e.dense and e.recipe == recipe]:
            if same.runtime is None:
                entry.predicted_drop = same.predicted_drop
                entry.predicted_ms = same.predicted_ms if runtime == TORCH and precision == "fp32" else None
            if same.key == entry.key:
                self.frontier.entries.remove(same)
        self.frontier.entries.append(entry)
        return entry

    def exact(self) -> Entry:
        """Return the entry of the model without its dead tokens on our engine: what recipes are compared with."""
        return next(e for e in self.frontier if e.key == (Recipe(), TORCH, "fp32") and not e.dense)

    @staticmethod
    def slot(entry: Entry) -> Hashable:
        """Return the key of an entry's build."""
        return entry.name if entry.dense else entry.key

    # --- Builds ---

    def add_dense(self) -> None:
        """Build the model as it is, in every runtime and precision, and without its dead tokens on our engine."""
        macs = dense_macs(self.model, self.workshop.batch)
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        for name, runtime, precision, make in self._dense_builds():
            entry = Entry(name, runtime=runtime, precision=precision, dense=True, macs=macs)
            entry.weight_bytes = size if precision == "fp32" else size // 2
            self.frontier.entries.append(entry)
            if self._made(entry, make) and precision != "fp32":
                self._judge(entry)
        self.make(self.entry(Recipe(), TORCH, "fp32", unchanged(self.judges(Recipe()))))

    def _dense_builds(self) -> list[tuple[str, str, str, Callable[[], Callable[..., Any]]]]:
        shop, model = self.workshop, self.model
        found: list[tuple[str, str, str, Callable[[], Callable[..., Any]]]] = []
        for runtime in self.goal.runtimes:
            for precision in self.precisions(runtime):
                name = title(Recipe(), runtime, precision, "torch")
                make = functools.partial(shop.build, model, runtime, precision, "inductor")
                found.append((name, runtime, precision, make))
                if runtime == TORCH and precision == "fp32" and has_convolutions(model):
                    last = functools.partial(shop.checked, ChannelsLast, model)
                    found.append((f"{name} channels last", runtime, precision, last))
        return found

    def precisions(self, runtime: str) -> tuple[str, ...]:
        """Return the precisions that are allowed and that a runtime has here."""
        own = self.goal.precisions if runtime == TORCH else RUNTIMES[runtime].precisions()
        return tuple(precision for precision in self.goal.precisions if precision in own)

    def promising(self) -> tuple[str, ...]:
        """Return the runtimes whose dense fp32 build is not far behind the best one's."""
        if self.goal.elsewhere:
            return (TORCH,)
        timed = [e for e in self.frontier if e.dense and e.precision == "fp32" and e.latency_ms]
        times = {e.runtime: min(o.latency_ms or 0 for o in timed if o.runtime == e.runtime) for e in timed}
        best = min(times.values(), default=1.0)
        near = tuple(r for r in self.goal.runtimes if r == TORCH or times.get(r, math.inf) <= PROMISING * best)
        return tuple(ranks.broadcast(near))

    def make(self, entry: Entry) -> bool:
        """Build an entry's recipe, and return True if that worked; False on other ranks than the first."""
        made = self._made(
            entry, lambda: self.workshop.build(self.graph(entry.recipe), entry.runtime or TORCH, entry.precision)
        )
        if made:
            graph = self.graph(entry.recipe)
            entry.macs, entry.weight_bytes = graph.plan.macs.executed, stored_bytes(graph, entry.precision)
        return made

    def make_judged(self, entry: Entry) -> bool:
        """Build an entry whose precision is not that of its graph, and return True if it keeps the accuracy."""
        made = self.make(entry)
        if made:
            self._judge(entry)
        return bool(ranks.broadcast(made and self.frontier.keeps(entry)))

    def _made(self, entry: Entry, make: Callable[[], Callable[..., Any]]) -> bool:
        if ranks.rank():
            return False
        try:
            self.builds[self.slot(entry)] = make()
        except MPCompileError as error:
            entry.verdict = f"failed: {error}"
            return False
        return True

    def _judge(self, entry: Entry) -> None:
        """Judge a build itself, not its graph in fp32."""
        images = self.judges(entry.recipe)
        entry.outcome = images.judge(self.builds[self.slot(entry)], size=self.goal.batch, alone=True)
        if not self.frontier.keeps(entry):
            entry.verdict = self.frontier.shortfall(entry.outcome)

    # --- Latency and the winner ---

    def time(self, seconds: float, progress: bool) -> None:
        """Time all builds that keep the accuracy in one interleaved run, and set their speed-ups."""
        if not ranks.rank():
            keeping = [entry for entry in self.frontier if self.frontier.keeps(entry)]
            entries = {str(self.slot(entry)): entry for entry in keeping if self.slot(entry) in self.builds}
            builds = {name: self.builds[self.slot(entry)] for name, entry in entries.items()}
            for name, samples in self.workshop.time(builds, seconds, progress).items():
                low, middle, high = statistics.quantiles(samples, n=4)
                entries[name].latency_ms, entries[name].quartiles_ms = middle, (low, high)
            best = self.frontier.best_dense
            for entry in entries.values():
                if best is not None and best.latency_ms and entry.latency_ms:
                    entry.speedup = best.latency_ms / entry.latency_ms
        self.frontier.entries = ranks.broadcast(self.frontier.entries)

    def timed(self) -> list[Entry]:
        """Return the entries that keep the accuracy and have a latency."""
        return [e for e in self.frontier if e.latency_ms is not None and self.frontier.keeps(e)]

    def best(self) -> Entry | None:
        """Return the fastest entry, or with a target the one that meets it with the least predicted drop, if any."""
        if not self.goal.targeted:
            return min(self.timed(), key=self._cost, default=None)
        meeting = [e for e in self.timed() if self._meets(e)]
        return min(meeting, key=lambda e: (e.predicted_drop or 0.0, self._cost(e)), default=None)

    def _cost(self, entry: Entry) -> float:
        if self.goal.elsewhere is not None:
            return math.inf if entry.predicted_ms is None else entry.predicted_ms
        if self.goal.objective == LATENCY:
            return entry.latency_ms or 0.0
        value = entry.weight_bytes if self.goal.objective == BYTES else entry.macs
        return float(value if value is not None else math.inf)

    def _meets(self, entry: Entry) -> bool:
        if self.goal.latency is not None:
            return (entry.latency_ms or 0.0) <= self.goal.latency
        return (entry.speedup or 0.0) >= (self.goal.speedup or 0.0)

    def choose(self) -> Entry:
        """Mark the winner, and return it.

        Raises:
            InputError: no build could be made, or none meets the target; the message says what can be reached.
        """
        timed, chosen = self.timed(), self.best()
        if not timed:
            raise InputError(
                "no build of the model could be made",
                expected="at least the dense model in one runtime",
                found="; ".join(f"{e.name}: {e.verdict}" for e in self.frontier if e.verdict)[:400],
            )
        for entry in timed:
            entry.verdict = "more damage than needed" if self.goal.targeted and self._meets(entry) else "slower"
            if self.goal.objective != LATENCY or self.goal.elsewhere:
                entry.verdict = f"more {'predicted time' if self.goal.elsewhere else self.goal.objective}"
        if chosen is None:
            raise self._unreachable(timed)
        chosen.verdict = CHOSEN
        return chosen

    def _unreachable(self, timed: list[Entry]) -> InputError:
        fastest = min(timed, key=lambda e: e.latency_ms or 0.0)
        slowest = self.frontier.best_dense or fastest
        goal = f"{self.goal.latency:g} ms" if self.goal.latency is not None else f"{self.goal.speedup:g}x"
        return InputError(
            f"{goal} cannot be reached with a drop of at most {self.goal.max_drop:.2%}",
            expected=f"{fastest.latency_ms:.3g} ms ({fastest.speedup or 1:.2f}x) or slower; "
            f"the best dense build takes {slowest.latency_ms:.3g} ms",
            found=goal,
            hint="allow a larger drop, or give more images, so that less of the drop is uncertainty",
        )

    def runner(self, entry: Entry) -> Runner:
        """Return the runner of an entry. In a dense one that is saved, the exact graph takes the model's place."""
        build = self.builds[self.slot(entry)]
        if isinstance(build, Runner) and isinstance(build.module, IRModule):
            return build
        return Runner(
            self.graph(Recipe()),
            entry.runtime or TORCH,
            entry.precision,
            backend="inductor",
            batch=self.goal.batch,
            onnx=build.onnx if isinstance(build, Runner) else None,
            build=build,
        )


def title(recipe: Recipe, runtime: str | None, precision: str, engine: str = "mpcompile") -> str:
    """Return the name of a build.

    Example:
        >>> title(Recipe((4, 4)), "openvino", "bf16"), title(Recipe(), "torch", "fp32", "torch")
        ('8 tokens merged, openvino bf16', 'dense, torch')
    """
    if runtime is None:
        return str(recipe)
    return f"{recipe}, {engine if runtime == TORCH else runtime}" + ("" if precision == "fp32" else f" {precision}")


def unchanged(images: Images) -> Outcome:
    """Return the outcome of a build that computes what the dense model computes."""
    if images.labels is None or images.scores is None:
        return Outcome(len(images), 0, None, None, None, 0.0, 0.0)
    pairs = zip(images.scores, images.labels, strict=True)
    right = sum(int((scores.argmax(-1) == labels).sum()) for scores, labels in pairs)
    return Outcome(len(images), 0, 0, 0, right, 0.0, 0.0)


def stored_bytes(gm: IRModule, precision: str) -> int:
    """Return the bytes of a graph's weights as they are packed, in a precision."""
    total = sum(p.numel() * p.element_size() for p in gm.parameters())
    for layer in gm.plan.layers.values():
        if layer.pattern != "dense":
            total -= 4 * math.prod(layer.shape) - packed_bytes(layer.shape, 4, *Pattern.parse(layer.pattern))
    return total if precision == "fp32" else total // 2
