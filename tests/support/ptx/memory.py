"""Memory of the emulator: allocations with bounds, tensor maps, and 16-bit floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

U64 = np.uint64
PARAMETERS = 0x7000_0000  # first address of parameters (tensor maps)
GUARD = 1 << 16  # bytes between two allocations


class Fault(Exception):
    """The program did something whose result is undefined on a GPU."""


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Memory:
    """Global memory: allocations with gaps between them; an access outside an allocation is a :class:`Fault`."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.parts: list[np.ndarray] = []
        self.top = GUARD

    def put(self, array: np.ndarray, at: int | None = None) -> int:
        """Place a copy of an array; return its address. ``at``: an address above all others so far."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1).copy()
        start = self.top if at is None else at
        if start < self.top - GUARD:
            raise ValueError("addresses have to ascend")
        self.starts.append(start)
        self.parts.append(data)
        self.top = (start + len(data) + 2 * GUARD) // GUARD * GUARD
        return start

    def get(self, address: int) -> np.ndarray:
        """Return the bytes of the allocation at an address."""
        return self.parts[self.starts.index(address)]

    def _places(self, address: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each allocation that is accessed: its bytes, a mask of the threads that access it, and their offsets."""
        if (address % size).any():
            raise Fault(f"an access of {size} bytes that is not aligned")
        owner = np.searchsorted(np.array(self.starts), address, side="right") - 1
        accesses = []
        for number in np.unique(owner):
            here = owner == number
            offset = address[here] - (self.starts[number] if number >= 0 else 0)
            if number < 0 or (offset + size > len(self.parts[number])).any():
                raise Fault(f"an access outside every allocation, at {int(address[here].max()):#x}")
            accesses.append((self.parts[number], here, offset))
        return accesses

    def load(self, address: np.ndarray, size: int) -> np.ndarray:
        result = np.empty((len(address), size), np.uint8)
        for data, here, offset in self._places(address, size):
            result[here] = data[offset[:, None] + np.arange(size)]
        return result

    def store(self, address: np.ndarray, content: np.ndarray) -> None:
        for data, here, offset in self._places(address, content.shape[1]):
            data[offset[:, None] + np.arange(content.shape[1])] = content[here]


class Shared(Memory):
    """Shared memory of one block, filled with a pattern that is not a plausible number."""

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


def half_to_f32(bits: np.ndarray, bf16: bool) -> np.ndarray:
    return bf16_to_f32(bits) if bf16 else bits.view(np.float16).astype(np.float32)
