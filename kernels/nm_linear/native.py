"""The native operators as torch sees them: schema, CPU kernel, fake, gradient.

They are registered by ``Library.define`` and ``impl`` with as little Python as possible on the way to the kernel: a
tiny layer costs about as much as ``F.linear``. Where no kernel can be had (see cpu.py), the plain torch of packed.py
runs instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from mpcompile.kernels.nm_linear import packed

_SCHEMAS = {
    "nm_gemm": "(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? residual, int out, int n, int m, "
    "int layout, str activation) -> Tensor",
    "nm_mlp": "(Tensor x, Tensor values1, Tensor index1, Tensor? bias1, Tensor values2, Tensor index2, Tensor? bias2, "
    "Tensor? residual, int hidden, int out, int n1, int m1, int n2, int m2, int layout1, int layout2, str activation) "
    "-> Tensor",
    "nm_conv": "(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int n, int m, int[] shape, int layout, str activation) -> Tensor",
}


def define(library: Library) -> None:
    """Define the operators in ``library``."""
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(packed, name), "CompositeImplicitAutograd")
