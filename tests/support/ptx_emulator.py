"""Executes PTX in numpy: what Triton emits for a kernel is checked without a GPU.

One thread block at a time. All threads of a *strand* (a run of neighbouring warps) go in lock-step; a branch that warps
take differently splits a strand, so that warp-specialised kernels run too. Strands give way to each other where they
wait: at barriers and at mbarriers.

Asynchronous work (``cp.async``, TMA, ``wgmma``) lands at issue with ``lazy=False`` and only at the wait for it with
``lazy=True``; hardware does anything in between. A kernel that waits too late fails the first, one that waits too early
the second. Strands of one warp (``warps=1``; 4 for ``wgmma``, which a warpgroup issues together), scheduled from the
first or from the last (``reverse=True``), show missing barriers.

Supported: integer and fp32 arithmetic, comparisons, selection, conversions to and from fp16 and bf16, ``ex2``, loads
and stores (global, shared, parameters), ``shfl.idx``, ``elect``, ``ldmatrix``, ``stmatrix``, ``cp.async`` with groups,
``cp.async.bulk.tensor`` (2-d, 128-byte swizzle), mbarriers, ``bar.sync``, ``mma.sp`` m16n8k32 and
``wgmma.mma_async.sp`` m64nNk32 (fp16 and bf16 inputs, fp32 accumulation). Anything else raises NotImplementedError; so
do branches that part the threads of one warp.

Not modelled: clusters, fences and memory order between proxies, races inside a warp, register pressure, time, and the
hardware's order of fp32 additions. What ``mma.sp`` and ``wgmma`` do here is a reading of the PTX ISA (9.x, matrix
fragments and sparse metadata): it has not been compared with a GPU.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

U64 = np.uint64
PARAMETERS = 0x7000_0000  # where addresses of parameters (tensor maps) begin
GUARD = 1 << 16  # bytes between two allocations


class Fault(Exception):
    """The program did something that a GPU would not define."""


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Memory:
    """Global memory: allocations with nothing between them; touching what isn't allocated is a :class:`Fault`."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.parts: list[np.ndarray] = []
        self.top = GUARD

    def put(self, array: np.ndarray, at: int | None = None) -> int:
        """Place a copy of an array; returns its address. ``at``: an address above all others so far."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy()
        start = self.top if at is None else at
        if start < self.top - GUARD:
            raise ValueError("addresses have to ascend")
        self.starts.append(start)
        self.parts.append(data)
        self.top = (start + len(data) + 2 * GUARD) // GUARD * GUARD
        return start

    def get(self, address: int) -> np.ndarray:
        """The bytes of the allocation at an address."""
        return self.parts[self.starts.index(address)]

    def _places(self, address: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per allocation: its bytes, which threads touch it, and at what offsets."""
        if (address % size).any():
            raise Fault(f"an access of {size} bytes that isn't aligned")
        owner = np.searchsorted(np.array(self.starts), address, side="right") - 1
        found = []
        for number in np.unique(owner):
            here = owner == number
            offset = address[here] - (self.starts[number] if number >= 0 else 0)
            if number < 0 or (offset + size > len(self.parts[number])).any():
                raise Fault(f"an access outside every allocation, at {int(address[here].max()):#x}")
            found.append((self.parts[number], here, offset))
        return found

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        result = np.empty((len(address), size), np.uint8)
        for data, here, offset in self._places(address, size):
            result[here] = data[offset[:, None] + np.arange(size)]
        return result

    def store(self, address: np.ndarray, content: np.ndarray) -> None:
        for data, here, offset in self._places(address, content.shape[1]):
            data[offset[:, None] + np.arange(content.shape[1])] = content[here]


