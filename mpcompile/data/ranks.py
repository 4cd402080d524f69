"""Several processes: who writes, and whether all of them train the same thing with the same code."""

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

from mpcompile._version import __version__
from mpcompile.errors import ConfigError, InputError, first_line
from mpcompile.training.policies import digest

_LOST = re.compile(r"closed by peer|reset by peer|connection (closed|reset|refused)|broken pipe|remote process", re.I)
_SOURCES = (".py", ".cpp", ".h", ".cu")
_PATIENCE = timedelta(hours=12)  # the others wait while the first rank makes the student


def active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def world() -> int:
    return dist.get_world_size() if active() else 1


def start(device: str) -> torch.device:
    """Join the other processes if torchrun started this one; returns the device to use.

    Raises:
        ConfigError: there is no such device.
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
            f"device {device!r} can't be used: {first_line(error)}",
            hint=None if alone else "start as many processes as there are devices",
        ) from error
    if not alone and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    return torch.device(device)


def stop() -> None:
    """Leave the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if active():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """One value of every rank, on every rank."""
    if not active():
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


def broadcast(value: Any) -> Any:
    """The first rank's value, on every rank."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def total(*values: float, device: torch.device) -> list[float]:
    """Sums over all ranks."""
    if not active():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def share_buffers(model: nn.Module) -> None:
    """The first rank's BatchNorm statistics and other floating buffers on all ranks, which saw different images."""
    if active():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                part = buffer.contiguous()
                dist.broadcast(part, src=0)
                if part is not buffer and 0 not in buffer.stride():
                    buffer.copy_(part)


def average(tensor: torch.Tensor) -> None:
    """The mean over all ranks, in place."""
    if active():
        dist.all_reduce(tensor)
        tensor /= world()


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone, and nothing about this one."""
    return isinstance(error, RuntimeError) and active() and _LOST.search(str(error)) is not None


def source_files() -> dict[str, Path]:
    """The files of the code by their place in the package; links to folders, as a checkout has, are followed."""
    import mpcompile  # for its path: there are two folders in a checkout without links

    found: dict[str, Path] = {}
    for root in mpcompile.__path__:
        for folder, below, names in os.walk(root, followlinks=True):
            below[:] = [name for name in below if name != "__pycache__"]
            here = Path(folder)
            found |= {(here / n).relative_to(root).as_posix(): here / n for n in names if n.endswith(_SOURCES)}
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def _sources() -> str:
    sha = hashlib.sha256()
    for name, path in source_files().items():
        content = path.read_bytes()
        sha.update(f"{name} {len(content)} ".encode())
        sha.update(content)
    return sha.hexdigest()[:16]


def code() -> dict[str, str]:
    """Versions that have to be equal on all ranks."""
    import timm

    versions = {"mpcompile": __version__, "torch": torch.__version__, "timm": timm.__version__}
    return {**versions, "sources": _sources()}


def _differing(found: list[Any]) -> str:
    return "; ".join(f"rank {i}: {value}" for i, value in enumerate(found) if value != found[0] or i == 0)


def check_code() -> None:
    """Raise on every rank if any runs other code.

    Raises:
        InputError: names what differs, and where.
    """
    found = gather(code())
    keys = [key for key in found[0] if len({other[key] for other in found}) > 1]
    if keys:
        different = _differing([", ".join(f"{key} {other[key]}" for key in keys) for other in found])
        raise InputError(
            "the processes run different code",
            expected="the same versions on every rank",
            found=different,
            hint="install the same version on every machine",
        )


def check_masks(student: nn.Module) -> None:
    """Raise on every rank if the masks aren't identical everywhere.

    Raises:
        InputError: names the ranks.
    """
    found = [value[:12] for value in gather(digest(student))]
    if len(set(found)) > 1:
        raise InputError(
            "the masks differ between processes",
            expected="identical masks on every rank",
            found=_differing(found),
            hint="transform on one rank and send the student to the others (mpcompile distill does)",
        )


def check_equal(name: str, value: Any) -> None:
    """Raise on every rank if a value isn't the same everywhere."""
    found = gather(value)
    if any(other != found[0] for other in found):
        raise InputError(
            f"{name} differs between processes", expected="the same on every rank", found=_differing(found)
        )
