"""The goal of a search: what may be lost, what is minimised, and what the search may use."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from mpcompile.errors import ConfigError
from mpcompile.kernels.machine import has_bf16
from mpcompile.optimization.accuracy.outcome import check_goal
from mpcompile.optimization.numbers.space import OBJECTIVES
from mpcompile.runtimes.catalogue import RUNTIMES

LEVERS = ("masks", "tokens", "bf16")
TORCH = "torch"


@dataclass(frozen=True)
class Goal:
    """What a search is to reach; the arguments of :func:`mpcompile.optimize` of the same names.

    Raises:
        ConfigError: a value is out of range, unknown, or contradicts another.

    Example:
        >>> Goal(max_drop=0.02).precisions[0]
        'fp32'
    """

    max_drop: float = 0.01
    confidence: float = 0.8
    objective: str = "latency"
    batch: int = 1
    minutes: float = 20.0
    allow: tuple[str, ...] = LEVERS
    runtimes: tuple[str, ...] = (TORCH,)
    latency: float | None = None
    speedup: float | None = None
    elsewhere: str | None = None  # the machine whose times are minimised, as predicted; None for this one
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("allow", "runtimes"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(dict.fromkeys(value)))
        for name in ("max_drop", "confidence", "minutes", "latency", "speedup"):
            value = getattr(self, name)
            optional = name in ("latency", "speedup") and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ConfigError(f"{name} is not a number", expected="a number", found=repr(value))
        check_goal(self.max_drop, self.confidence)
        self._check_members()
        for name in ("batch", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (name == "batch"):
                raise ConfigError(f"{name} is out of range", expected=f"{int(name == 'batch')} or more", found=value)
        if not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise ConfigError("minutes is out of range", expected="a number above 0", found=self.minutes)
        if self.latency is not None and self.speedup is not None:
            raise ConfigError("two targets", expected="latency or speedup", found="both")
        for name in ("latency", "speedup"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name} is out of range", expected="a number above 0", found=value)
        if (self.targeted or self.elsewhere) and self.objective != "latency":
            raise ConfigError("latency, speedup and timings are for objective='latency'", found=repr(self.objective))
        if self.targeted and self.elsewhere:
            raise ConfigError("a target needs a measured latency", expected="no timings", found=self.elsewhere)

    def _check_members(self) -> None:
        known = {"objective": OBJECTIVES, "allow": LEVERS, "runtimes": (TORCH, *RUNTIMES)}
        for name, valid in known.items():
            value = getattr(self, name)
            for member in (value,) if isinstance(value, str) else value:
                if member not in valid:
                    raise ConfigError(
                        f"{name} has no such value", expected=f"of {', '.join(valid)}", found=repr(member)
                    )

    @property
    def targeted(self) -> bool:
        """True if a latency or a speed-up is asked for, at which the search stops."""
        return self.latency is not None or self.speedup is not None

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions of builds: fp32, and bf16 where it is allowed and the processor multiplies it."""
        return ("fp32", "bf16") if "bf16" in self.allow and has_bf16() else ("fp32",)

    def measured_by(self) -> dict[str, Any]:
        """Return what measurements and outcomes depend on: not how large a drop is allowed."""
        kept = ("objective", "batch", "seed", "threads", "elsewhere")
        return {**{name: self.record()[name] for name in kept}, "levers": sorted({*self.allow} & {"masks", "tokens"})}

    def record(self) -> dict[str, Any]:
        """Return the fields, and the threads of torch, as JSON values: what a search depends on besides its data."""
        values = dataclasses.asdict(self)
        return {
            **values,
            "allow": list(self.allow),
            "runtimes": list(self.runtimes),
            "threads": torch.get_num_threads(),
        }


def installed_runtimes() -> tuple[str, ...]:
    """Return torch and the other runtimes that are installed."""
    return (TORCH, *(name for name, runtime in RUNTIMES.items() if runtime.installed))
