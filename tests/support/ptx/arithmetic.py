"""Instructions on registers: arithmetic, logic, comparison, selection and conversion."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.support.ptx.memory import U64, f32_to_bf16, half_to_f32
from tests.support.ptx.program import Instruction
from tests.support.ptx.threads import Operands

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
ARITHMETIC = frozenset({*_FLOAT, *_INTEGER})


class Arithmetic(Operands):
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
            value = half_to_f32(self.bits(i.args[1]).astype(np.uint16), source == "bf16")
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
