"""The GPU engines without a GPU: refusals and their reasons, the choice of tiles, and the arguments of launches."""

import dataclasses

import pytest
import torch

import mpcompile
from mpcompile.config import Config
from mpcompile.errors import InputError
from mpcompile.kernels import ops, timing
from mpcompile.kernels.dispatch import GPU_ENGINES, LayerSpec, choose
from mpcompile.kernels.nm_format import Pattern
from mpcompile.kernels.nm_linear import sparse24
from mpcompile.kernels.nm_linear.gpu import cusparselt, expand
from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch
from mpcompile.kernels.nm_linear.gpu import model as gpu_model
from mpcompile.kernels.nm_linear.gpu.build import Build
from mpcompile.kernels.nm_linear.gpu.tiles import SHARED_BYTES, TILES, family, tiles_for
from tests.support.helpers import images, relative, tiny_vit
from tests.support.ptx.sparse_gemm import EmulatedKernel, Problem, emulated

SPEC = LayerSpec((768, 3072), torch.bfloat16, torch.device("cuda", 0), Pattern(2, 4), inputs=(8, 197, 3072))
CONV = dataclasses.replace(SPEC, shape=(64, 256, 1, 1), geometry=([1, 1], [0, 0], [1, 1], 1), inputs=(1, 256, 14, 14))
WGMMA, MMA, CUSPARSELT, EXPAND = GPU_ENGINES


@pytest.fixture
def gpu(monkeypatch):
    """A function that simulates the presence of a GPU of a compute capability."""

    def make(capability, triton=None, library=True):
        for cached in (gpu_launch.missing, cusparselt.missing):
            cached.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Fake")
        monkeypatch.setattr(gpu_launch, "old_triton", lambda: triton)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)

    yield make
    for cached in (gpu_launch.missing, cusparselt.missing):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("capability", "wgmma", "mma"),
    [
        ((7, 5), "begin with 8.0", "begin with 8.0"),
        ((8, 0), "wgmma needs 9.0", None),
        ((8, 9), "wgmma needs 9.0", None),
        ((9, 0), None, None),
        ((10, 0), "wgmma needs 9.0", None),
    ],
)
def test_a_gpu_that_cannot(gpu, capability, wgmma, mma):
    gpu(capability)
    for engine, reason in ((WGMMA, wgmma), (MMA, mma), (CUSPARSELT, mma)):
        found = engine.supports(SPEC)
        assert (found is None) if reason is None else found.endswith(reason)
        assert found is None or found.startswith("compute capability {}.{}: ".format(*capability))
    assert EXPAND.supports(SPEC) is None


def test_reasons_are_named(gpu):
    gpu((9, 0))
    for change, reason in (
        ({"dtype": torch.float32}, "dtype float32 (fp16 and bf16 have kernels)"),
        ({"pattern": Pattern(8, 16)}, "pattern 8:16 (sparse tensor cores run 2:4)"),
        ({"shape": (768, 3080)}, "3080 inputs are not a multiple of 16"),
        ({"shape": (10, 3072)}, "fewer than 16 outputs"),
        ({"device": torch.device("cpu")}, "device cpu"),
    ):
        spec = dataclasses.replace(SPEC, **change)
        assert [engine.supports(spec) for engine in (WGMMA, MMA, CUSPARSELT)] == [reason] * 3
    assert EXPAND.supports(dataclasses.replace(SPEC, pattern=Pattern(8, 16))) is None
    assert EXPAND.supports(dataclasses.replace(SPEC, dtype=torch.int8)).startswith("dtype int8")
    assert MMA.supports(CONV) is WGMMA.supports(CONV) is None
    assert CUSPARSELT.supports(CONV) == EXPAND.supports(CONV) == "a convolution"
    grouped = dataclasses.replace(CONV, geometry=([1, 1], [0, 0], [1, 1], 2))
    assert MMA.supports(grouped) == "grouped convolution"
    wide = dataclasses.replace(CONV, shape=(64, 256, 3, 3))
    assert MMA.supports(wide) is None
    assert WGMMA.supports(wide) == CUSPARSELT.supports(wide) == "convolution other than 1x1"
    narrow = dataclasses.replace(wide, shape=(64, 96, 3, 3))
    assert MMA.supports(narrow) == "96 input channels of a convolution are not a multiple of 64"
    assert CUSPARSELT.supports(dataclasses.replace(SPEC, shape=(770, 3072))) == "770 outputs are not a multiple of 16"


