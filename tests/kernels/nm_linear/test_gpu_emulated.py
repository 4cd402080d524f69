"""Results of the sparse tensor-core kernels, from executing their compiled PTX, against float64."""

import re

import pytest
import torch
import torch.nn.functional as F

from mpcompile.errors import InputError
from mpcompile.kernels.nm_linear import layouts, sparse24
from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch
from mpcompile.kernels.nm_linear.gpu.build import Build, parts_of
from mpcompile.kernels.nm_linear.packed import activate
from mpcompile.passes.mask import top_n
from tests.support.gpu_builds import BUILDS, CONVOLUTIONS, EXTRA, compiled
from tests.support.helpers import relative
from tests.support.ptx import Fault
from tests.support.ptx.sparse_gemm import HALF, LAYOUTS, TOLERANCE, EmulatedKernel, Problem, emulated, run

ROUGH, WIDE_MMA, WIDE_WGMMA = EXTRA
ON = {"gluon_mma_sp": 80, "gluon_wgmma_sp": 90}
# One build of each tile. Tiles that only 8.6 and 8.9 use are emulated from their build for 8.6.
PRODUCTS = [b for b in BUILDS if b.kernel in ON and b.aligned and b.arch in (ON[b.kernel], 86)]
EACH = list({(b.kernel, b.tile): b for b in reversed(PRODUCTS)}.values())
WAYS = {"eager": {}, "lazy": {"lazy": True}}


@pytest.fixture(scope="session")
def records(gpu_folder):
    return compiled(gpu_folder)


def odd(build: Build, aligned: bool = True) -> tuple[int, int, int]:
    """Tokens, features and inputs that no tile divides: two rows of tiles if tiles are small."""
    tile = build.cut
    return tile.m + 5 if tile.m <= 64 else tile.m - 3, tile.n - (16 if aligned else 27), 3 * tile.k + 16


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("build", [*EACH, *EXTRA], ids=lambda build: build.name)
def test_odd_shapes(build, way, records):
    problem = Problem.make(*odd(build, build.aligned), build.dtype)
    found = run(build, records[build], problem, **WAYS[way])
    assert relative(found, problem.expected(build.epilogue)) < TOLERANCE[build.dtype]


@pytest.mark.parametrize("way", [{"reverse": True}, {"lazy": True}, {"lazy": True, "reverse": True}], ids=str)
@pytest.mark.parametrize("build", [ROUGH, WIDE_WGMMA], ids=lambda build: build.kernel)
def test_warps_in_another_order(build, way, records):
    """Strands as small as the instructions allow, so that a missing barrier shows."""
    problem = Problem.make(*odd(build, False), build.dtype)
    found = run(build, records[build], problem, warps=1 if build is ROUGH else 4, **way)
    assert relative(found, problem.expected(build.epilogue)) < TOLERANCE[build.dtype]


@pytest.mark.parametrize("build", EXTRA, ids=lambda build: build.name)
@pytest.mark.parametrize("m", [1, 16])
def test_few_tokens_and_one_step(build, m, records):
    problem = Problem.make(m, 48, 48, build.dtype)
    found = run(build, records[build], problem, lazy=True)
    assert relative(found, problem.expected(build.epilogue)) < TOLERANCE[build.dtype]


def test_addresses_beyond_2_to_the_31_elements(records):
    rows = 2**23  # before the rows that are computed
    problem = Problem.make(20, 48, 272, ROUGH.dtype)
    found = run(ROUGH, records[ROUGH], problem, first=rows // ROUGH.cut.m)
    assert rows * 272 > 2**31
    assert relative(found, problem.expected(ROUGH.epilogue)) < TOLERANCE[ROUGH.dtype]


def test_rows_with_gaps_between_them(records):
    problem = Problem.make(40, 48, 128, ROUGH.dtype)
    wide = torch.zeros(40, 160, dtype=torch.float16)
    wide[:, 16:144] = problem.x
    held = Problem(wide[:, 16:144], *list(problem.__dict__.values())[1:])
    assert not held.x.is_contiguous()
    found = run(ROUGH, records[ROUGH], held)
    assert torch.equal(found, run(ROUGH, records[ROUGH], problem))


@pytest.mark.parametrize("build", CONVOLUTIONS, ids=lambda build: build.name)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1)), ((2, 3), (1, 2), (0, 2), (2, 1))],
)
def test_convolutions_gather_their_pixels(build, kernel, stride, padding, dilation, records):
    """Edges, strides and dilations, two images; the packed columns (9 x 64) are padded to a multiple of 128."""
    dtype, (act, bias, _, res) = HALF[build.dtype], parts_of(build.epilogue)
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, shape = values(2, 64, 7, 6), (build.cut.n - 16, 64, *kernel)
    weight = values(*shape) / (64 * kernel[0] * kernel[1]) ** 0.5
    rows = layouts.to_rows(values(*shape))
    mask = layouts.from_rows(top_n(rows.unflatten(-1, (-1, 4)), 2).flatten(-2), shape)
    exact = F.conv2d(x.double(), (weight * mask).double(), None, stride, padding, dilation)
    b, r = values(shape[0]) if bias else None, values(*exact.shape) if res else None
    exact = exact if b is None else exact + b.double()[:, None, None]
    exact = activate(exact, act) if r is None else activate(exact, act) + r.double()
    packed = sparse24.pack(weight, mask, sparse24.MMA_SP)
    with emulated(EmulatedKernel(build, records[build], lazy=True)):
        axes = (stride, padding, dilation)
        found = gpu_launch.convolution(x, *packed, b, r, axes, shape, act, tile=build.cut)
    assert found.shape == exact.shape and relative(found, exact) < TOLERANCE[build.dtype]