class Shared(Memory):
    """Shared memory of one block, filled with a pattern that is no sensible number."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.starts, self.parts = [0], [np.full(size, 0xCD, np.uint8)]

    @property
    def bytes(self) -> np.ndarray:
        return self.parts[0]


@dataclass(frozen=True)
class TensorMap:
    """A matrix of 16-bit elements as TMA sees it, read in boxes of ``box`` (rows, columns)."""

    array: np.ndarray
    box: tuple[int, int]


@dataclass
class Instruction:
    op: str
    args: list[str]
    predicate: str | None = None
    negated: bool = False
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.op.replace("::", ".").split(".")

    def __str__(self) -> str:
        return f"{self.op} {', '.join(self.args)}"


def _split(text: str) -> list[str]:
    """Operands, commas inside brackets left alone."""
    found, depth, start = [], 0, 0
    for place, char in enumerate(text + ","):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    return [a for a in found if a]


class Program:
    """The first entry function of a PTX module.

    Attributes:
        parameters: their names, in order.
        threads: of a block.
    """

    def __init__(self, ptx: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx[ptx.index(".entry") :], flags=re.S)
        signature, body = text[: text.index(")")], text[text.index(")") + 1 :]
        self.parameters = re.findall(r"\.param[^,\n]*?(\w+_param_\d+)", signature)
        self.threads = int(re.search(r"\.reqntid (\d+)", body)[1])  # type: ignore[index]
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        scopes: list[dict[str, str]] = []  # names declared in each open block -> their unique names
        pending: list[tuple[Instruction, list[dict[str, str]]]] = []
        for statement in self._statements(body[body.index("{") :]):
            if statement == "{":
                scopes.append({})
            elif statement == "}":
                scopes.pop()
                if not scopes:
                    break
            elif statement.endswith(":"):
                name = statement[:-1]
                if len(scopes) > 1:
                    name = scopes[-1].setdefault(name, f"{name}@{len(self.code)}")
                self.labels[name] = len(self.code)
            elif statement.startswith(".reg") and len(scopes) > 1:
                for name in statement.split(None, 2)[2].split(","):
                    stem, _, count = name.strip().rstrip(">").partition("<")
                    for each in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                        scopes[-1][each] = f"{each}@{len(self.code)}"
            elif not statement.startswith("."):
                instruction = self._instruction(statement)
                self.code.append(instruction)
                pending.append((instruction, list(scopes[1:])))
        for instruction, chain in pending:
            names = {name: unique for scope in chain for name, unique in scope.items()}
            if names:
                pattern = re.compile(r"(?<![\w%$])(" + "|".join(map(re.escape, names)) + r")(?![\w@])")
                replace = lambda match, names=names: names[match[1]]  # noqa: E731
                instruction.args = [pattern.sub(replace, a) for a in instruction.args]
                instruction.predicate = instruction.predicate and names.get(
                    instruction.predicate, instruction.predicate
                )

    @staticmethod
    def _statements(body: str) -> list[str]:
        """Braces of blocks, labels with their colon, and what ends in a semicolon or (directives) in a line."""
        found: list[str] = []
        body = re.sub(r"^\s*\.(loc|file|pragma|section)[^\n]*$", "", body, flags=re.M)
        place = 0
        while place < len(body):
            if body[place].isspace() or body[place] == ";":
                place += 1
            elif body[place] in "{}":
                found.append(body[place])
                place += 1
                if body[place - 1] == "}" and found.count("{") == found.count("}"):
                    break
            elif label := re.compile(r"([\w$]+):(?!:)").match(body, place):
                found.append(label[0])
                place = label.end()
            else:
                end = body.index(";", place)
                found.append(" ".join(body[place:end].split()))
                place = end + 1
        return found

    @staticmethod
    def _instruction(statement: str) -> Instruction:
        match = re.match(r"@(!?)([%\w]+)\s+(.*)$", statement)
        guard = (match[2], match[1] == "!") if match else (None, False)
        op, _, args = (match[3] if match else statement).partition(" ")
        return Instruction(op, _split(args), *guard)


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

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
            raise NotImplementedError("warps part while copies or products are in flight")
        registers = {name: value[which] for name, value in self.registers.items()}
        return Strand(self.tid[which], registers, pc)


class Block:
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
        """``values``: of each parameter, a number or a :class:`TensorMap`."""
        self.program, self.values, self.memory, self.block = program, values, memory, block
        self.shared, self.lazy, self.reverse = Shared(shared_bytes), lazy, reverse
        size = 32 * warps if warps else program.threads
        tid = np.arange(program.threads, dtype=U64)
        self.strands = [Strand(tid[i : i + size], {}, 0) for i in range(0, len(tid), size)]
        self.barriers: dict[int, Barrier] = {}
        self.arrived: dict[int, list[Strand]] = {}  # at bar.sync
        self.transfers: dict[int, list[Callable[[], None]]] = {}  # TMA not landed yet, by mbarrier
        self.steps = 0

    # -- control

    def run(self) -> int:
        """Run to the end; returns the number of instructions that were executed."""
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
        """Until the strand waits, ends or is split."""
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
            raise NotImplementedError("a branch parts the threads of a warp")
        takes = warps.all(1)
        edges = [0, *(np.nonzero(np.diff(takes))[0] + 1), len(takes)]
        pieces = []
        for start, end in itertools.pairwise(edges):
            which = np.zeros(len(mask), bool)
            which[32 * start : 32 * end] = True
            pieces.append(strand.part(which, target if takes[start] else strand.pc + 1))
        place = self.strands.index(strand)
        self.strands[place : place + 1] = pieces

    # -- operands: raw bits as uint64

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
            raise Fault(f"{a} is read before it is written, or isn't known")
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
        """An operand as numpy numbers of a PTX type; integers as int64 (u64 and b64 as uint64)."""
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
        """A value that all threads agree on."""
        if (value != value[0]).any():
            raise Fault("threads disagree about an operand that has to be uniform")
        return int(value[0])

    # -- instructions

    def _execute(self, i: Instruction, mask: np.ndarray) -> None:
        kind = i.parts[0]
        if kind in ("fence", "membar", "setmaxnreg", "griddepcontrol") or i.op.startswith("bar.warp.sync"):
            return
        name = {"cp": "copy", "and": "logic", "or": "logic", "xor": "logic", "not": "logic", "barrier": "bar"}.get(kind)
        handler = getattr(self, f"_{name or kind}", None)
        if handler is None:
            if kind not in _ARITHMETIC:
                raise NotImplementedError(str(i))
            handler = self._arithmetic
        handler(i, mask)

    def _bar(self, i: Instruction, mask: np.ndarray) -> None:
        number = self.one(self.bits(i.args[0]))
        count = self.one(self.bits(i.args[1])) if len(i.args) > 1 else self.program.threads
        here = self.arrived.setdefault(number, [])
        here.append(self.s)
        if sum(len(s.tid) for s in here) > count:
            raise Fault(f"more than {count} threads at barrier {number}")
        if sum(len(s.tid) for s in here) == count:
            for strand in here:
                strand.waits = None
            self.arrived[number] = []
        else:
            waiting = self.arrived[number]
            self.s.waits = lambda: self.arrived[number] is not waiting

    def _mbarrier(self, i: Instruction, mask: np.ndarray) -> None:
        if i.parts[1] == "try_wait":
            address, parity = self.one(self.address(i.args[1])), self.one(self.bits(i.args[2]))
            if address not in self.barriers:
                raise Fault("a wait for an mbarrier that wasn't initialised")
            for land in self.transfers.pop(address, []):
                land()
            barrier = self.barriers[address]
            self.write(i.args[0], np.full(self.threads, barrier.phase != parity).astype(U64))
            if barrier.phase == parity:  # the program asks again
                self.s.waits = lambda: barrier.phase != parity or address in self.transfers
            return
        for thread in np.nonzero(mask)[0]:
            at = 1 if i.parts[1] == "arrive" else 0
            address = int(self.address(i.args[at])[thread])
            if i.parts[1] == "init":
                count = int(self.bits(i.args[1])[thread])
                self.barriers[address] = Barrier(count, count)
            elif i.parts[1] == "arrive":
                barrier = self.barriers[address]
                barrier.waiting -= 1
                if "expect_tx" in i.parts:
                    barrier.bytes += int(self.bits(i.args[2])[thread])
                barrier.settle()
            elif i.parts[1] != "inval":
                raise NotImplementedError(str(i))

    def _copy(self, i: Instruction, mask: np.ndarray) -> None:
        if "bulk" in i.parts:
            return self._transfer(i, mask)
        if i.parts[2] == "commit_group":
            self.s.copies.append(self.s.open_copies)
            self.s.open_copies = []
        elif i.parts[2] == "wait_group":
            left = int(i.args[0], 0)
            while len(self.s.copies) > left:
                for land in self.s.copies.pop(0):
                    land()
        elif i.parts[2] in ("ca", "cg"):
            target, source, size = self.address(i.args[0]), self.address(i.args[1]), int(i.args[2], 0)
            given = self.bits(i.args[3]) if len(i.args) > 3 else np.full(self.threads, size, U64)
            if not np.isin(given, (0, size)).all():
                raise NotImplementedError("cp.async of a part")
            target, source, full = target[mask], source[mask], given[mask] > 0

            def land() -> None:
                content = np.zeros((len(target), size), np.uint8)
                content[full] = self.memory.load(source[full], size)
                self.shared.store(target, content)

            if self.lazy:
                self.s.open_copies.append(land)
            else:
                land()
        else:
            raise NotImplementedError(str(i))
        return None

    def _transfer(self, i: Instruction, mask: np.ndarray) -> None:
        """cp.async.bulk.tensor: a box of a tensor map into shared memory."""
        if "tensor" not in i.parts or "2d" not in i.parts:
            raise NotImplementedError(str(i))
        handle, coordinates = i.args[1].strip("[] ").split(",", 1)
        for thread in np.nonzero(mask)[0]:
            target = int(self.address(i.args[0])[thread])
            bar = int(self.address(i.args[2])[thread])
            tensor = self.values[self.program.parameters[int(self.bits(handle.strip())[thread]) - PARAMETERS]]
            column, row = (int(self.signed(c, 32)[thread]) for c in self.names(coordinates))

            def land(target: int = target, bar: int = bar, tensor: Any = tensor, at: Any = (row, column)) -> None:
                self._box(target, tensor, *at)
                self.barriers[bar].bytes -= 2 * tensor.box[0] * tensor.box[1]
                self.barriers[bar].settle()

            if self.lazy:
                self.transfers.setdefault(bar, []).append(land)
            else:
                land()

    @staticmethod
    def _swizzled(address: np.ndarray) -> np.ndarray:
        return address ^ (((address >> 7) & 7) << 4)

    def _box(self, target: int, tensor: TensorMap, row: int, column: int) -> None:
        rows, columns = tensor.box
        if target % 1024 or columns != 64 or row < 0 or column < 0:
            raise NotImplementedError("TMA other than aligned boxes of 128-byte rows")
        box = np.zeros((rows, columns), np.uint16)
        part = tensor.array[row : row + rows, column : column + columns]
        box[: part.shape[0], : part.shape[1]] = part
        address = target + np.arange(rows)[:, None] * 128 + np.arange(0, 128, 2)[None]
        self.shared.store(self._swizzled(address).reshape(-1), box.reshape(-1, 1).view(np.uint8))

    def _matrices(self, address: np.ndarray, count: int) -> list[np.ndarray]:
        """Addresses of the 8 rows of each 8x8 matrix, (warps, 8): lanes 8 i .. 8 i + 7 name those of matrix i."""
        return [address.reshape(-1, 32)[:, 8 * n : 8 * n + 8] for n in range(count)]

    def _ldmatrix(self, i: Instruction, mask: np.ndarray) -> None:
        names = self.names(i.args[0])
        for name, rows in zip(names, self._matrices(self.address(i.args[1]), len(names)), strict=True):
            matrix = self.shared.load(rows.reshape(-1), 16).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in i.parts:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            self.write(name, matrix.reshape(-1, 64).view(np.uint32).reshape(-1))

    def _stmatrix(self, i: Instruction, mask: np.ndarray) -> None:
        names = self.names(i.args[1])
        for name, rows in zip(names, self._matrices(self.address(i.args[0]), len(names)), strict=True):
            matrix = self.word(name).view(np.uint16).reshape(-1, 8, 8)
            if "trans" in i.parts:
                matrix = matrix.transpose(0, 2, 1)
            content = np.ascontiguousarray(matrix).reshape(-1, 8).view(np.uint8)
            self.shared.store(rows.reshape(-1), content)

    def _ld(self, i: Instruction, mask: np.ndarray) -> None:
        names, size = self.names(i.args[0]), int(i.parts[-1][1:]) // 8
        if "param" in i.parts:
            self.write(names[0], np.full(self.threads, self.values[i.args[1].strip("[] ")] & (2**64 - 1), U64))
            return
        space: Memory = self.shared if "shared" in i.parts else self.memory
        content = np.zeros((self.threads, size * len(names)), np.uint8)
        content[mask] = space.load(self.address(i.args[1])[mask], content.shape[1])
        for number, name in enumerate(names):
            piece = np.ascontiguousarray(content[:, number * size : (number + 1) * size])
            self.write(name, piece.view(f"u{size}").reshape(-1).astype(U64), mask)

    def _st(self, i: Instruction, mask: np.ndarray) -> None:
        size = int(i.parts[-1][1:]) // 8
        parts = [self.bits(name).view(np.uint8).reshape(-1, 8)[:, :size] for name in self.names(i.args[1])]
        space: Memory = self.shared if "shared" in i.parts else self.memory
        space.store(self.address(i.args[0])[mask], np.concatenate(parts, 1)[mask])

    def _elect(self, i: Instruction, mask: np.ndarray) -> None:
        lane, chosen = i.args[0].split("|")
        self.write(chosen, (self.s.tid % U64(32) == 0).astype(U64))
        self.write(lane, np.zeros(self.threads, U64))

    def _cvta(self, i: Instruction, mask: np.ndarray) -> None:
        self.write(i.args[0], self.bits(i.args[1]))

    def _shfl(self, i: Instruction, mask: np.ndarray) -> None:
        if "idx" not in i.parts:
            raise NotImplementedError(str(i))
        lane = self.bits(i.args[2]).astype(np.int64) & 31
        self.write(i.args[0], self.bits(i.args[1])[np.arange(self.threads) // 32 * 32 + lane])

    def _mov(self, i: Instruction, mask: np.ndarray) -> None:
        target, source = i.args
        width = 1 if i.parts[-1] == "pred" else int(i.parts[-1][1:])
        if target.startswith("{"):
            names = self.names(target)
            each = width // len(names)
            for number, name in enumerate(names):
                self.write(name, (self.bits(source) >> U64(number * each)) & U64(2**each - 1), mask)
        elif source.startswith("{"):
            names = self.names(source)
            each = width // len(names)
            joined = np.zeros(self.threads, U64)
            for number, name in enumerate(names):
                joined |= self.unsigned(name, each) << U64(number * each)
            self.write(target, joined, mask)
        else:
            self.write(target, self.unsigned(source, width), mask)

    def _setp(self, i: Instruction, mask: np.ndarray) -> None:
        x, y = (self.number(a, i.parts[-1]) for a in i.args[1:3])
        compare = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal}
        compare |= {"ne": np.not_equal, "neu": np.not_equal}
        if len(i.args) > 3 or i.parts[1] not in compare:
            raise NotImplementedError(str(i))
        self.write(i.args[0], compare[i.parts[1]](x, y).astype(U64), mask)

    def _selp(self, i: Instruction, mask: np.ndarray) -> None:
        chosen = np.where(self.bits(i.args[3]).astype(bool), self.bits(i.args[1]), self.bits(i.args[2]))
        self.write(i.args[0], chosen, mask)

    def _logic(self, i: Instruction, mask: np.ndarray) -> None:
        width = 1 if i.parts[-1] == "pred" else int(i.parts[-1][1:])
        x = [self.unsigned(a, width) for a in i.args[1:]]
        result = {"and": lambda: x[0] & x[1], "or": lambda: x[0] | x[1], "xor": lambda: x[0] ^ x[1]}
        value = ~x[0] if i.parts[0] == "not" else result[i.parts[0]]()
        self.write(i.args[0], value if width == 64 else value & U64(2**width - 1), mask)

    def _shl(self, i: Instruction, mask: np.ndarray) -> None:
        width, by = int(i.parts[-1][1:]), self.word(i.args[2])
        value = np.where(by < width, self.bits(i.args[1]) << np.minimum(by, 63).astype(U64), U64(0))
        self.write(i.args[0], value if width == 64 else value & U64(2**width - 1), mask)

    def _shr(self, i: Instruction, mask: np.ndarray) -> None:
        kind = i.parts[-1]
        width = int(kind[1:])
        by = np.minimum(self.word(i.args[2]), width - 1 if kind[0] == "s" else 63)
        if kind[0] == "s":
            value = (self.signed(i.args[1], width) >> by.astype(np.int64)).view(U64)
        else:
            value = np.where(self.word(i.args[2]) < width, self.unsigned(i.args[1], width) >> by.astype(U64), U64(0))
        self.write(i.args[0], value if width == 64 else value & U64(2**width - 1), mask)

    def _bfe(self, i: Instruction, mask: np.ndarray) -> None:
        start, length = int(i.args[2], 0), int(i.args[3], 0)
        value = (self.unsigned(i.args[1], 32).astype(np.int64) >> start) & ((1 << length) - 1)
        if i.parts[-1] == "s32":
            value = np.where(value >> (length - 1) & 1, value - (1 << length), value)
        self.write(i.args[0], value & 0xFFFFFFFF, mask)

    def _prmt(self, i: Instruction, mask: np.ndarray) -> None:
        both = self.unsigned(i.args[1], 32) | (self.unsigned(i.args[2], 32) << U64(32))
        selector, value = self.bits(i.args[3]), np.zeros(self.threads, U64)
        for byte in range(4):
            pick = (selector >> U64(4 * byte)) & U64(15)
            if (pick & U64(8)).any():
                raise NotImplementedError("prmt that copies signs")
            value |= ((both >> (pick * U64(8))) & U64(255)) << U64(8 * byte)
        self.write(i.args[0], value, mask)

    def _arithmetic(self, i: Instruction, mask: np.ndarray) -> None:
        kind, op = i.parts[-1], i.parts[0]
        if kind == "f32":
            x = [self.f32(a) for a in i.args[1:]]
            with np.errstate(all="ignore"):
                self.write(i.args[0], _FLOAT[op](*x).astype(np.float32), mask)
            return
        width = int(kind[1:])
        if kind[0] == "f" or op not in _INTEGER:
            raise NotImplementedError(str(i))
        wide = "wide" in i.parts
        x = [self.number(a, kind) for a in i.args[1:]]
        if wide and op == "mad":
            x[2] = self.number(i.args[3], f"{kind[0]}{2 * width}").view(x[0].dtype)
        with np.errstate(all="ignore"):
            if "hi" in i.parts:
                if width != 32:
                    raise NotImplementedError(str(i))
                value = (x[0] * x[1]) >> 32
            else:
                value = _INTEGER[op](*x)
        value = value.view(U64) if value.dtype == np.int64 else value
        width *= 2 if wide else 1
        self.write(i.args[0], value if width == 64 else value & U64(2**width - 1), mask)

    def _cvt(self, i: Instruction, mask: np.ndarray) -> None:
        to, source = i.parts[-2:]
        if to in ("f16x2", "bf16x2") and source == "f32":
            high, low = (self._narrow(self.f32(a), to[:-2]).astype(U64) for a in i.args[1:3])
            value: np.ndarray = high << U64(16) | low
        elif to == "f32" and source in ("f16", "bf16"):
            value = self._half(self.bits(i.args[1]).astype(np.uint16), source == "bf16")
        elif to in ("f16", "bf16") and source == "f32":
            value = self._narrow(self.f32(i.args[1]), to)
        elif to[0] in "us" and source[0] in "us":
            value = self.number(i.args[1], source).astype(np.int64).view(U64) & U64(2 ** int(to[1:]) - 1)
        elif to == "f32" and source[0] in "us":
            value = self.number(i.args[1], source).astype(np.float32)
        else:
            raise NotImplementedError(str(i))
        self.write(i.args[0], value, mask)

    @staticmethod
    def _narrow(values: np.ndarray, kind: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            return f32_to_bf16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)

    # -- sparse tensor cores

    @staticmethod
    def _half(bits: np.ndarray, bf16: bool) -> np.ndarray:
        return bf16_to_f32(bits) if bf16 else bits.view(np.float16).astype(np.float32)

    def _pairs(self, names: list[str], bf16: bool) -> np.ndarray:
        """Registers of two 16-bit numbers -> (registers, warps, 8, 4, 2): groups of four lanes, lanes, halves."""
        words = np.stack([self.word(name) for name in names])
        return self._half(words.view(np.uint16), bf16).reshape(len(names), -1, 8, 4, 2)

    @staticmethod
    def _positions(words: np.ndarray, selector: int) -> np.ndarray:
        """Metadata (warps, 32) -> positions (warps, 16 rows, 16 kept columns of 32).

        Lanes 2s and 2s + 1 of every four give selector s; each covers 16 columns, its low half word row g and its high
        one row g + 8.
        """
        chosen = words.reshape(-1, 8, 4)[:, :, 2 * selector : 2 * selector + 2]  # (warps, g, half word)
        halves = np.stack([chosen & 0xFFFF, chosen >> 16], 1)  # (warps, row / 8, g, half word)
        bits = (halves[..., None] >> np.arange(0, 16, 2, dtype=np.uint32)) & 3
        return bits.reshape(-1, 16, 16).astype(np.int64)

    @staticmethod
    def _expanded(values: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Kept values (..., rows, 16) -> (..., rows, 32)."""
        if (position[..., 1::2] <= position[..., 0::2]).any():
            raise Fault("sparse metadata out of order")
        dense = np.zeros((*values.shape[:-1], 32), np.float32)
        np.put_along_axis(dense, np.arange(16) // 2 * 4 + position, values, -1)
        return dense

    def _mma(self, i: Instruction, mask: np.ndarray) -> None:
        if i.parts[1] != "sp" or "m16n8k32" not in i.parts or i.parts[-1] != "f32":
            raise NotImplementedError(str(i))
        bf16, selector = "bf16" in i.parts, int(i.args[5], 0)
        results, values, tokens, sums = (self.names(a) for a in i.args[:4])
        a = self._pairs(values, bf16)
        left = np.empty((a.shape[1], 16, 16), np.float32)
        for number, (row, column) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            left[:, row : row + 8, column : column + 8] = a[number].reshape(-1, 8, 8)
        # Register r of lane 4g + t: rows 8 r + 2 t and the next of column g.
        right = self._pairs(tokens, bf16).transpose(1, 0, 3, 4, 2).reshape(-1, 32, 8)
        dense = self._expanded(left, self._positions(self.word(i.args[4]).reshape(-1, 32), selector))
        product = (dense @ right).reshape(-1, 2, 8, 4, 2)  # (warps, row / 8, g, t, column)
        for number, name in enumerate(results):
            part = product[:, number // 2, :, :, number % 2].reshape(-1)
            self.write(name, self.f32(sums[number]) + part)

    def _wgmma(self, i: Instruction, mask: np.ndarray) -> None:
        what = i.parts[1]
        if what == "fence":
            return
        if what == "commit_group":
            self.s.products.append(self.s.open_products)
            self.s.open_products = []
        elif what == "wait_group":
            while len(self.s.products) > int(i.args[0]):
                for land in self.s.products.pop(0):
                    land()
        elif what == "mma_async" and "sp" in i.parts:
            strand, left, right = self.s, self.bits(i.args[1]).copy(), self.bits(i.args[2]).copy()
            if self.threads % 128 or not self.bits(i.args[5]).all() or i.args[6:] != ["1", "1", "0", "0"]:
                raise NotImplementedError(str(i))

            def land() -> None:  # descriptors are read at issue; registers, metadata too, stay in use till the wait
                assert self.s is strand
                self._multiply(i, left, right)

            if self.lazy:
                self.s.open_products.append(land)
            else:
                land()
        else:
            raise NotImplementedError(str(i))

    def _described(self, descriptor: int, rows: int, size: int, bf16: bool) -> np.ndarray:
        """The matrix (rows, size / 2) that a shared-memory descriptor names: K-major, 128-byte swizzle."""
        start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
        if descriptor >> 62 != 1 or (descriptor >> 49) & 7:
            raise NotImplementedError("a matrix descriptor without the 128-byte swizzle, or with a base offset")
        row, byte = np.arange(rows)[:, None], np.arange(0, size, 2)[None]
        address = self._swizzled(start + row // 8 * stride + row % 8 * 128 + byte)
        bits = self.shared.load(address.reshape(-1), 2).view(np.uint16).reshape(rows, -1)
        return self._half(bits, bf16)

    def _multiply(self, i: Instruction, left: np.ndarray, right: np.ndarray) -> None:
        names, selector, bf16 = self.names(i.args[0]), int(i.args[4], 0), "bf16" in i.parts
        columns = int(re.search(r"n(\d+)k32", i.op)[1])  # type: ignore[index]
        sums = np.stack([self.f32(name) for name in names])
        words = self.word(i.args[3])
        for first in range(0, self.threads, 128):
            group = slice(first, first + 128)
            values = self._described(self.one(left[group]), 64, 32, bf16)
            tokens = self._described(self.one(right[group]), columns, 64, bf16)
            position = self._positions(words[group].reshape(4, 32), selector).reshape(64, 16)
            product = self._expanded(values, position) @ tokens.T
            # Register r of thread 32 w + 4 g + t: row 16 w + g (+ 8), column 8 (r / 4) + 2 t + r % 2.
            product = product.reshape(4, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(-1, 128)
            sums[:, group] += product
        for number, name in enumerate(names):
            self.write(name, sums[number])


_FLOAT: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": lambda a, b, c: a.astype(np.float64) * b + c,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "div": np.divide,
    "rcp": lambda a: np.float32(1) / a,
    "max": np.fmax,
    "min": np.fmin,
}
_INTEGER: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "neg": np.negative,
    "min": np.minimum,
    "max": np.maximum,
    "div": lambda a, b: np.trunc(a / b).astype(np.int64),  # towards zero; exact below 2**53
    "rem": np.fmod,
}
_ARITHMETIC = frozenset({*_FLOAT, *_INTEGER})
