"""2:4 matrix product on ``mma.sp.m16n8k32`` (compute capability 8.0 and later).

The left operand of the instruction is the sparse one, so the product is computed transposed: a tile holds BN output
features by BM tokens. ``cp.async`` brings each step of BK columns into swizzled shared memory, STAGES - 1 steps ahead:
kept values (BN, BK / 2) and activations (BM, BK), both as pairs in an int32, and metadata words. Thread layouts are
those of the instruction's fragments, so that loads from shared memory become ``ldmatrix``.

Activations in rows from M on and in columns from K on count as zero; weights are padded (sparse24.py).
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mpcompile.kernels.nm_linear.gluon.parts import finish, powers

_LANES = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]  # lane 4g + q: row g, int32 column q


@gluon.constexpr_function
def values_layout(BN, WN, WM):
    """Layout of the kept values of 32 columns, int32 (BN, 8)."""
    registers = [[8, 0], [0, 4]] + [[r, 0] for r in powers(16, BN // WN)]
    warps = [[r, 0] for r in powers(BN // WN, BN)] + [[0, 0] for _ in powers(1, WM)]
    return gl.DistributedLinearLayout(registers, _LANES, warps, [], [BN, 8])


@gluon.constexpr_function
def tokens_layout(BM, WN, WM):
    """Layout of 32 columns of activations, int32 (BM, 16)."""
    registers = [[0, 4], [0, 8]] + [[r, 0] for r in powers(8, BM // WM)]
    warps = [[0, 0] for _ in powers(1, WN)] + [[r, 0] for r in powers(BM // WM, BM)]
    return gl.DistributedLinearLayout(registers, _LANES, warps, [], [BM, 16])


@gluon.constexpr_function
def metadata_layout(BN, WN, WM):
    """Layout of the metadata words of 32 columns, (BN / 32, 1, 32)."""
    registers = [[r, 0, 0] for r in powers(1, BN // WN // 32)]
    lanes = [[0, 0, c] for c in powers(1, 32)]
    warps = [[r, 0, 0] for r in powers(BN // WN // 32, BN // 32)] + [[0, 0, 0] for _ in powers(1, WM)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BN // 32, 1, 32])


@gluon.constexpr_function
def accumulator_layout(BN, BM, WN, WM):
    """Layout of the fp32 accumulator (BN, BM)."""
    registers = [[0, 1], [8, 0]] + [[0, c] for c in powers(8, BM // WM)] + [[r, 0] for r in powers(16, BN // WN)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [[r, 0] for r in powers(BN // WN, BN)] + [[0, c] for c in powers(BM // WM, BM)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BN, BM])


@gluon.constexpr_function
def mma_sp(MT, NT, DT):
    """Return the instructions of a warp for 32 columns: MT x NT tiles of 16 x 8.

    Operands are numbered: results, then accumulators, values, activations, metadata. One metadata word serves two
    16-row tiles; the instruction's last operand selects the quarter of the lanes that a tile reads.
    """
    results = MT * NT * 4
    values, tokens, words = 2 * results, 2 * results + MT * 4, 2 * results + MT * 4 + NT * 4

    def four(start):
        return "{" + ", ".join(f"${start + i}" for i in range(4)) + "}"

    lines = []
    for mt in range(MT):
        for nt in range(NT):
            d = (mt * NT + nt) * 4
            operands = ", ".join(map(four, (d, values + mt * 4, tokens + nt * 4, d + results)))
            name = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{DT}.{DT}.f32"
            lines.append(f"{name} {operands}, ${words + mt // 2}, 0x{mt % 2};")
    return "\n".join(lines)


@gluon.jit
def fetch_weights(A_ptr, E_ptr, sa, se, n0, step, steps, slot, BK: gl.constexpr, WARPS: gl.constexpr):
    """Start the copies of a step's values and metadata; none after the last step."""
    BN: gl.constexpr = sa.shape[1]
    LA: gl.constexpr = gl.BlockedLayout([1, 4], [512 // BK, BK // 16], [WARPS, 1], [1, 0])
    LE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 1, 8], [WARPS, 1, 1], [2, 1, 0])
    live = step < steps
    an = n0 + gl.arange(0, BN, gl.SliceLayout(1, LA))
    ak = step * (BK // 4) + gl.arange(0, BK // 4, gl.SliceLayout(0, LA))
    a = A_ptr + an.to(gl.int64)[:, None] * (steps * (BK // 4)) + ak[None, :]
    async_copy.async_load(sa.index(slot), a, mask=(an >= 0)[:, None] & live)
    e0 = n0 // 32 + gl.arange(0, BN // 32, gl.SliceLayout(1, gl.SliceLayout(2, LE)))
    e1 = step * (BK // 32) + gl.arange(0, BK // 32, gl.SliceLayout(0, gl.SliceLayout(2, LE)))
    e2 = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, LE)))
    e = (e0[:, None, None] * (steps * (BK // 32)) + e1[None, :, None]) * 32 + e2[None, None, :]
    async_copy.async_load(se.index(slot), E_ptr + e, mask=(e >= 0) & live)


@gluon.constexpr_function
def copy_layout(BK, WARPS):
    """Layout of the copies of activations to shared memory, int32 (BM, BK / 2)."""
    return gl.BlockedLayout([1, 4], [256 // BK, BK // 8], [WARPS, 1], [1, 0])


@gluon.jit
def fetch(A_ptr, E_ptr, X_ptr, sa, se, sx, n0, m0, step, steps, slot, M, K, ldx, BK: gl.constexpr, WARPS: gl.constexpr):
    """Start the copies of one step. After the last step nothing is copied, but a group is still committed."""
    BM: gl.constexpr = sx.shape[1]
    LX: gl.constexpr = copy_layout(BK, WARPS)
    fetch_weights(A_ptr, E_ptr, sa, se, n0, step, steps, slot, BK, WARPS)
    xm = m0 + gl.arange(0, BM, gl.SliceLayout(1, LX))
    xk = step * (BK // 2) + gl.arange(0, BK // 2, gl.SliceLayout(0, LX))
    x = X_ptr + xm.to(gl.int64)[:, None] * (ldx // 2) + xk[None, :]
    async_copy.async_load(sx.index(slot), x, mask=(xm < M)[:, None] & (xk < K // 2)[None, :])
    async_copy.commit_group()


@gluon.jit
def multiply(acc, sa, sx, se, slot, BK: gl.constexpr, WN: gl.constexpr, WM: gl.constexpr, DT: gl.constexpr):
    """Multiply one step, 32 columns at a time: the fragments of a whole step would take twice the registers."""
    BN: gl.constexpr = sa.shape[1]
    BM: gl.constexpr = sx.shape[1]
    AL: gl.constexpr = values_layout(BN, WN, WM)
    XL: gl.constexpr = tokens_layout(BM, WN, WM)
    EL: gl.constexpr = metadata_layout(BN, WN, WM)
    ASM: gl.constexpr = mma_sp(BN // WN // 16, BM // WM // 8, DT)
    for k in gl.static_range(BK // 32):
        a = sa.index(slot).slice(k * 8, 8, 1).load(AL)
        x = sx.index(slot).slice(k * 16, 16, 1).load(XL)
        e = se.index(slot).slice(k, 1, 1).load(EL)
        acc = gl.inline_asm(ASM, ("=&f", "f", "r", "r", "r"), [acc, a, x, e], acc.type, is_pure=True)
    return acc


@gluon.jit
def allocate(BN: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """Allocate shared memory for STAGES steps: values, activations, metadata."""
    SA: gl.constexpr = gl.SwizzledSharedLayout(4, 1 if BK >= 128 else 2, 8 if BK >= 128 else 4, [1, 0])
    SX: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    SE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    sa = gl.allocate_shared_memory(gl.int32, [STAGES, BN, BK // 4], SA)
    sx = gl.allocate_shared_memory(gl.int32, [STAGES, BM, BK // 2], SX)
    se = gl.allocate_shared_memory(gl.int32, [STAGES, BN // 32, BK // 32, 32], SE)
    return sa, sx, se


@gluon.jit(do_not_specialize=["M", "steps"])
def gemm(
    A_ptr, E_ptr, X_ptr, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, K, steps, ldx, ldy, ldr,
    BN: gl.constexpr, BM: gl.constexpr, BK: gl.constexpr, WN: gl.constexpr, WM: gl.constexpr,
    STAGES: gl.constexpr, ACT: gl.constexpr, DT: gl.constexpr,
):  # fmt: skip
    """Y (M, N) = activation(X (M, K) W' + bias) * scale + residual, W (N, K) packed for ``steps`` steps of BK columns.

    A_ptr, E_ptr, X_ptr point to int32; ldx, ldy, ldr count elements of 16 bits. bias, scale, residual may be None.
    Consecutive programs, one per tile, cover the features first, then the tokens: those that run together share their
    rows of activations.
    """
    CL: gl.constexpr = accumulator_layout(BN, BM, WN, WM)
    WARPS: gl.constexpr = WN * WM
    sa, sx, se = allocate(BN, BM, BK, STAGES)
    across = gl.cdiv(N, BN)
    n0 = gl.program_id(0) % across * BN
    m0 = gl.program_id(0) // across * BM
    for s in gl.static_range(STAGES - 1):
        fetch(A_ptr, E_ptr, X_ptr, sa, se, sx, n0, m0, s, steps, s, M, K, ldx, BK, WARPS)
    acc = gl.zeros([BN, BM], gl.float32, CL)
    for step in range(steps):
        async_copy.wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        fetch(A_ptr, E_ptr, X_ptr, sa, se, sx, n0, m0, ahead, steps, ahead % STAGES, M, K, ldx, BK, WARPS)
        acc = multiply(acc, sa, sx, se, step % STAGES, BK, WN, WM, DT)
    async_copy.wait_group(0)
    finish(acc, n0, m0, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, ldy, ldr, ACT, WARPS)