def test_old_triton_and_absent_libraries_are_named(gpu):
    gpu((9, 0), triton="Triton 3.8.0: the kernels need gl.inline_asm, which came with 3.9", library=False)
    assert "3.9" in MMA.supports(SPEC) and "3.9" in WGMMA.supports(SPEC)
    assert CUSPARSELT.supports(SPEC) == "torch was built without cuSPARSELt"
    choice = choose(SPEC, "gluon_mma_sp")
    assert choice.engine.name == "dense" and choice.why.startswith("gluon_mma_sp: Triton 3.8.0")


def test_without_timings_the_widest_instruction_is_preferred(gpu):
    gpu((9, 0))
    assert choose(SPEC).engine is WGMMA
    gpu((8, 6))
    assert choose(SPEC).engine is MMA
    assert choose(dataclasses.replace(SPEC, pattern=Pattern(8, 16))).engine is EXPAND
    gpu((7, 5))
    assert choose(dataclasses.replace(SPEC, dtype=torch.float16)).engine is EXPAND


def test_timings_decide(gpu):
    gpu((9, 0))
    timing.set_cost_model(
        lambda name, spec, threads: {"dense": 10, "gluon_mma_sp": 8, "gluon_wgmma_sp": 7}.get(name, 20)
    )
    try:
        assert choose(SPEC).engine is WGMMA
        timing.set_cost_model(lambda name, spec, threads: 10 if name == "dense" else 9.9)
        assert choose(SPEC).engine.name == "dense"
    finally:
        timing.set_cost_model(None)


def test_every_architecture_has_tiles_that_fit():
    for arch, limit in SHARED_BYTES.items():
        for kernel in ("gluon_mma_sp", "gluon_wgmma_sp"):
            tiles = tiles_for(kernel, arch)
            assert bool(tiles) == (kernel == "gluon_mma_sp" or arch == 90)
            assert all(tile.stage_bytes * tile.stages < limit for tile in tiles)
    assert family((7, 5)) is None and family((12, 0)) == 86
    names = [(tile.kernel, tile.name) for tile in TILES]
    assert len(set(names)) == len(names)


def test_tiles_follow_the_tokens():
    for arch in SHARED_BYTES:
        few = gpu_model.choose_tile("gluon_mma_sp", 1, 768, 768, arch)
        many = gpu_model.choose_tile("gluon_mma_sp", 50000, 3072, 768, arch)
        assert few.m == 16 and many.n * many.m >= 128 * 64
        for n in (16, 1000, 768):
            tile = gpu_model.choose_tile("gluon_mma_sp", 4096, n, 768, arch)
            assert sparse24.padded((n, 768))[0] % tile.n == 0
        assert gpu_model.predict_us(many, 50000, 3072, 768, gpu_model.chip_for(arch)) > gpu_model.predict_us(
            many, 25000, 3072, 768, gpu_model.chip_for(arch)
        )


# --- Bad input ---


def product(x, problem, layout=sparse24.MMA_SP, out=None, **how):
    values, index = sparse24.pack(problem.weight, problem.mask, layout)
    values, index = how.pop("values", values), how.pop("index", index)
    bias, residual = how.pop("bias", None), how.pop("residual", None)
    return gpu_launch.product(x, values, index, bias, residual, out or len(problem.weight), layout, "none", **how)


PROBLEM = Problem.make(8, 64, 128, "fp16")


