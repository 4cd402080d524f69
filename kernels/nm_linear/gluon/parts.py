"""Shared parts of the sparse tensor-core kernels: powers of two, activations, and the epilogue.

Needs Triton 3.9 (``gl.inline_asm``). Import it only if :func:`mpcompile.kernels.nm_linear.gpu.launch.missing` returns
None.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def powers(start, end):
    """Return start, 2 start, 4 start, ... below end."""
    numbers = []
    while start < end:
        numbers.append(start)
        start *= 2
    return numbers


@gluon.constexpr_function
def output_layout(BN, BM, WARPS):
    """Layout of a transposed tile (BN, BM): eight neighbouring features per thread, 16 bytes of a stored row."""
    lanes = min(BN // 8, 32)
    return gl.BlockedLayout([8, 1], [lanes, 32 // lanes], [1, WARPS], [0, 1])


@gluon.jit
def gelu(x):
    # Abramowitz and Stegun 7.1.26, |error| <= 1.5e-7. gl.erf compiles to a branch and spills registers.
    z = gl.abs(x * 0.7071067811865476)
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * p * gl.exp(-z * z)  # probability of the normal distribution beyond |x|
    return x * gl.where(x < 0.0, tail, 1.0 - tail)


@gluon.jit
def activate(x, ACT: gl.constexpr):
    if ACT == "relu":
        x = gl.maximum(x, 0.0)
    if ACT == "gelu":
        x = gelu(x)
    if ACT == "gelu_tanh":
        x = x / (1.0 + gl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    if ACT == "silu":
        x = x / (1.0 + gl.exp(-x))
    return x


@gluon.jit
def finish(acc, n0, m0, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, ldy, ldr, ACT: gl.constexpr, WARPS: gl.constexpr):
    """activation(acc + bias) * scale + residual -> rows m0.. and columns n0.. of Y; acc (BN, BM) is transposed."""
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    n = n0 + gl.arange(0, BN, rows)
    if bias_ptr is not None:
        acc = acc + gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    acc = activate(acc, ACT)
    if scale_ptr is not None:
        acc = acc * gl.load(scale_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    OL: gl.constexpr = output_layout(BN, BM, WARPS)
    on = n0 + gl.arange(0, BN, gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, BM, gl.SliceLayout(0, OL))
    inside = (om < M)[None, :] & (on < N)[:, None]
    if res_ptr is not None:
        out = gl.convert_layout(acc, OL)
        res = gl.load(res_ptr + om.to(gl.int64)[None, :] * ldr + on[:, None], mask=inside, other=0.0)
        out = (out + res.to(gl.float32)).to(Y_ptr.dtype.element_ty)
    else:
        out = gl.convert_layout(acc.to(Y_ptr.dtype.element_ty), OL)
    gl.store(Y_ptr + om.to(gl.int64)[None, :] * ldy + on[:, None], out, mask=inside)
