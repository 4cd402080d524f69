"""The cuSPARSELt engine: torch's 2:4 product, with a search among the library's algorithms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import InputError
from mpcompile.kernels.engine import LayerSpec
from mpcompile.kernels.nm_linear.gpu.engine import unsupported

_ROWS = 8  # the library needs a multiple of eight tokens


@functools.lru_cache(maxsize=16)
def missing(index: int | None) -> str | None:
    """Return why this torch and GPU cannot use cuSPARSELt, or None if they can."""
    if not getattr(torch.backends, "cusparselt", None) or not torch.backends.cusparselt.is_available():
        return "torch was built without cuSPARSELt"
    capability = torch.cuda.get_device_capability(index)
    return (
        "compute capability {}.{}: sparse tensor cores begin with 8.0".format(*capability)
        if capability < (8, 0)
        else None
    )


def version() -> str:
    """Return the library's version, for records: its speed depends on it."""
    return str(torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None)


def product(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: int) -> Tensor:
    """Multiply x (..., K) by a weight packed by ``torch._cslt_compress``, and add a bias."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    if count == 0:
        return x.new_empty((*x.shape[:-1], out))
    if count % _ROWS:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -count % _ROWS))
    y = torch._cslt_sparse_mm(packed, rows.contiguous().t(), bias=bias, transpose_result=True, alg_id=algorithm)
    return y[:count].reshape(*x.shape[:-1], out)


@torch.library.custom_op("mpcompile::nm_cusparselt", mutates_args=(), device_types="cuda")
def nm_cusparselt(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: int) -> Tensor:
    return product(x, packed, bias, out, algorithm)


@nm_cusparselt.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


@nm_cusparselt.register_kernel("cpu")
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: int) -> Tensor:
    raise InputError(
        "a weight packed for cuSPARSELt runs on CUDA only", hint="lower the model again, with engine='auto'"
    )


class CuSparseLtEngine:
    """2:4 products by NVIDIA's library. The fastest algorithm is searched for once per shape and number of tokens."""

    name = "cusparselt"

    def __init__(self) -> None:
        self._algorithms: dict[Any, int] = {}

    def supports(self, spec: LayerSpec) -> str | None:
        reason = unsupported(spec)
        if reason is None and spec.geometry is not None:
            reason = "a convolution"
        if reason is None and spec.shape[0] % 16:
            reason = f"{spec.shape[0]} outputs are not a multiple of 16"
        return reason or missing(spec.device.index)

    def pack(self, weight: Tensor, mask: Tensor, spec: LayerSpec) -> dict[str, Tensor]:
        packed = torch._cslt_compress((weight * mask).contiguous())
        if spec.tokens is not None and self._key(spec) not in self._algorithms:
            rows = -(-spec.tokens // _ROWS) * _ROWS
            x = torch.zeros(rows, spec.shape[1], dtype=spec.dtype, device=spec.device)
            bias = torch.zeros(spec.shape[0], dtype=spec.dtype, device=spec.device)
            best = torch._cslt_sparse_mm_search(packed, x.t(), bias=bias, transpose_result=True)
            self._algorithms[self._key(spec)] = int(best)
        return {"packed": packed}

    def call(self, spec: LayerSpec, x: Any, packed: dict[str, Any], bias: Any) -> tuple[Callable[..., Any], tuple]:
        algorithm = self._algorithms.get(self._key(spec), 0)
        return torch.ops.mpcompile.nm_cusparselt.default, (x, packed["packed"], bias, spec.shape[0], algorithm)

    @staticmethod
    def _key(spec: LayerSpec) -> tuple[Any, ...]:
        return spec.shape, spec.dtype, spec.device, spec.tokens