def test_no_tokens_launch_nothing():
    for shape in ((0, 128), (3, 0, 128)):
        assert product(torch.zeros(shape, dtype=torch.float16), PROBLEM).shape == (*shape[:-1], 64)


@pytest.mark.parametrize(
    ("x", "how", "message"),
    [
        (PROBLEM.x.bfloat16(), {}, "mixes dtypes"),
        (PROBLEM.x.float(), {"values": torch.zeros(8192)}, "mixes dtypes"),
        (PROBLEM.x[:, :112], {"out": 64, "values": torch.zeros(64, dtype=torch.float16)}, "do not fit a weight"),
        (PROBLEM.x, {"out": 200}, "do not fit a weight"),
        (PROBLEM.x[:, :120], {}, "expected a multiple of 16 features, found 120"),
        (PROBLEM.x[:1].expand(2**31, 128), {}, "the product is too large"),
        (PROBLEM.x, {"bias": torch.zeros(63, dtype=torch.float16), "tile": TILES[0]}, "the bias does not fit"),
        (PROBLEM.x.to("meta"), {}, "packed weights are on another device"),
    ],
)
def test_bad_input_is_refused_before_the_launch(x, how, message):
    with pytest.raises(InputError, match=message):
        product(x, PROBLEM, **how)


def test_metadata_of_another_weight_are_detected_in_debug_mode(monkeypatch):
    other = sparse24.pack(*(Problem.make(8, 64, 128, "fp16", seed=1).__dict__[k] for k in ("weight", "mask")), 16)
    launched = []
    monkeypatch.setattr(gpu_launch, "launch", lambda *args: launched.append(args))
    product(PROBLEM.x, PROBLEM, index=other[1], tile=TILES[0])
    assert len(launched) == 1
    monkeypatch.setenv("MPCOMPILE_DEBUG", "1")
    with pytest.raises(InputError, match="does not belong to these values"):
        product(PROBLEM.x, PROBLEM, index=other[1], tile=TILES[0])


@pytest.mark.parametrize("case", ["misaligned", "odd rows", "transposed", "fine"])
def test_activations_that_the_kernels_cannot_read_are_copied(case):
    flat = torch.randn(9 * 64).half()
    x = {
        "misaligned": flat[1:513].view(8, 64),
        "odd rows": flat[: 8 * 68].view(8, 68)[:, :64],
        "transposed": flat[:512].view(64, 8).T,
        "fine": flat[:512].view(8, 64),
    }[case]
    found = gpu_launch.aligned(x)
    assert torch.equal(found, x) and found.data_ptr() % 16 == 0 and found.stride(1) == 1 and found.stride(0) % 8 == 0
    assert (found is x) == (case == "fine")


# --- From an operator to the launch ---


class Recorder(EmulatedKernel):
    """Records launches and computes nothing."""

    def __init__(self):
        self.gemm, self.calls = self, []

    def _launch(self, blocks, args, options):
        self.calls.append((blocks, args, options))
        args[6].zero_()


