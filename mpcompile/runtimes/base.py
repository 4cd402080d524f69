"""The interface of a runtime: an ONNX file goes in, a callable comes out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpcompile.errors import ConfigError, InputError

PRECISIONS = ("fp32", "bf16", "int8")
Arguments = tuple[Sequence[Any], Mapping[str, Any]]  # of one call of the model


@dataclass(frozen=True)
class Port:
    """An input of a model in a runtime: its name, and its shape with None for an axis that is free."""

    name: str
    shape: tuple[int | None, ...]


def titled(name: str, precision: str) -> str:
    """Return a name in tables: with the precision behind it, unless that is fp32."""
    return name if precision == "fp32" else f"{name} {precision}"


@dataclass
class Build:
    """A model in a runtime. It is called as the model is, and returns its tensors.

    Attributes:
        title, version: of the runtime.
        precision: see :data:`PRECISIONS`.
        inputs: what the model takes, in order.
        outputs: names of what it returns, in order.
        run: one array per input -> one array per output.
        weight_bytes: size of the weights in their file; None if they are those of the model.

    Example:
        >>> build = Build("Doubler", "1.0", "fp32", (Port("x", (2, 3)),), ("y",), lambda feed: [2 * feed["x"]])
        >>> build(torch.ones(2, 3)).sum(), build(x=torch.ones(1, 3)).shape
        (tensor(12.), torch.Size([1, 3]))
    """

    title: str
    version: str
    precision: str
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    run: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]
    weight_bytes: int | None = None

    @property
    def name(self) -> str:
        """The runtime and, if it is not fp32, the precision."""
        return titled(self.title, self.precision)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output, or a dict of several by name.

        A batch that is shorter than the one that the model was built for is filled up with its last sample; outputs
        have as many samples as the inputs.

        Raises:
            InputError: an input is missing, or has another shape.
        """
        arrays, samples = self.feed(args, kwargs)
        full = {shape[0] for port in self.inputs if (shape := port.shape)}
        outputs = [torch.from_numpy(np.asarray(array)) for array in self.run(arrays)]
        if samples is not None:
            outputs = [out[:samples] if out.dim() and len(out) in full else out for out in outputs]
        return outputs[0] if len(outputs) == 1 else dict(zip(self.outputs, outputs, strict=True))

    def feed(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], int | None]:
        """Return one array per input, and the number of samples if they had to be filled up to a whole batch.

        Raises:
            InputError: an input is missing, or has another shape.
        """
        arrays = arrays_by_name([port.name for port in self.inputs], args, kwargs)
        samples: int | None = None
        for port in self.inputs:
            array = arrays[port.name]
            if _fits(array.shape, port.shape):
                continue
            short = array.ndim and _fits(array.shape[1:], port.shape[1:]) and 0 < len(array) < (port.shape[0] or 0)
            if not short:
                raise InputError(
                    f"{self.title} has the model for another shape of its input {port.name!r}",
                    expected=port.shape,
                    found=array.shape,
                )
            samples = len(array)
            missing = (port.shape[0] or 0) - samples
            arrays[port.name] = np.concatenate([array, np.repeat(array[-1:], missing, 0)])
        return arrays, samples


class Runtime(ABC):
    """A runtime that is not torch.

    A new one is a module of its own and an entry in :data:`mpcompile.runtimes.catalogue.RUNTIMES`.
    """

    name: ClassVar[str]  # in options
    title: ClassVar[str]  # in tables
    package: ClassVar[str]  # that is imported, and whose version is reported
    extra: ClassVar[str]  # of mpcompile, that installs it

    @property
    def installed(self) -> bool:
        """True if its package can be imported."""
        return importlib.util.find_spec(self.package) is not None

    @property
    def version(self) -> str:
        """The version of its package."""
        return importlib.metadata.version(self.package)

    def check(self, precision: str = "fp32") -> None:
        """Check that the runtime is installed and has a precision here.

        Raises:
            ConfigError: it is not, and the message names the extra that installs it; or it has not.
        """
        if not self.installed:
            raise missing_package(self.title, self.package, self.extra)
        if precision not in self.precisions():
            raise ConfigError(
                f"{self.title} does not run {precision} here", expected=", ".join(self.precisions()), found=precision
            )

    @abstractmethod
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions that are worth having on this processor, of :data:`PRECISIONS`."""

    @abstractmethod
    def load(
        self, path: Path, precision: str = "fp32", threads: int | None = None, calibration: Iterable[Arguments] = ()
    ) -> Build:
        """Load an ONNX file.

        Args:
            path: the file; it is not needed afterwards.
            precision: one of :meth:`precisions`.
            threads: of the processor; None for as many as torch uses.
            calibration: ``(args, kwargs)`` of calls from which the ranges of int8 are taken.

        Raises:
            ConfigError: the runtime is not installed, has no such precision, or int8 lacks its calibration.
            Exception: whatever the runtime raises if it cannot take the model.
        """


def missing_package(who: str, package: str, extra: str) -> ConfigError:
    """Return the error for a package that is not installed."""
    return ConfigError(f"{who} needs the package {package}", hint=f"run pip install 'mpcompile[{extra}]'")


def arrays_by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the arguments of a call as arrays by the names of the inputs of its ONNX file.

    Args:
        names: ``image``, or ``batch.image`` and ``batch.id`` for the entries of one argument, as
            :func:`mpcompile.export.save_onnx` names them.
        args: positional arguments, in the order of the names.
        kwargs: keyword arguments, or the entries of the one mapping that the model takes.

    Raises:
        InputError: an input is missing.

    Example:
        >>> found = arrays_by_name(["a", "b.c"], [torch.ones(2), {"c": torch.ones(3)}], {})
        >>> found["a"].shape, found["b.c"].shape
        ((2,), (3,))
    """
    owners = list(dict.fromkeys(name.partition(".")[0] for name in names))
    given = [value for value in args if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(_plain(value)))]
    example = {**dict(zip(owners, given, strict=False)), **kwargs}
    if len(owners) == 1 and owners[0] not in example:  # the mapping is the one input
        example = {owners[0]: dict(kwargs)}
    leaves = {}
    for keys, leaf in pytree.tree_leaves_with_path(_plain(example)):
        leaves[".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)] = leaf
    missing = next((name for name in names if name not in leaves), None)
    if missing is not None:
        raise InputError(f"the input {missing!r} is missing", expected=", ".join(names), found=", ".join(leaves))
    return {name: _array(leaves[name]) for name in names}


def calibration_arrays(build: Build, calls: Iterable[Arguments], most: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of the calls that calibrate a build, until ``most`` samples have been used."""
    seen = 0
    for args, kwargs in calls:
        arrays, samples = build.feed(args, kwargs)
        yield arrays
        seen += next((len(array) for array in arrays.values() if array.ndim), 1) if samples is None else samples
        if seen >= most:
            return


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    return np.asarray((value.float() if value.dtype is torch.bfloat16 else value).numpy())  # numpy has no bf16


def _fits(found: Sequence[int], shape: Sequence[int | None]) -> bool:
    return len(found) == len(shape) and all(size in (None, n) for n, size in zip(found, shape, strict=True))


def _plain(value: Any) -> Any:
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
