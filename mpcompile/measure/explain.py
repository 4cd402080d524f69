"""Explain: which engine would run each layer, how long each takes on this machine, and what that gains."""

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
from mpcompile.passes.base import Context
from mpcompile.passes.lower import Lower
from mpcompile.pipeline import complete


@dataclass(frozen=True)
class LayerChoice:
    """One masked layer.

    Attributes:
        tokens: rows of its matrix product: tokens of the whole batch, or output pixels; None if unknown.
        candidates: name -> microseconds a call, or why it can't run the layer, or None where it wasn't timed.
        engine, why: what was chosen.
        us: microseconds a call of what was chosen.
        dense_us: of the dense build that it had to beat: prepacked ones count where the config says ``frozen``.
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
    """What :func:`explain` returns; ``print`` shows it as a table.

    Attributes:
        layers: the masked layers, in graph order; a layer that is used twice counts once.
        machine: processor, instruction set and threads.
        cache: the file that keeps the timings.
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
        """Microseconds of all timed layers in the dense builds that had to be beaten."""
        return sum(layer.dense_us for layer in self.layers if layer.us is not None and layer.dense_us is not None)

    @property
    def speedup(self) -> float | None:
        """Predicted for these layers together, not for the model; None where nothing was timed."""
        return self.dense_us / self.us if self.us and self.dense_us else None

    def to_json(self, indent: int | None = None) -> str:
        """Everything as JSON."""
        totals = {"us": self.us, "dense_us": self.dense_us, "speedup": self.speedup}
        return json.dumps({**dataclasses.asdict(self), **totals}, indent=indent)

    def __str__(self) -> str:
        tables = [layer.candidates for layer in self.layers]
        names = [
            name
            for name in dict.fromkeys(name for table in tables for name in table)
            if not all(str(table.get(name)).startswith("device ") for table in tables)  # not an engine of this device
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
            lines.append(f"these layers: {text} (the rest of the model is not in it)")
        else:
            lines.append("these layers: not timed")
        return "\n".join([*lines, f"     machine: {self.machine}", f"     timings: {self.cache}"])


def _cell(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:,.1f}"


def explain(
    model: nn.Module, example_inputs: Any = None, config: Config | None = None, *, progress: bool | None = None
) -> Explanation:
    """Time every engine on every masked layer of a model, and say which one the backend would take.

    Args:
        model: from :func:`mpcompile.transform`, or any that it takes: that is masked by magnitude first.
        example_inputs: as in :func:`mpcompile.transform`. Their batch size is what is timed.
        config: as for :func:`mpcompile.transform`; ``engine`` names what to pick, all are timed anyway, and ``frozen``
            lets dense layers be prepacked.
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
    found = {layer.name: layer for layer in reversed(layers(gm, imported.lifted))}
    rows = []
    for name, choice in decision.engines.items():
        layer = found[name]
        engine = dataclasses.asdict(choice)
        rows.append(LayerChoice(name, tuple(layer.weight.tensor.shape), str(layer.pattern), **engine))
    if not rows:
        raise InputError("the model has no masked layer to explain", hint="choose a pattern other than 'dense'")
    capability = torch.backends.cpu.get_cpu_capability()
    devices = {layer.weight.tensor.device for layer in found.values() if layer.weight.tensor.is_cuda}
    cards = ", ".join(sorted({torch.cuda.get_device_name(device) for device in devices}))
    machine = f"{cards or timing.cpu_name()}, {capability}, {torch.get_num_threads()} threads"
    return Explanation(rows, machine, str(timing.cache_file()))
