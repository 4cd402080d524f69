"""Builds of a search: dense models and recipes in every runtime and precision, checked, and timed in one run."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpcompile.data.calls import call_form
from mpcompile.data.outputs import numbers_of
from mpcompile.errors import InputError, MPCompileError, first_line
from mpcompile.export.onnx import write_onnx
from mpcompile.ir.numerics import training_flags
from mpcompile.measure.builds import Frozen
from mpcompile.measure.latency import time_builds
from mpcompile.measure.rivals import TOLERANCE, median_difference
from mpcompile.optimization.goal import TORCH
from mpcompile.optimization.runner import SERVED, Runner
from mpcompile.runtimes.catalogue import fp32_copy, in_fp32

SECONDS = 20.0  # that the final run takes, at least MIN_ROUNDS and at most MAX_ROUNDS
MIN_ROUNDS, MAX_ROUNDS = 9, 61
CALLS = 4  # timed per round, behind one that is not
PAUSE = 0.01  # seconds between two calls: threads of other runtimes spin for a while behind theirs


class ChannelsLast:
    """The dense model compiled with freezing, its images and weights channels last."""

    def __init__(self, model: nn.Module) -> None:
        self._orig_mod = copy.deepcopy(model).to(memory_format=torch.channels_last)
        self.run = Frozen(self._orig_mod, SERVED)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def turned(tensor: Tensor) -> Tensor:
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

        args, kwargs = pytree.tree_map_only(Tensor, turned, (args, kwargs))
        return self.run(*args, **kwargs)


class Workshop:
    """Makes builds and keeps the ONNX files that they need.

    Args:
        folder: of the files; it must last as long as the builds.
        batch: the batch that builds are made for, and timed with.
    """

    def __init__(self, folder: Path, batch: Any) -> None:
        self.folder, self.batch = folder, batch
        self._files: dict[int, Path] = {}
        self._held: list[nn.Module] = []  # modules whose files are known, by id

    def build(self, module: nn.Module, runtime: str, precision: str, backend: str = "mpsparse") -> Runner:
        """Return a build that has run once, and whose outputs are those of its module.

        Raises:
            MPCompileError: it cannot be made, or its outputs are wrong.
        """

        def made(module: nn.Module) -> Runner:
            args, kwargs = call_form(module, self.batch)
            size = next(len(leaf) for leaf in pytree.tree_leaves(self.batch) if isinstance(leaf, Tensor))
            file = None if runtime == TORCH else self._onnx(module, in_fp32(kwargs or args))
            return Runner(module, runtime, precision, backend=backend, batch=size, onnx=file)

        runner: Runner = self.checked(made, module, f"{runtime} {precision}", TOLERANCE[precision])
        return runner

    def checked(
        self,
        make: Callable[[nn.Module], Any],
        module: nn.Module,
        name: str = "torch",
        tolerance: float = TOLERANCE["fp32"],
    ) -> Any:
        """Return what ``make`` makes of a module, after one call whose outputs are compared with the module's.

        Raises:
            MPCompileError: it cannot be made, or its outputs are wrong.
        """
        args, kwargs = call_form(module, self.batch)
        try:
            build = make(module)
            with torch.no_grad(), training_flags(module, False):
                expected = numbers_of(module(*args, **kwargs))
                difference = median_difference(numbers_of(build(*args, **kwargs)), expected)
        except MPCompileError:
            raise
        except Exception as error:  # whatever a runtime or a compiler raises: the other builds go on
            text = f"{name} cannot run it: {type(error).__name__}: {first_line(error):.200}"
            raise InputError(text) from error
        if not difference <= tolerance:
            raise InputError(
                f"{name} returns wrong outputs",
                expected="those of the graph in torch",
                found=f"a relative difference of {difference:.1e}",
            )
        return build

    def _onnx(self, module: nn.Module, example: Any) -> Path:
        """Return the ONNX file of a module, written once."""
        if id(module) not in self._files:
            path = self.folder / f"{len(self._files)}.onnx"
            write_onnx(fp32_copy(module), example, path)
            self._files[id(module)] = path
            self._held.append(module)
        return self._files[id(module)]

    def time(self, builds: Mapping[str, Callable[..., Any]], seconds: float, progress: bool) -> dict[str, list[float]]:
        """Return milliseconds of interleaved calls, per build: as many rounds as ``seconds`` allow."""
        with torch.no_grad():
            once = time_builds(builds, self.batch, 2, False, PAUSE, CALLS)
            each = (CALLS + 1) * sum(statistics.median(times) for times in once.values()) / 1e3 + PAUSE * len(builds)
            rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / max(each, 1e-6))))
            return time_builds(builds, self.batch, rounds, progress, PAUSE, CALLS)


def has_convolutions(model: nn.Module) -> bool:
    """Return True if a model has convolutions beyond its stem, for which the memory order of images matters."""
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1
