"""Threads of a block: strands, barriers, and the operands of the instruction at hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.support.ptx.memory import PARAMETERS, U64, Fault, Memory, Shared
from tests.support.ptx.program import Program


@dataclass
class Barrier:
    """An mbarrier: the arrivals and bytes that its phase still waits for."""

    count: int
    waiting: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.waiting < 0:
            raise Fault("an mbarrier got more arrivals than it counts")
        if self.waiting == 0 and self.bytes == 0:
            self.phase, self.waiting = self.phase ^ 1, self.count


class Strand:
    """Neighbouring warps in lock-step."""

    def __init__(self, tid: np.ndarray, registers: dict[str, np.ndarray], pc: int) -> None:
        self.tid, self.registers, self.pc = tid, registers, pc
        self.waits: Callable[[], bool] | None = None
        self.copies: list[list[Callable[[], None]]] = []  # committed groups of cp.async
        self.open_copies: list[Callable[[], None]] = []
        self.products: list[list[Callable[[], None]]] = []  # committed groups of wgmma
        self.open_products: list[Callable[[], None]] = []

    def part(self, which: np.ndarray, pc: int) -> Strand:
        if self.products or self.open_products or any(self.copies) or self.open_copies:
            raise NotImplementedError("warps diverge while copies or products are in flight")
        registers = {name: value[which] for name, value in self.registers.items()}
        return Strand(self.tid[which], registers, pc)


class Operands:
    """The state of one thread block, and operands of the running strand: raw bits, one uint64 per thread."""

    program: Program
    values: dict[str, Any]
    memory: Memory
    shared: Shared
    block: tuple[int, int, int]
    lazy: bool
    s: Strand
    threads: int
    R: dict[str, np.ndarray]
    barriers: dict[int, Barrier]
    arrived: dict[int, list[Strand]]
    transfers: dict[int, list[Callable[[], None]]]

    def bits(self, a: str) -> np.ndarray:
        value = self.R.get(a)
        if value is not None:
            return value
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", a):
            number = int(a.rstrip("U"), 0) & (2**64 - 1)
        elif re.fullmatch(r"0[fF][0-9a-fA-F]{8}", a):
            number = int(a[2:], 16)
        elif a == "%tid.x":
            return self.s.tid
        elif a == "%laneid":
            return self.s.tid % U64(32)
        elif a.startswith("%ctaid."):
            number = self.block["xyz".index(a[-1])]
        elif a == "global_smem":
            number = 0
        elif a in self.program.parameters:
            number = PARAMETERS + self.program.parameters.index(a)
        else:
            raise Fault(f"{a} is read before it is written, or is unknown")
        return np.full(self.threads, number, U64)

    def unsigned(self, a: str, width: int) -> np.ndarray:
        value = self.bits(a)
        return value if width == 64 else value & U64(2**width - 1)

    def signed(self, a: str, width: int) -> np.ndarray:
        value = self.unsigned(a, width).astype(np.int64)
        return value if width == 64 else value - ((value >> (width - 1)) << width)

    def f32(self, a: str) -> np.ndarray:
        return self.bits(a).astype(np.uint32).view(np.float32)

    def word(self, a: str) -> np.ndarray:
        return self.bits(a).astype(np.uint32)

    def number(self, a: str, kind: str) -> np.ndarray:
        """Return an operand as numpy numbers of a PTX type; integers as int64 (u64 and b64 as uint64)."""
        if kind == "f32":
            return self.f32(a)
        width = int(kind[1:])
        if kind[0] == "s":
            return self.signed(a, width)
        return self.unsigned(a, width) if width == 64 else self.unsigned(a, width).astype(np.int64)

    def write(self, a: str, value: np.ndarray, mask: np.ndarray | None = None) -> None:
        if value.dtype == np.float32:
            value = value.view(np.uint32)
        value = (value.view(U64) if value.dtype == np.int64 else value).astype(U64)
        if mask is not None and not mask.all():
            value = np.where(mask, value, self.R.get(a, U64(0xDEAD)))
        self.R[a] = value

    def address(self, a: str) -> np.ndarray:
        base, _, offset = a.strip()[1:-1].partition("+")
        return self.bits(base.strip()).view(np.int64) + int(offset or 0)

    @staticmethod
    def names(a: str) -> list[str]:
        return [x.strip() for x in a.strip("{} ").split(",")]

    def one(self, value: np.ndarray) -> int:
        """Return a value that is the same in all threads."""
        if (value != value[0]).any():
            raise Fault("threads differ in an operand that has to be uniform")
        return int(value[0])
