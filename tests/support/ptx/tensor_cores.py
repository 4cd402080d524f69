"""Sparse tensor cores: ``mma.sp`` and ``wgmma.mma_async.sp``."""

from __future__ import annotations

import re

import numpy as np

from tests.support.ptx.memory import Fault, half_to_f32
from tests.support.ptx.movement import swizzled
from tests.support.ptx.program import Instruction
from tests.support.ptx.threads import Operands


class TensorCores(Operands):
    def _pairs(self, names: list[str], bf16: bool) -> np.ndarray:
        """Unpack 16-bit numbers from registers, (registers, warps, 8, 4, 2): groups of four lanes, lanes, halves."""
        words = np.stack([self.word(name) for name in names])
        return half_to_f32(words.view(np.uint16), bf16).reshape(len(names), -1, 8, 4, 2)

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

            # Descriptors are read at issue; registers, including metadata, stay in use until the wait.
            def land() -> None:
                assert self.s is strand
                self._multiply(i, left, right)

            if self.lazy:
                self.s.open_products.append(land)
            else:
                land()
        else:
            raise NotImplementedError(str(i))

    def _described(self, descriptor: int, rows: int, size: int, bf16: bool) -> np.ndarray:
        """Return the matrix (rows, size / 2) that a shared-memory descriptor describes: K-major, 128-byte swizzle."""
        start, stride = (descriptor & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
        if descriptor >> 62 != 1 or (descriptor >> 49) & 7:
            raise NotImplementedError("a matrix descriptor without the 128-byte swizzle, or with a base offset")
        row, byte = np.arange(rows)[:, None], np.arange(0, size, 2)[None]
        address = swizzled(start + row // 8 * stride + row % 8 * 128 + byte)
        bits = self.shared.load(address.reshape(-1), 2).view(np.uint16).reshape(rows, -1)
        return half_to_f32(bits, bf16)

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
