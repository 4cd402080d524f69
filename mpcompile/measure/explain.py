"""Explain: the engine that each layer would run on, the time of every candidate on this machine, and the gain."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from mpcompile.capture.importers import import_model
from mpcompile.config import Config
from mpcompile.errors import InputError, printable
from mpcompile.ir.view import layers
from mpcompile.kernels import timing
from mpcompile.kernels.machine import cpu_name
from mpcompile.passes.base import Context
from mpcompile.passes.lower import Lower
from mpcompile.pipeline import complete


@dataclass(frozen=True)
class LayerChoice:
    """One masked layer.

    Attributes:
        tokens: rows of its matrix product: tokens of the whole batch, or output pixels; None if unknown.
        candidates: by engine, microseconds per call, or the reason why it cannot run the layer, or None if not timed.
        engine, why: the choice, and its reason.
        us: microseconds per call of the chosen engine.
        dense_us: microseconds per call of the dense build to beat, which may be a prepacked one if the config sets
            ``frozen``.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str
    tokens: int | None
    candidates: dict[str, float | str | None]
    engine: str
    why: str
    us: float | None
    dense_us: float | None


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; ``print`` shows it as a table.

    Attributes:
        layers: the masked layers, in graph order; a layer that is used twice counts once.
        machine: processor, instruction set and threads.
        cache: the file with the timings.

    Example:
        >>> Explanation([], "AMD EPYC, avx512, 2 threads", "timings.json").us
        0
    """

    layers: list[LayerChoice]
    machine: str
    cache: str

    @property
    def us(self) -> float:
        """Microseconds of all timed layers on the chosen engines."""
        return sum(layer.us for layer in self.layers if layer.us is not None)

    @property
    def dense_us(self) -> float:
        """Microseconds of all timed layers in the dense builds to beat."""
        return sum(layer.dense_us for layer in self.layers if layer.us is not None and layer.dense_us is not None)

    @property
    def speedup(self) -> float | None:
        """Predicted speed-up of these layers together, not of the model; None if nothing was timed."""
        return self.dense_us / self.us if self.us and self.dense_us else None

    def to_json(self, indent: int | None = None) -> str:
        """Return layers, machine, cache and totals as JSON."""
        totals = {"us": self.us, "dense_us": self.dense_us, "speedup": self.speedup}
        return json.dumps({**dataclasses.asdict(self), **totals}, indent=indent)

    def __str__(self) -> str:
        tables = [layer.candidates for layer in self.layers]
        names = [
            name
            for name in dict.fromkeys(name for table in tables for name in table)
            if not all(str(table.get(name)).startswith("device ") for table in tables)  # engines of other devices
        ]
        rows = []
        for layer in self.layers:
            cells = [_cell(layer.candidates.get(name)) for name in names]
            share = f"{layer.us / self.us:.1%}" if layer.us is not None and self.us else ""
            tokens = "" if layer.tokens is None else str(layer.tokens)
            shape = "x".join(map(str, layer.shape))
            name = printable(layer.name, 200)
            rows.append([name, shape, layer.pattern, tokens, *cells, layer.engine, share, layer.why])
        head = ["layer", "weight", "pattern", "tokens", *(f"{name} us" for name in names), "pick", "share", "why"]
        align = ("left", "left", "left", "right", *("right" for _ in names), "left", "right", "left")
        lines = [tabulate(rows, headers=head, disable_numparse=True, colalign=align if rows else None), ""]
        if self.speedup is not None:
            text = f"{self.dense_us:,.0f} us dense, {self.us:,.0f} us as picked: {self.speedup:.2f}x"
            lines.append(f"these layers: {text} (the rest of the model is not included)")
        else:
            lines.append("these layers: not timed")
        return "\n".join([*lines, f"     machine: {self.machine}", f"     timings: {self.cache}"])


def _cell(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,.1f}"


def explain(
    model: nn.Module, example_inputs: Any = None, config: Config | None = None, *, progress: bool | None = None
) -> Explanation:
    """Time every engine on every masked layer of a model, and report which one the backend would choose.

    Args:
        model: from :func:`mpcompile.transform`, or any model that it accepts, which is masked by magnitude first.
        example_inputs: as in :func:`mpcompile.transform`; their batch size is timed.
        config: as for :func:`mpcompile.transform`; ``engine`` fixes the choice, but all engines are timed, and
            ``frozen`` allows prepacked dense layers.
        progress: False shows no progress bar; None shows one on a terminal.

    Raises:
        MPCompileError: as :func:`mpcompile.transform`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
        >>> [layer.name for layer in explain(model, torch.randn(4, 64)).layers]
        ['0']
    """
    config = dataclasses.replace(Config() if config is None else config, score="magnitude")
    imported = import_model(model, example_inputs)
    gm = complete(imported, config)
    step = Lower(measured=True, progress=progress)
    decision = step.plan(gm, Context(config, imported.inputs, imported.lifted, plan=gm.plan))
    masked = {layer.name: layer for layer in reversed(layers(gm, imported.lifted))}
    rows = []
    for name, choice in decision.engines.items():
        layer = masked[name]
        engine = dataclasses.asdict(choice)
        rows.append(LayerChoice(name, tuple(layer.weight.tensor.shape), str(layer.pattern), **engine))
    if not rows:
        raise InputError("the model has no masked layer to explain", hint="choose a pattern other than 'dense'")
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {layer.weight.tensor.device for layer in masked.values() if layer.weight.tensor.is_cuda}
    cards = ", ".join(sorted({torch.cuda.get_device_name(device) for device in devices}))
    machine = f"{cards or cpu_name()}, {capability}, {torch.get_num_threads()} threads"
    return Explanation(rows, machine, str(timing.cache_file()))