@pytest.mark.parametrize("shape", [(64, 128), (64, 128, 1, 1)])
def test_operators_launch_with_their_arguments(shape, monkeypatch):
    monkeypatch.setattr(gpu_launch, "_device", lambda index: (80, 108))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu_launch, "missing", lambda index, layout=16: None)
    values, index = sparse24.pack(PROBLEM.weight.view(shape), PROBLEM.mask.view(shape), sparse24.MMA_SP)
    recorder, bias = Recorder(), PROBLEM.bias
    with emulated(recorder):
        if len(shape) == 2:
            x = torch.randn(2, 20, 128).half()
            y = gpu_launch.IMPLEMENTATIONS["nm_gemm"](x, values, index, bias, None, 64, 2, 4, sparse24.MMA_SP, "gelu")
            assert y.shape == (2, 20, 64)
        else:
            x = torch.randn(2, 128, 5, 5).half().contiguous(memory_format=torch.channels_last)
            axes = ([2, 2], [1, 1], [1, 1])
            residual = torch.zeros(2, 64, 4, 4).half()
            y = gpu_launch.IMPLEMENTATIONS["nm_conv"](
                x, values, index, bias, residual, *axes, 2, 4, list(shape), sparse24.MMA_SP, "relu"
            )
            assert y.shape == (2, 64, 4, 4) and y.is_contiguous(memory_format=torch.channels_last)
    ((blocks, args, options),) = recorder.calls
    tile = gpu_model.choose_tile("gluon_mma_sp", args[7], 64, 128, 80, 108)
    assert args[7:12] == (40 if len(shape) == 2 else 32, 64, 128, 128 // tile.k, 128)
    assert blocks == -(-64 // tile.n) * -(-args[7] // tile.m)
    assert options["ACT"] == ("gelu" if len(shape) == 2 else "relu") and options["BN"] == tile.n
    assert (args[5] is None) == (len(shape) == 2)


def test_launching_operators_pass_opcheck():
    values, index = sparse24.pack(PROBLEM.weight, PROBLEM.mask, sparse24.MMA_SP)
    args = (PROBLEM.x, values, index, PROBLEM.bias, None, 64, 2, 4, sparse24.MMA_SP, "none")
    torch.library.opcheck(ops.nm_gemm, args)
    words = torch.zeros(24, 4, dtype=torch.uint8)
    words[:] = 0b0011_0011
    x, held = torch.randn(3, 32), torch.randn(24, 16)
    torch.library.opcheck(torch.ops.mpcompile.nm_expand.default, (x, held, words, None, 2, 4))
    x, keys, size = torch.randn(2, 9, 8), torch.randn(2, 2, 9, 4), torch.ones(2, 9, 1)
    torch.library.opcheck(torch.ops.mpcompile.token_merge_fused.default, (x, keys, size, 2, 1))


def test_a_lowered_model_is_fused_saved_and_run(monkeypatch, tmp_path):
    """The passes run on a CPU as if the GPU engine took the layers; the operators fall back to plain torch there."""
    monkeypatch.setattr(
        type(MMA), "supports", lambda self, spec: None if self is MMA and spec.geometry is None else "not this one"
    )
    half = images(2).bfloat16()
    config = Config(pattern="2:4", engine="gluon_mma_sp", score="magnitude")
    gm = mpcompile.transform(tiny_vit(embed_dim=64).bfloat16(), half, config).eval()
    lowered = mpcompile.lower(gm, half, config)
    nodes = [node for node in lowered.graph.nodes if node.target in ops.NATIVE]
    assert {node.target for node in nodes} == {ops.nm_gemm, ops.nm_mlp}
    assert {layout for node in nodes for *_, layout in ops.packed_arguments(node)} == {sparse24.MMA_SP}
    with torch.no_grad():
        y = lowered(half)
        assert relative(y, gm.float()(half.float())) < 2e-2
        mpcompile.save(lowered, tmp_path / "model.mpc")
        assert torch.equal(mpcompile.load(tmp_path / "model.mpc")(half), y)


def test_expansion_refuses_what_does_not_fit():
    values, words = torch.zeros(8, 16), torch.zeros(8, 4, dtype=torch.uint8)
    for x, held, bits in ((torch.zeros(2, 36), values, words), (torch.zeros(2, 32), values[:, :8], words)):
        with pytest.raises(InputError, match="packed weights do not fit"):
            expand.launch(x, held, bits, None, 2, 4, lambda kernel: kernel)


def test_a_build_is_named_after_its_parameters():
    build = Build("gluon_mma_sp", "64x16x128s5", "fp16", "gelu", 80)
    assert build.name == "gluon_mma_sp-64x16x128s5-fp16-gelu-sm80" and build.cut.m == 16
    assert expand.tile(1, 768)[0] == 16
