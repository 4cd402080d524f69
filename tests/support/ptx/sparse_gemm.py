"""2:4 products through the GPU's launch code, with the emulator running the compiled kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from mpcompile.kernels.nm_linear import sparse24
from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch
from mpcompile.kernels.nm_linear.gpu.build import Build, parts_of
from mpcompile.kernels.nm_linear.packed import activate
from mpcompile.passes.mask import top_n
from tests.support.ptx import Block, Memory, Program, TensorMap

LAYOUTS = {name: layout for layout, name in gpu_launch.KERNELS.items()}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp16": 2e-3, "bf16": 1e-2}


@dataclass(frozen=True)
class Problem:
    """x (m, k) times a 2:4 weight (n, k), with all operands of an epilogue."""

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

    def packed(self, build: Build) -> tuple[Tensor, Tensor]:
        return sparse24.pack(self.weight, self.mask, LAYOUTS[build.kernel])

    def expected(self, epilogue: str) -> Tensor:
        """Return the result in float64, from the 16-bit inputs."""
        act, bias, scale, res = parts_of(epilogue)
        y = self.x.double() @ (self.weight * self.mask).double().T
        y = activate(y + self.bias.double() if bias else y, act)
        y = y * self.scale.double() if scale else y
        return y + self.residual.double() if res else y


def bits(tensor: Tensor) -> np.ndarray:
    """Return the bytes that a tensor spans, from its first element to its last."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.as_strided((span,), (1,)).view(torch.uint8).numpy()


class EmulatedKernel:
    """A fake kernel module: ``gemm[grid](...)`` runs its PTX on the tensors' own memory.

    ``first``: number of tiles of tokens that are assumed before the tensors' first row, and are not run.
    """

    def __init__(self, build: Build, record: dict[str, Any], first: int = 0, **how: Any) -> None:
        self.build, self.record, self.first, self.how = build, record, first, how
        self.gemm = self

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **options: self._launch(grid[0], args, options)

    def _launch(self, blocks: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        tile, (act, *_) = self.build.cut, parts_of(self.build.epilogue)
        assert options["ACT"] == act and options["STAGES"] == tile.stages and options["num_warps"] == tile.warps
        assert options.get("BN", tile.n) == tile.n and options.get("GROUPS", tile.warps // 4) == tile.warps // 4
        program, memory = Program(self.record["ptx"]), Memory()
        y = args[6]
        rows, places, numbers = self.first * tile.m, {}, []
        memory.put(np.zeros(16, np.uint8), at=1 << 40)  # room for tensors that begin before their first row
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                address = places[place] = memory.put(bits(value))
                moved = value.dim() == 2 and value.shape[0] == y.shape[0]  # activations, residual, result
                numbers.append(address - rows * value.stride(0) * value.element_size() if moved else address)
            elif value is not None and not isinstance(value, int):  # a tensor descriptor: pointer, shape, strides
                matrix = bits(value.base).view(np.uint16).reshape(value.base.shape)
                numbers += [TensorMap(matrix, tuple(value.block_shape)), 0, 0, 0, 0]
            elif value is not None:
                numbers.append(value + rows if place == 7 else value)
        parameters = dict(zip(program.parameters, [*numbers, 0, 0], strict=True))  # Triton's two scratch pointers
        for block in range(blocks):
            at = block + self.first * (blocks // -(-y.shape[0] // tile.m))
            Block(program, parameters, memory, self.record["smem_bytes"], (at, 0, 0), **self.how).run()
        y.view(-1).view(torch.uint8).copy_(torch.from_numpy(memory.get(places[6])))


@contextlib.contextmanager
def emulated(kernel: EmulatedKernel) -> Any:
    """Make gpu/launch.py launch this kernel."""
    with (
        mock.patch.object(gpu_launch, "_kernel", lambda name, device: kernel),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
    ):
        yield


def run(
    build: Build, record: dict[str, Any], problem: Problem, index: Tensor | None = None, first: int = 0, **how: Any
) -> Tensor:
    """Run :func:`launch.product`; ``index`` replaces the weight's own metadata."""
    act, bias, scale, res = parts_of(build.epilogue)
    values, own = problem.packed(build)
    with emulated(EmulatedKernel(build, record, first, **how)):
        return gpu_launch.product(
            problem.x,
            values,
            own if index is None else index,
            problem.bias if bias else None,
            problem.residual if res else None,
            len(problem.weight),
            LAYOUTS[build.kernel],
            act,
            scale=problem.scale if scale else None,
            tile=build.cut,
        )
