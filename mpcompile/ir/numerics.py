"""Modes of torch in which numbers are computed: autocast is for models, not for the algebra that decides about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def autocasts() -> bool:
    """Whether autocast is on, on any device."""
    return any(torch.is_autocast_enabled(device) for device in _devices())


def _devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Autocast off for a while, on all devices; afterwards as it was. Also a decorator.

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
    """Autocast and the recording of gradients as they are, and again so at the end, whatever is entered in between."""
    with contextlib.ExitStack() as stack:
        for device in _devices():
            dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        yield
