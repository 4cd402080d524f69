"""The operators under torch.autocast: packed weights are multiplied in their own dtype; results have autocast's dtype.

Dense torch casts inputs and weight to autocast's dtype. A packed weight cannot be cast, because its layout depends on
its dtype. Its operator computes in the weight's dtype, which is at least as exact, and rounds the result. Token merging
keeps its sizes in fp32, which autocast does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from mpcompile.kernels.schema import NmConvArgs, NmGemmArgs, NmMlpArgs

_RESIDUAL = {cls.operator: cls.position("residual") for cls in (NmGemmArgs, NmMlpArgs, NmConvArgs)}
_EXACT = (
    "nm_attention",
    "token_size",
    "token_bias",
    "token_merge",
    "token_saliency",
    "token_mean",
    "token_follow",
    "token_pairs",
)
_KEYS = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def _packed(operator: Callable[..., Tensor], residual: int) -> Callable[..., Tensor]:
    """Wrap a native operator.

    Args:
        operator: its first two arguments are the input and the packed values.
        residual: position of the residual among its arguments.
    """

    def call(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
        wanted = torch.get_autocast_dtype(x.device.type)
        added = rest[residual - 2]
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            if not x.is_floating_point() or torch.float64 in (x.dtype, values.dtype):  # autocast ignores doubles
                return operator(x, values, *rest)
            if isinstance(added, Tensor):
                wanted = torch.promote_types(wanted, added.dtype)  # as when it is added afterwards
                rest = (*rest[: residual - 2], added.to(values.dtype), *rest[residual - 1 :])
            return operator(x.to(values.dtype), values, *rest).to(wanted)

    return call


def _exact(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an operator that computes in the dtypes it is given."""

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(*args)

    return call


def define(library: Library) -> None:
    """Register the autocast rules of all operators. The operators must already be defined in ``library``."""
    operators = getattr(torch.ops, library.ns)
    for key in _KEYS:
        for name, residual in _RESIDUAL.items():
            library.impl(name, _packed(getattr(operators, name).default, residual), key)
        for name in _EXACT:
            library.impl(name, _exact(getattr(operators, name).default), key)
