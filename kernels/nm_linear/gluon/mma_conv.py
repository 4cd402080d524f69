"""2:4 convolution on ``mma.sp`` by implicit GEMM: the product of mma_sp.py over pixels gathered from the image.

No patches are written to memory. Columns of the packed weight are channels within a tap, so that a step of BK columns
reads BK neighbouring channels of one tap. Input channels must be a multiple of BK. Pixels outside the image are zero.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mpcompile.kernels.nm_linear.gluon.mma_sp import accumulator_layout, allocate, copy_layout, fetch_weights, multiply
from mpcompile.kernels.nm_linear.gluon.parts import finish


@gluon.jit
def fetch(
    A_ptr, E_ptr, sa, se, sx, n0, step, steps, slot, image, top, left, live, H, W, C, KW, taps, dil_h, dil_w,
    BK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step. image, top, left and live describe the tile's pixels, without the tap's offset."""
    LX: gl.constexpr = copy_layout(BK, WARPS)
    fetch_weights(A_ptr, E_ptr, sa, se, n0, step, steps, slot, BK, WARPS)
    tap = step * BK // C
    y = top + tap // KW * dil_h
    x = left + tap % KW * dil_w
    inside = live & (y >= 0) & (y < H) & (x >= 0) & (x < W) & (tap < taps)
    channel = step * BK % C // 2 + gl.arange(0, BK // 2, gl.SliceLayout(0, LX))
    source = (image + (y * W + x).to(gl.int64) * (C // 2))[:, None] + channel[None, :]
    async_copy.async_load(sx.index(slot), source, mask=inside[:, None] & (channel >= 0)[None, :])
    async_copy.commit_group()


_GEOMETRY = ["H", "W", "OH", "OW", "KW", "taps", "stride_h", "stride_w", "pad_h", "pad_w", "dil_h", "dil_w"]


@gluon.jit(do_not_specialize=["M", "steps", *_GEOMETRY])
def gemm(
    A_ptr, E_ptr, X_ptr, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, C, steps, ldy, ldr,
    H, W, OH, OW, KW, taps, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    BN: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, WN: gl.constexpr, WM: gl.constexpr,
    STAGES: gl.constexpr, ACT: gl.constexpr, DT: gl.constexpr,
):  # fmt: skip
    """Y (M, N) = activation(conv(X) + bias) * scale + residual: X (B, H, W, C), M = B * OH * OW output pixels."""
    CL: gl.constexpr = accumulator_layout(BN, BM, WN, WM)
    WARPS: gl.constexpr = WN * WM
    sa, sx, se = allocate(BN, BM, BK, STAGES)
    across = gl.cdiv(N, BN)
    n0 = gl.program_id(0) % across * BN
    m0 = gl.program_id(0) // across * BM
    pixel = m0 + gl.arange(0, BM, gl.SliceLayout(1, copy_layout(BK, WARPS)))
    image = X_ptr + (pixel // (OH * OW)).to(gl.int64) * H * W * (C // 2)
    top = pixel // OW % OH * stride_h - pad_h
    left = pixel % OW * stride_w - pad_w
    live = pixel < M
    for s in gl.static_range(STAGES - 1):
        fetch(
            A_ptr, E_ptr, sa, se, sx, n0, s, steps, s, image, top, left, live, H, W, C, KW, taps,
            dil_h, dil_w, BK, WARPS,
        )  # fmt: skip
    acc = gl.zeros([BN, BM], gl.float32, CL)
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        fetch(
            A_ptr, E_ptr, sa, se, sx, n0, ahead, steps, ahead % STAGES, image, top, left, live, H, W, C, KW, taps,
            dil_h, dil_w, BK, WARPS,
        )  # fmt: skip
        acc = multiply(acc, sa, sx, se, step % STAGES, BK, WN, WM, DT)
    async_copy.wait_group(0)
    finish(acc, n0, m0, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, ldy, ldr, ACT, WARPS)
