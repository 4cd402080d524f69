"""The processor: its model name, instruction-set flags and cores."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where the system has no such file."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def cpu_name() -> str:
    """Return the processor's model name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str] | None:
    """Return the instruction-set extensions by Linux's names, such as ``avx2``; None outside Linux."""
    info = _cpuinfo()
    return frozenset(f"{info.get('flags', '')} {info.get('Features', '')}".split()) if info else None  # x86, Arm


def is_x86_64() -> bool:
    """Return True on a 64-bit x86 processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def has_bf16() -> bool:
    """Return True if the processor multiplies bf16 natively, so that dense bf16 is faster than dense fp32."""
    return bool((cpu_flags() or frozenset()) & {"avx512_bf16", "amx_bf16", "bf16"})


def core_count() -> int | None:
    """Return the number of logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
