"""2:4 matrix product on ``wgmma.mma_async.sp`` (compute capability 9.0), fed by the tensor memory accelerator.

One warp fetches: each step of 128 columns is one box of kept values (BN, 64) and two of activations (BM, 64), with the
128-byte swizzle that the instruction reads. GROUPS warpgroups multiply; each owns BN / GROUPS output features of the
transposed tile (BN, BM). Each of the STAGES slots has two barriers: ``full`` (the fetched bytes have arrived) and
``empty`` (every multiplying warp is done with the slot). Metadata words are loaded from global memory into registers,
one word per thread for every 64 rows and 64 columns, one step ahead: if they were loaded between the issue of the
products and the wait, ptxas would serialise the products.
"""

# mypy: disable-error-code="no-untyped-def, attr-defined"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from mpcompile.kernels.nm_linear.gluon.parts import finish, powers


@gluon.constexpr_function
def accumulator_layout(BN, BM, GROUPS):
    """Layout of the fp32 tile (BN, BM): each warpgroup holds blocks of 64 rows."""
    registers = [[0, 1], [8, 0]] + [[0, c] for c in powers(8, BM)] + [[r, 0] for r in powers(64, BN // GROUPS)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [[16, 0], [32, 0]] + [[r, 0] for r in powers(BN // GROUPS, BN)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BN, BM])


@gluon.constexpr_function
def metadata_layout(BN, GROUPS):
    """Layout of a step's metadata words, (BN / 64, 2, 128)."""
    blocks = BN // GROUPS // 64
    registers = [[0, 1, 0]] + [[r, 0, 0] for r in powers(1, blocks)]
    lanes = [[0, 0, c] for c in powers(1, 32)]
    warps = [[0, 0, 32], [0, 0, 64]] + [[r, 0, 0] for r in powers(blocks, BN // 64)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [BN // 64, 2, 128])


@gluon.constexpr_function
def wgmma_sp(BLOCKS, BM, DT):
    """PTX of a warpgroup's step: 4 products of 32 columns for each of BLOCKS blocks of 64 rows, committed, not awaited.

    Operands: results, tied accumulators, addresses of the values and of both boxes of activations, metadata words. All
    descriptors (128-byte swizzle, a stride of 1024 bytes between groups of eight rows) are built before the fence:
    where registers are written between two products, ptxas serialises them.
    """
    each = BM // 2
    results = BLOCKS * each
    values, tokens, words = 2 * results, 2 * results + 1, 2 * results + 3
    lines = [
        "{",
        f".reg .b32 w, t; .reg .b64 a<{4 * BLOCKS}>, b<4>; .reg .pred p;",
        "setp.eq.b32 p, 0, 0;",
        "mov.u32 w, %tid.x; shr.u32 w, w, 7; shfl.sync.idx.b32 w, w, 0, 31, -1;",
    ]
    descriptor = "and.b32 t, t, 0x3ffff; shr.u32 t, t, 4; or.b32 t, t, 0x10000; mov.b64 {}, {{t, 0x40000040}};"
    for ks in range(4):
        lines.append(f"add.u32 t, ${tokens + ks // 2}, {ks % 2 * 64}; " + descriptor.format(f"b{ks}"))
        for block in range(BLOCKS):
            offset = block * 64 * 128 + ks * 32
            lines.append(f"mad.lo.u32 t, w, {BLOCKS * 64 * 128}, ${values}; add.u32 t, t, {offset}; ")
            lines.append(descriptor.format(f"a{ks * BLOCKS + block}"))
    lines.append("wgmma.fence.sync.aligned;")
    for ks in range(4):
        for block in range(BLOCKS):
            d = ", ".join(f"${block * each + i}" for i in range(each))
            lines.append(
                f"wgmma.mma_async.sp.sync.aligned.m64n{BM}k32.f32.{DT}.{DT} {{{d}}}, a{ks * BLOCKS + block}, b{ks}, "
                f"${words + block * 2 + ks // 2}, {ks % 2}, p, 1, 1, 0, 0;"
            )
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def constraints(BLOCKS, BM, inputs):
    """Constraint string of an inline asm: results, accumulators tied to them, and ``inputs`` other inputs."""
    results = BLOCKS * (BM // 2)
    return ",".join(["=f"] * results + [str(i) for i in range(results)] + ["r"] * inputs)


@gluon.jit
def load_metadata(E_ptr, n0, step, steps, BN: gl.constexpr, EL: gl.constexpr):
    e0 = n0 // 64 + gl.arange(0, BN // 64, gl.SliceLayout(1, gl.SliceLayout(2, EL)))
    e1 = step * 2 + gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, EL)))
    e2 = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, EL)))
    e = (e0[:, None, None] * (steps * 2) + e1[None, :, None]) * 128 + e2[None, None, :]
    return gl.load(E_ptr + e, mask=(e >= 0) & (step < steps), other=0)


