"""One thread block of a program: scheduling of its strands, branches, and dispatch of instructions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.ptx.arithmetic import ARITHMETIC, Arithmetic
from tests.support.ptx.memory import U64, Fault, Memory, Shared
from tests.support.ptx.movement import Movement
from tests.support.ptx.program import Instruction, Program
from tests.support.ptx.tensor_cores import TensorCores
from tests.support.ptx.threads import Barrier, Strand


class Block(Arithmetic, Movement, TensorCores):
    """One thread block of a program."""

    def __init__(
        self,
        program: Program,
        values: dict[str, Any],
        memory: Memory,
        shared_bytes: int,
        block: tuple[int, int, int] = (0, 0, 0),
        *,
        lazy: bool = False,
        warps: int | None = None,
        reverse: bool = False,
    ) -> None:
        """``values``: for each parameter, a number or a :class:`TensorMap`."""
        self.program, self.values, self.memory, self.block = program, values, memory, block
        self.shared, self.lazy, self.reverse = Shared(shared_bytes), lazy, reverse
        size = 32 * warps if warps else program.threads
        tid = np.arange(program.threads, dtype=U64)
        self.strands = [Strand(tid[i : i + size], {}, 0) for i in range(0, len(tid), size)]
        self.barriers: dict[int, Barrier] = {}
        self.arrived: dict[int, list[Strand]] = {}  # strands that wait, by bar.sync barrier
        self.transfers: dict[int, list[Callable[[], None]]] = {}  # TMA copies in flight, by mbarrier
        self.steps = 0

    def run(self) -> int:
        """Run to the end; return the number of instructions executed."""
        live = list(self.strands)
        while live:
            ready = [s for s in live if s.waits is None or s.waits()]
            if not ready:
                places = [f"threads {s.tid[0]}..{s.tid[-1]} after {self.program.code[s.pc - 1]}" for s in live]
                raise Fault("deadlock: every strand waits: " + "; ".join(places))
            strand = ready[-1 if self.reverse else 0]
            strand.waits = None
            self.strands = live
            self._advance(strand)
            live = [s for s in self.strands if s.pc < len(self.program.code)]
        return self.steps

    def _advance(self, strand: Strand) -> None:
        """Run a strand until it waits, ends or is split."""
        self.s, self.threads, self.R = strand, len(strand.tid), strand.registers
        while strand.waits is None and strand.pc < len(self.program.code):
            instruction = self.program.code[strand.pc]
            self.steps += 1
            mask = np.ones(self.threads, bool)
            if instruction.predicate is not None:
                mask = self.R[instruction.predicate].astype(bool) ^ instruction.negated
            if instruction.parts[0] in ("bra", "ret"):
                target = len(self.program.code)
                if instruction.parts[0] == "bra":
                    target = self.program.labels[instruction.args[0]]
                if mask.all():
                    strand.pc = target
                elif not mask.any():
                    strand.pc += 1
                else:
                    self._part(strand, mask, target)
                    return
                continue
            strand.pc += 1
            if mask.any():
                self._execute(instruction, mask)

    def _part(self, strand: Strand, mask: np.ndarray, target: int) -> None:
        warps = mask.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise NotImplementedError("a branch splits the threads of a warp")
        takes = warps.all(1)
        edges = [0, *(np.nonzero(np.diff(takes))[0] + 1), len(takes)]
        pieces = []
        for start, end in itertools.pairwise(edges):
            which = np.zeros(len(mask), bool)
            which[32 * start : 32 * end] = True
            pieces.append(strand.part(which, target if takes[start] else strand.pc + 1))
        place = self.strands.index(strand)
        self.strands[place : place + 1] = pieces

    def _execute(self, i: Instruction, mask: np.ndarray) -> None:
        kind = i.parts[0]
        if kind in ("fence", "membar", "setmaxnreg", "griddepcontrol") or i.op.startswith("bar.warp.sync"):
            return
        name = {"cp": "copy", "and": "logic", "or": "logic", "xor": "logic", "not": "logic", "barrier": "bar"}.get(kind)
        handler = getattr(self, f"_{name or kind}", None)
        if handler is None:
            if kind not in ARITHMETIC:
                raise NotImplementedError(str(i))
            handler = self._arithmetic
        handler(i, mask)