# --- Controls: errors have to be noticed ---


def corrupted(index: torch.Tensor, how: str, other: torch.Tensor) -> torch.Tensor:
    body = index[: -sparse24.CHECKSUM_BYTES].view(torch.int32)
    if how == "lanes rotated":
        body = body.view(-1, 32).roll(1, -1)
    elif how == "halves swapped":
        body = ((body >> 16) & 0xFFFF) | (body << 16)
    elif how == "words of the next block":
        body = body.roll(32)
    elif how == "the other kernel's order":
        body = other[: -sparse24.CHECKSUM_BYTES].view(torch.int32)
    elif how == "one group's positions":
        first = (body[:1] & 3) + ((body[:1] >> 2) & 3) * 4
        body = torch.cat([(body[:1] & ~15) | torch.where(first == 0b1001, 0b1110, 0b1001).int(), body[1:]])
    return torch.cat([body.contiguous().flatten().view(torch.uint8), index[-sparse24.CHECKSUM_BYTES :]])


HOW = ["lanes rotated", "halves swapped", "words of the next block", "the other kernel's order"]


@pytest.mark.parametrize("how", [*HOW, "one group's positions"])
@pytest.mark.parametrize("build", [WIDE_MMA, WIDE_WGMMA], ids=lambda build: build.kernel)
def test_corrupted_metadata_fail(build, how, records):
    problem = Problem.make(24, 64, 128, build.dtype)
    layouts = LAYOUTS[build.kernel], next(v for k, v in LAYOUTS.items() if k != build.kernel)
    index, other = (sparse24.pack(problem.weight, problem.mask, layout)[1] for layout in layouts)
    found = run(build, records[build], problem, corrupted(index, how, other))
    expected = problem.expected(build.epilogue)
    if how == "one group's positions":  # one value of 64 x 64, in one output feature
        assert relative(found[:, :1], expected[:, :1]) > 3 * TOLERANCE[build.dtype]
        assert relative(found[:, 1:], expected[:, 1:]) < TOLERANCE[build.dtype]
    else:
        assert relative(found, expected) > 0.1
    with pytest.raises(InputError, match=r"belong|order"):
        sparse24.check(problem.packed(build)[0], corrupted(index, how, other))


SPOILED = {
    "cp.async.wait_group waits for less": (
        ROUGH,
        r"cp\.async\.wait_group\s+\d",
        "cp.async.wait_group 9",
        {"lazy": True},
    ),
    "no barrier after cp.async": (ROUGH, r"bar\.sync\s+0;", "", {"warps": 1, "lazy": True}),
    "a fragment from elsewhere": (ROUGH, r"(ldmatrix\S+\s+\{[^}]*\}, \[%r\d+)\]", r"\g<1>+16]", {}),
    "wgmma waits for less": (
        WIDE_WGMMA,
        r"wgmma\.wait_group\.sync\.aligned 0",
        "wgmma.wait_group.sync.aligned 1",
        {"lazy": True},
    ),
    "slots that are never given back": (WIDE_WGMMA, r"@p mbarrier\.arrive\.shared::cta\.b64 _, \[[^]]*\];", "", {}),
    "slots filled before they are given back": (
        WIDE_WGMMA,
        r"(mbarrier\.try_wait\S+ complete, \[%r\d+\], )(%r\d+)",
        None,
        {},
    ),
    "activations of another step": (WIDE_WGMMA, r"(shl\.b32\s+%r\d+, %r\d+, )14;", r"\g<1>13;", {}),
}


@pytest.mark.parametrize("what", SPOILED)
def test_broken_kernels_fail(what, records):
    build, pattern, replacement, way = SPOILED[what]
    ptx = records[build]["ptx"]
    if replacement is None:  # the last wait in the file is the fetching warp's, which then continues at once
        place = list(re.finditer(pattern, ptx))[-1]
        ptx = ptx[: place.start()] + "setp.eq.b32 complete, 0, 0" + ptx[place.end() :]
    spoiled = {**records[build], "ptx": ptx if replacement is None else re.sub(pattern, replacement, ptx)}
    assert spoiled["ptx"] != records[build]["ptx"]
    problem = Problem.make(70, 90, 6 * 128 + 16, build.dtype)
    try:
        found = run(build, spoiled, problem, **way)
    except Fault:
        return
    error = relative(found.nan_to_num(1e3), problem.expected(build.epilogue))
    assert error > 0.01, f"it computes the product all the same: {error:.1e}"
