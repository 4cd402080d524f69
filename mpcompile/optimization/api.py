"""``mpcompile.optimize``: the fastest build of a model that keeps the accuracy the user names."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcompile.config import Config
from mpcompile.data import ranks
from mpcompile.errors import ConfigError
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import with_ordinary_tensors
from mpcompile.measure.environment import environment, first_tensor
from mpcompile.optimization.accuracy.images import LEAST, batched, check_enough, gather, split
from mpcompile.optimization.builds import Workshop
from mpcompile.optimization.frontier import Entry
from mpcompile.optimization.goal import LEVERS, TORCH, Goal, installed_runtimes
from mpcompile.optimization.numbers.timetable import read_times
from mpcompile.optimization.result import Optimized, provenance, save_all
from mpcompile.optimization.runner import Runner, check_files
from mpcompile.optimization.search import Search
from mpcompile.optimization.state import State, search_key
from mpcompile.runtimes.catalogue import named


@with_ordinary_tensors
def optimize(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    max_drop: float = 0.01,
    confidence: float = 0.8,
    objective: str = "latency",
    batch: int = 1,
    minutes: float = 20.0,
    validation: Iterable[Any] | None = None,
    allow: Sequence[str] = LEVERS,
    runtimes: Sequence[str] | None = None,
    latency: float | None = None,
    speedup: float | None = None,
    timings: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    config: Config | None = None,
    out: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    memory: int = 4 << 30,
    seed: int = 0,
    progress: bool = True,
) -> Optimized:
    """Return the fastest build of a classifier that loses at most ``max_drop`` of its top-1 accuracy.

    The search measures what merging tokens and masking layers damage on the images and cost on this machine, climbs
    from the safest choice to the fastest that keeps the accuracy on images that no fit saw, builds it in every runtime
    and precision, and times all builds in one interleaved run against the best dense build. If nothing beats that, it
    is returned as it is, and the result says so.

    With several ranks (torchrun), every rank calls this with the same arguments: they share the images, and the first
    one builds and times.

    Args:
        model: the dense model, fp32 on the CPU. It does not change.
        calibration: an iterable of batches: a few hundred images or more, as (images, labels), images alone or dicts.
            Without ``validation``, a quarter of them is for fits and the rest, with their labels, judges builds.
        max_drop: the largest drop of top-1, as a share: .01 is one point. Without labels, the largest share of images
            whose top-1 class changes, which is never less than the drop.
        confidence: of the statement "the drop is at most ``max_drop``": a build is kept if the one-sided upper bound of
            its drop at this confidence is at most that. .5 compares the drop itself.
        objective: what is minimised: ``"latency"`` as measured here, ``"macs"``, or ``"bytes"`` of the weights.
        batch: images per call, for which builds are made and timed.
        minutes: time budget of the search. What was found by then is built and timed, which may take a few minutes
            more for a large model.
        validation: batches on which builds are judged; all of ``calibration`` is then for fits.
        allow: of ``"masks"``, ``"tokens"`` and ``"bf16"`` (where the processor multiplies it).
        runtimes: of ``"torch"``, ``"onnxruntime"`` and ``"openvino"``: where builds may run. None: those installed.
        latency: milliseconds per batch to reach: the build that damages least among those that do is chosen.
        speedup: the same, as a multiple of the best dense build's speed.
        timings: files of ``mpcompile explain MODEL --pattern N:M --json FILE`` from another machine, one per pattern.
            The predicted time of the layers there is minimised, and patterns that were not timed there are not used.
            The result is for mpcompile's engine; builds are timed here all the same.
        config: options that the search leaves alone, such as ``exclude``, ``score``, ``tome_method`` or ``outputs``.
        out: a file for the best build so far, from the first minute on, with its runner beside it; see
            :func:`mpcompile.load_runner`.
        folder: a folder that keeps measurements, from which an interrupted search on the same model, images and
            options resumes.
        memory: bytes that the images may take.
        seed: seeds every random choice.
        progress: show progress bars (on a terminal).

    Raises:
        ConfigError: an option is out of range, or a runtime is not installed.
        ArtifactError: files of ``timings`` cannot be read, or are of several machines; or ``out`` cannot be written.
        InputError: there are too few images for such a statement (the message says how many are needed), labels do not
            fit, the model returns no class scores, or a target cannot be reached (the message says what can).
        MPCompileError: as :func:`mpcompile.transform`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
        >>> images = [(torch.randn(64, 1, 8, 8), torch.randint(0, 4, (64,))) for _ in range(4)]
        >>> result = mpcompile.optimize(model, images, max_drop=0.2, allow=("masks",), runtimes=("torch",))
        >>> result.runner(images[0][0][:1]).shape, result.chosen.speedup >= 1
        (torch.Size([1, 4]), True)
    """
    times, elsewhere = (None, None) if timings is None else read_times(_paths(timings))
    goal = Goal(
        max_drop=max_drop,
        confidence=confidence,
        objective=objective,
        batch=batch,
        minutes=minutes,
        allow=_names(allow),
        runtimes=installed_runtimes() if runtimes is None else _names(runtimes),
        latency=latency,
        speedup=speedup,
        elsewhere=elsewhere,
        seed=seed,
    )
    named([name for name in goal.runtimes if name != TORCH])
    config = _base(config)
    _check_model(model)
    if out is not None:
        check_files(out)
    whole = gather(model, calibration, "calibration", memory)
    if validation is None:
        fit, held = split(whole, seed, max_drop, confidence)
    else:
        inputs, labels, size = gather(model, validation, "validation", memory)
        held = batched(inputs, labels, size)
        check_enough(len(held), max_drop, confidence, len(held))
        fit = batched(*whole)
        if len(fit) < LEAST:
            raise ConfigError("there are too few calibration images", expected=f"{LEAST} or more", found=len(fit))
    fit.add_dense(model)
    held.add_dense(model)
    state = State(folder, search_key(model, (fit, held), goal.measured_by(), config.to_dict()))
    with tempfile.TemporaryDirectory() as files:
        example = held.first(batch)
        shop = Workshop(Path(files), example)

        def improved(entry: Entry, graph: IRModule, runner: Runner) -> None:
            graph.plan.provenance |= provenance(goal.record(), len(fit), len(held))
            if out is not None:
                save_all(graph, runner, out)

        search = Search(model, example, fit, held, goal, config, state, shop, improved, progress, times)
        search.frontier.conditions = _conditions(goal, example)
        module, runner = search.run()
        if runner is not None:
            runner.hold_file()
            improved(search.frontier.chosen, module, runner)
    return Optimized(module, runner, search.frontier)


def _names(value: Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _paths(value: Any) -> list[Any]:
    return [value] if isinstance(value, (str, os.PathLike)) else list(value)


def _base(config: Config | None) -> Config:
    """Return the options that recipes leave alone.

    Raises:
        ConfigError: not a Config, or one that fixes what the search decides.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError("config has the wrong type", expected="mpcompile.Config", found=type(config).__name__)
    default = Config()
    for name in ("pattern", "tome_r", "tome_reduction", "mac_reduction", "layer_patterns", "frozen"):
        if getattr(config, name) != getattr(default, name):
            raise ConfigError(
                f"the search decides {name} itself", expected=f"{name} left out of config", found=getattr(config, name)
            )
    return config


def _check_model(model: Any) -> None:
    """Check that a model is one that runs here in fp32.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError("model has the wrong type", expected="a torch.nn.Module", found=type(model).__name__)
    tensor = next((p for p in model.parameters() if p.is_floating_point()), None)
    if tensor is not None and (tensor.device.type != "cpu" or tensor.dtype is not torch.float32):
        raise ConfigError(
            "optimize works on the CPU in fp32",
            expected="model.float().cpu()",
            found=f"{tensor.dtype} on {tensor.device}",
        )


def _conditions(goal: Goal, example: Any) -> dict[str, Any]:
    found = environment()
    return {
        "processor": found["processor"],
        "isa": found["isa"],
        "threads": torch.get_num_threads(),
        "batch": len(first_tensor(example)),
        "precision": "fp32",
        "objective": goal.objective,
        "times of": goal.elsewhere or "this machine",
        "ranks": ranks.world(),
        **{name: found[name] for name in ("mpcompile", "torch", "onnxruntime", "openvino")},
    }
