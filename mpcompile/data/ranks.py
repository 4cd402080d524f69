"""Ranks: the processes that train together, their exchanges, and checks that they run the same code."""

from __future__ import annotations

import hashlib
import os
import re
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mpcompile._moved import renamed
from mpcompile._version import __version__
from mpcompile.errors import ConfigError, InputError, first_line

__getattr__ = renamed(__name__, {"check_masks": "training.policies.check_masks"})
_LOST = re.compile(r"closed by peer|reset by peer|connection (closed|reset|refused)|broken pipe|remote process", re.I)
_SOURCES = (".py", ".cpp", ".h", ".cu")
_TIMEOUT = timedelta(hours=12)  # the other ranks wait while the first one makes the student


def active() -> bool:
    """Return True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def start(device: str) -> torch.device:
    """Join the other processes if torchrun started this one, and return the device to use.

    Raises:
        ConfigError: the device does not exist.
    """
    alone = "RANK" not in os.environ or "MASTER_ADDR" not in os.environ
    if device == "cuda" and not alone:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        torch.empty(1, device=device)
        if device.startswith("cuda"):
            torch.cuda.set_device(torch.device(device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used: {first_line(error)}",
            hint=None if alone else "start as many processes as there are devices",
        ) from error
    if not alone and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_TIMEOUT)
    return torch.device(device)


def stop() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if active():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, on every rank."""
    if not active():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Return the first rank's value, on every rank."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(*values: float, device: torch.device) -> list[float]:
    """Return the sum of each value over all ranks."""
    if not active():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def share_buffers(model: nn.Module) -> None:
    """Copy the first rank's BatchNorm statistics and other float buffers to the other ranks, which saw other images."""
    if active():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                part = buffer.contiguous()
                dist.broadcast(part, src=0)
                if part is not buffer and 0 not in buffer.stride():
                    buffer.copy_(part)


def average(tensor: torch.Tensor) -> None:
    """Replace a tensor by its mean over all ranks, in place."""
    if active():
        dist.all_reduce(tensor)
        tensor /= world()


def lost(error: BaseException) -> bool:
    """Return True if an error means that another process is gone, and not a fault of this one."""
    return isinstance(error, RuntimeError) and active() and _LOST.search(str(error)) is not None


def source_files() -> dict[str, Path]:
    """Return the source files by their path in the package; links to folders, as in a checkout, are followed."""
    import mpcompile  # for its path, which has two folders in a checkout without links

    files: dict[str, Path] = {}
    for root in mpcompile.__path__:
        for folder, below, names in os.walk(root, followlinks=True):
            below[:] = [name for name in below if name != "__pycache__"]
            here = Path(folder)
            files |= {(here / n).relative_to(root).as_posix(): here / n for n in names if n.endswith(_SOURCES)}
    return dict(sorted(files.items()))


@lru_cache(maxsize=1)
def _sources() -> str:
    sha = hashlib.sha256()
    for name, path in source_files().items():
        content = path.read_bytes()
        sha.update(f"{name} {len(content)} ".encode())
        sha.update(content)
    return sha.hexdigest()[:16]


def code() -> dict[str, str]:
    """Return the versions that have to be equal on all ranks."""
    import timm

    versions = {"mpcompile": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return {**versions, "sources": _sources()}


def differing(values: list[Any]) -> str:
    """Return the first rank's value and those of the ranks that differ from it, as text for an error."""
    return "; ".join(f"rank {i}: {value}" for i, value in enumerate(values) if value != values[0] or i == 0)


def check_code() -> None:
    """Check that all ranks run the same code.

    Raises:
        InputError: they do not. Every rank raises; the message names the differences and the ranks.
    """
    versions = gather(code())
    keys = [key for key in versions[0] if len({other[key] for other in versions}) > 1]
    if keys:
        different = differing([", ".join(f"{key} {other[key]}" for key in keys) for other in versions])
        raise InputError(
            "the processes run different code",
            expected="the same versions on every rank",
            found=different,
            hint="install the same version on every machine",
        )


def check_equal(name: str, value: Any) -> None:
    """Check that a value is the same on all ranks.

    Raises:
        InputError: it differs. Every rank raises; the message starts with ``name``.
    """
    values = gather(value)
    if any(other != values[0] for other in values):
        raise InputError(
            f"{name} differs between processes", expected="the same on every rank", found=differing(values)
        )
