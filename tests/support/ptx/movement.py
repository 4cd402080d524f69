"""Instructions that move data or wait: loads, stores, asynchronous copies, matrices, barriers."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.ptx.memory import PARAMETERS, U64, Fault, Memory, TensorMap
from tests.support.ptx.program import Instruction
from tests.support.ptx.threads import Barrier, Operands


def swizzled(address: np.ndarray) -> np.ndarray:
    """Return addresses under the 128-byte swizzle."""
    return address ^ (((address >> 7) & 7) << 4)


class Movement(Operands):
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
                raise Fault("a wait for an mbarrier that was not initialised")
            for land in self.transfers.pop(address, []):
                land()
            barrier = self.barriers[address]
            self.write(i.args[0], np.full(self.threads, barrier.phase != parity).astype(U64))
            if barrier.phase == parity:  # the program tests it again
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
        """cp.async.bulk.tensor: copy a box of a tensor map into shared memory."""
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

    def _box(self, target: int, tensor: TensorMap, row: int, column: int) -> None:
        rows, columns = tensor.box
        if target % 1024 or columns != 64 or row < 0 or column < 0:
            raise NotImplementedError("TMA other than aligned boxes of 128-byte rows")
        box = np.zeros((rows, columns), np.uint16)
        part = tensor.array[row : row + rows, column : column + columns]
        box[: part.shape[0], : part.shape[1]] = part
        address = target + np.arange(rows)[:, None] * 128 + np.arange(0, 128, 2)[None]
        self.shared.store(swizzled(address).reshape(-1), box.reshape(-1, 1).view(np.uint8))

    def _matrices(self, address: np.ndarray, count: int) -> list[np.ndarray]:
        """Return addresses of the 8 rows of each 8x8 matrix, (warps, 8): lanes 8 i to 8 i + 7 hold matrix i's."""
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
