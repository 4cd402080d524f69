"""Products run by the PTX emulator, beside what they should give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpcompile.kernels.nm_linear import sparse24
from mpcompile.kernels.nm_linear.gpu_build import Build, parts_of
from mpcompile.kernels.nm_linear.packed import activate
from mpcompile.passes.mask import top_n
from tests.ptx_emulator import Block, Memory, Program, TensorMap

LAYOUTS = {"gluon_mma_sp": sparse24.MMA_SP, "gluon_wgmma_sp": sparse24.WGMMA_SP}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """x (m, k) times a 2:4 weight (n, k), with everything that an epilogue takes."""

    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    scale: Tensor
    residual: Tensor

    @classmethod
    def make(cls, m: int, n: int, k: int, dtype: str, seed: int = 0) -> Problem:
        generator = torch.Generator().manual_seed(seed)

        def values(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(HALF[dtype])

        weight = values(n, k) / k**0.5
        mask = top_n(values(n, k // 4, 4), 2).flatten(-2)
        return cls(values(m, k), weight, mask, values(n), values(n), values(m, n))

    def expected(self, epilogue: str) -> Tensor:
        """In float64, from the 16-bit inputs."""
        act, bias, scale, res = parts_of(epilogue)
        y = self.x.double() @ (self.weight * self.mask).double().T
        y = activate(y + self.bias.double() if bias else y, act)
        y = y * self.scale.double() if scale else y
        return y + self.residual.double() if res else y


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


def emulate(build: Build, ptx: str, shared_bytes: int, problem: Problem, index: Tensor | None = None, **how) -> Tensor:
    """What the compiled kernel makes of a problem; ``index``: other metadata than belong to the weight."""
    (m, k), n, tile = problem.x.shape, len(problem.weight), build.cut
    values, own = sparse24.pack(problem.weight, problem.mask, LAYOUTS[build.kernel])
    index = own if index is None else index
    rows, columns = sparse24.padded((n, k))
    program, memory = Program(ptx), Memory()
    _, bias, scale, res = parts_of(build.epilogue)
    given = {"E": memory.put(index.numpy()[: -sparse24.CHECKSUM_BYTES])}
    for name, wanted in (("bias", bias), ("scale", scale), ("residual", res)):
        if wanted:
            given[name] = memory.put(bits(getattr(problem, name)))
    y = memory.put(np.full((m, n), 0x7FFF, np.uint16))  # not a number
    steps = columns // tile.k
    if build.kernel == "gluon_mma_sp":
        given = {"A": memory.put(bits(values)), **given, "X": memory.put(bits(problem.x))}
        order = ["A", "E", "X", *(name for name in ("bias", "scale", "residual") if name in given)]
        numbers = [given[name] for name in order] + [y, m, n, k, steps, k, n, n]
        parameters: dict[str, object] = dict.fromkeys(program.parameters, 0)
        parameters |= dict(zip(program.parameters, numbers, strict=False))
    else:
        pointers = [given[name] for name in ("E", "bias", "scale", "residual") if name in given]
        numbers = [*pointers, y, m, n, steps, n, n]
        parameters = dict.fromkeys(program.parameters, 0)
        parameters[program.parameters[0]] = TensorMap(bits(values).reshape(rows, -1), (tile.n, 64))
        parameters[program.parameters[5]] = TensorMap(bits(problem.x), (tile.m, 64))
        parameters |= dict(zip(program.parameters[10:], numbers, strict=False))
    for block in range(-(-n // tile.n) * -(-m // tile.m)):
        Block(program, parameters, memory, shared_bytes, (block, 0, 0), **how).run()
    found = torch.from_numpy(memory.get(y).copy()).view(HALF[build.dtype])
    return found.view(m, n)
