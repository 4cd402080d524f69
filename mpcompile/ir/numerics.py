"""Torch's global modes: autocast is meant for models, not for computing masks and scores."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def autocasts() -> bool:
    """Return True if autocast is on for any device."""
    return any(torch.is_autocast_enabled(device) for device in _devices())


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Turn autocast off on all devices, and restore it at the end. Also a decorator.

    >>> with torch.autocast("cpu", torch.bfloat16), exact():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    with contextlib.ExitStack() as stack:
        for device in _devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def modes_kept() -> Iterator[None]:
    """Restore autocast and the recording of gradients at the end, whatever modes the code in between enters."""
    with contextlib.ExitStack() as stack:
        for device in _devices():
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        yield


@contextlib.contextmanager
def training_flags(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the training flag of every submodule, and restore each one at the end."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = training
        yield
    finally:
        for m, flag in flags:
            m.training = flag


P = ParamSpec("P")
R = TypeVar("R")


def with_ordinary_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function run outside ``torch.inference_mode``: tensors made in that mode can never be trained."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapped


def ordinary(inputs: Any) -> Any:
    """Return the inputs, with inference tensors replaced by copies: no gradient can pass through the originals."""
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, inputs)