@gluon.jit
def fetching(wd, xd, sa, sx, full, empty, n0, m0, steps, STAGES: gl.constexpr):
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(empty.index(slot), (step // STAGES) & 1 ^ 1)
        bar = full.index(slot)
        mbarrier.expect(bar, wd.nbytes_per_cta + 2 * xd.nbytes_per_cta)
        tma.async_load(wd, [n0, step * 64], bar, sa.index(slot))
        tma.async_load(xd, [m0, step * 128], bar, sx.index(slot * 2))
        tma.async_load(xd, [m0, step * 128 + 64], bar, sx.index(slot * 2 + 1))


@gluon.jit
def multiplying(
    sa, sx, full, empty, n0, m0, steps, E_ptr, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, ldy, ldr,
    BN: gl.constexpr, BM: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, ACT: gl.constexpr,
    DT: gl.constexpr,
):  # fmt: skip
    BLOCKS: gl.constexpr = BN // 64 // GROUPS
    CL: gl.constexpr = accumulator_layout(BN, BM, GROUPS)
    EL: gl.constexpr = metadata_layout(BN, GROUPS)
    PRODUCT: gl.constexpr = wgmma_sp(BLOCKS, BM, DT)
    OPERANDS: gl.constexpr = constraints(BLOCKS, BM, 3 + 2 * BLOCKS)
    TIED: gl.constexpr = constraints(BLOCKS, BM, 0)
    acc = gl.zeros([BN, BM], gl.float32, CL)
    e = load_metadata(E_ptr, n0, 0, steps, BN, EL)
    for step in range(steps):
        slot = step % STAGES
        following = load_metadata(E_ptr, n0, step + 1, steps, BN, EL)
        mbarrier.wait(full.index(slot), (step // STAGES) & 1)
        acc = gl.inline_asm(
            PRODUCT, OPERANDS, [acc, sa.index(slot), sx.index(slot * 2), sx.index(slot * 2 + 1), e], acc.type,
            is_pure=False,
        )  # fmt: skip
        # Wait for all groups: the metadata registers of a group still in flight could be overwritten too early.
        acc = gl.inline_asm("wgmma.wait_group.sync.aligned 0;", TIED, [acc], acc.type, is_pure=False)
        gl.inline_asm(
            "{ .reg .pred p; .reg .b32 t; mov.u32 t, %laneid; setp.eq.u32 p, t, 0;\n"
            "@p mbarrier.arrive.shared::cta.b64 _, [$0]; }",
            ("r",), [empty.index(slot)], (), is_pure=False,
        )  # fmt: skip
        e = following
    finish(acc, n0, m0, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, ldy, ldr, ACT, GROUPS * 4)


@gluon.jit(do_not_specialize=["M", "steps"])
def gemm(
    wd, xd, E_ptr, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, steps, ldy, ldr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, ACT: gl.constexpr, DT: gl.constexpr,
):  # fmt: skip
    """Y (M, N) = activation(X (M, K) W' + bias) * scale + residual.

    wd describes the kept values (rows, columns / 2) in boxes (BN, 64), xd the activations (M, K) in boxes (BM, 64);
    elements outside the matrices read as zero. bias, scale and residual may be None. Consecutive programs cover the
    features first, then the tokens.
    """
    BN: gl.constexpr = wd.block_shape[0]
    BM: gl.constexpr = xd.block_shape[0]
    sa = gl.allocate_shared_memory(wd.dtype, [STAGES] + wd.block_shape, wd.layout)
    sx = gl.allocate_shared_memory(xd.dtype, [2 * STAGES] + xd.block_shape, xd.layout)
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=GROUPS * 4)
    fence_async_shared()
    across = gl.cdiv(N, BN)
    n0 = gl.program_id(0) % across * BN
    m0 = gl.program_id(0) // across * BM
    # The tuples are written inside the call: bound to a name, they would need their strings converted to tensors.
    gl.warp_specialize(
        [
            (
                multiplying,
                (sa, sx, full, empty, n0, m0, steps, E_ptr, bias_ptr, scale_ptr, res_ptr, Y_ptr, M, N, ldy, ldr,
                 BN, BM, GROUPS, STAGES, ACT, DT),
            ),
            (fetching, (wd, xd, sa, sx, full, empty, n0, m0, steps, STAGES)),
        ],
        [1], [24],
    )  # fmt: skip
