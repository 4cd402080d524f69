"""Compiled kernels launched through the CUDA driver, which is replaced by the emulator; results are checked."""

import contextlib
import ctypes
import json
import shutil

import pytest
import torch

from mpcompile.errors import InputError
from mpcompile.kernels.nm_linear import sparse24
from mpcompile.kernels.nm_linear.gpu import cubin as gpu_cubin
from mpcompile.kernels.nm_linear.gpu import launch as gpu_launch
from mpcompile.kernels.nm_linear.gpu.build import Build, entry_parameters, parts_of
from mpcompile.kernels.nm_linear.gpu.cubin import Cubins, epilogue_of
from tests.support.gpu_builds import CONVOLUTIONS, EXTRA, compiled
from tests.support.helpers import relative
from tests.support.ptx import Block, Memory, Program, TensorMap
from tests.support.ptx.sparse_gemm import LAYOUTS, TOLERANCE, Problem, bits

ROUGH, _, WIDE_WGMMA = EXTRA
ROOM = 1 << 21  # bytes of each tensor, with the gap after it


@pytest.fixture(scope="session")
def records(gpu_folder):
    return compiled(gpu_folder)


class Emulating:
    """A fake CUDA driver: it knows the tensors of a launch only by their addresses."""

    def __init__(self, tensors, ptx):
        self.tensors, self.ptx, self.boxes, self.launches = tensors, ptx, [], []

    def function(self, cubin, name, shared):
        return self.ptx[cubin], name

    def tensor_map(self, box):
        self.boxes.append(box)
        return (ctypes.c_char * gpu_cubin.MAP_BYTES)(len(self.boxes) - 1)

    def launch(self, function, blocks, threads, shared, stream, values):
        ptx, name = function
        assert f".entry {name}(" in ptx and stream == 0
        program, memory = Program(ptx), Memory()
        assert program.threads == threads
        for tensor in sorted(self.tensors, key=lambda t: t.data_ptr()):
            memory.put(bits(tensor), at=tensor.data_ptr())
        numbers = [self._value(value) for value in values]
        parameters = dict(zip(program.parameters, numbers, strict=True))
        for block in range(blocks):
            Block(program, parameters, memory, shared, (block, 0, 0)).run()
        result = self.tensors[-1]
        result.view(-1).view(torch.uint8).copy_(torch.from_numpy(memory.get(result.data_ptr())))
        self.launches.append(len(values))

    def _value(self, value):
        if not isinstance(value, ctypes.Array):
            return value.value
        box = self.boxes[value.raw[0]]
        return TensorMap(bits(box.base).view("uint16").reshape(box.base.shape), tuple(box.block_shape))


def placed(tensors):
    """Copies with gaps between them, in ascending order of address; None stays None."""
    arena = torch.zeros((len(tensors) + 1) * ROOM, dtype=torch.uint8)
    start = -arena.data_ptr() % ROOM
    found = []
    for place, tensor in enumerate(tensors):
        if tensor is None:
            found.append(None)
            continue
        at = start + place * ROOM
        assert tensor.numel() * tensor.element_size() < ROOM // 2
        copy = arena[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        found.append(copy.copy_(tensor))
    return found


@contextlib.contextmanager
def without_triton(monkeypatch, folder, arch, driver):
    gpu_launch._kernel.cache_clear()
    cubins = Cubins.of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_launch, "old_triton", lambda: "Triton 3.8")
        patch.setattr(gpu_launch, "_device", lambda index: (arch, 100))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(gpu_cubin, "given", lambda: cubins)
        patch.setattr(gpu_cubin, "driver", lambda: driver)
        yield cubins
    gpu_launch._kernel.cache_clear()


def codes(records):
    return {open(record["cubin"], "rb").read(): record["ptx"] for record in records.values() if "ptx" in record}


@pytest.mark.parametrize("build", [ROUGH, WIDE_WGMMA], ids=lambda build: build.kernel)
def test_products(build, records, gpu_folder, monkeypatch):
    problem = Problem.make(build.cut.m + 5, build.cut.n - 27, 3 * build.cut.k + 16, build.dtype)
    values, index = problem.packed(build)
    y = torch.zeros(len(problem.x), len(problem.weight), dtype=problem.x.dtype)
    tensors = placed([problem.x, values, index, problem.bias, problem.scale, problem.residual, y])
    driver = Emulating(tensors, codes(records))
    with without_triton(monkeypatch, gpu_folder, build.arch, driver):
        gpu_launch.launch(*[tensors[i] for i in (0, 1, 2, 3, 4, 5, 6)], LAYOUTS[build.kernel], "none", build.cut)
    assert driver.launches == [len(records[build]["parameters"])]
    assert relative(tensors[6], problem.expected(build.epilogue)) < TOLERANCE[build.dtype]


def test_convolutions(records, gpu_folder, monkeypatch):
    """``convolution`` allocates its own result, so the driver has to work from the addresses that it is given."""
    build = CONVOLUTIONS[2]
    assert parts_of(build.epilogue) == ("none", False, False, False)
    x, shape = torch.randn(1, 64, 5, 6).to(torch.float16), (48, 64, 3, 3)
    weight = torch.randn(shape).to(torch.float16) / 24
    mask = (torch.arange(64).view(1, 64, 1, 1) % 4 < 2).expand(shape)
    values, index = sparse24.pack(weight, mask, sparse24.MMA_SP)
    pixels, values, index, y = placed([x.permute(0, 2, 3, 1), values, index, torch.zeros(1, 5, 6, 48).half()])
    driver = Emulating([pixels, values, index, y], codes(records))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, size: y)
    with without_triton(monkeypatch, gpu_folder, build.arch, driver):
        axes = ((1, 1), (1, 1), (1, 1))
        found = gpu_launch.convolution(pixels.permute(0, 3, 1, 2), values, index, None, None, axes, shape, "none",
                                       tile=build.cut)  # fmt: skip
    exact = torch.nn.functional.conv2d(x.double(), (weight * mask).double(), padding=1)
    assert relative(found, exact) < TOLERANCE[build.dtype]


def test_entries_name_their_parameters(records):
    for build, record in records.items():
        kinds = entry_parameters(record["ptx"])
        assert record["parameters"] == kinds and len(kinds) == len(Program(record["ptx"]).parameters)
        assert kinds.count("map") == (2 if build.kernel == "gluon_wgmma_sp" else 0)
        assert record["scratch_bytes"] == 0 and kinds[-2:] == ["u64", "u64"]


def test_epilogues():
    assert epilogue_of("gelu", True, False, False) == "gelu"
    assert epilogue_of("none", False, False, True) == "res"
    assert epilogue_of("none", True, True, True) == "scale_res"
    assert [epilogue_of("none", bias, False, False) for bias in (True, False)] == ["bias", "none"]
    assert epilogue_of("relu", True, False, True) is epilogue_of("none", True, True, False) is None


def test_a_combination_that_is_not_compiled_is_a_pass_after_the_product():
    y, scale, residual = torch.randn(3, 4), torch.randn(4), torch.randn(3, 4)
    assert torch.equal(gpu_cubin._finish(y, "relu", scale, residual), y.relu() * scale + residual)


def test_missing_parts_are_reported(records, gpu_folder, monkeypatch):
    with without_triton(monkeypatch, gpu_folder, 80, None) as cubins:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
        gpu_launch.missing.cache_clear()
        assert gpu_launch.missing(0).startswith(f"{gpu_folder} holds no cubin gluon_mma_sp-")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (12, 0))
        gpu_launch.missing.cache_clear()
        assert gpu_launch.missing(0).endswith("a cubin runs only on the GPU generation that it was compiled for")
        monkeypatch.setattr(cubins, "lacks", lambda kernel, arch: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
        gpu_launch.missing.cache_clear()
        assert gpu_launch.missing(0, sparse24.WGMMA_SP) is None
    gpu_launch.missing.cache_clear()


def test_folders_without_kernels_or_with_old_ones_are_refused(records, gpu_folder, tmp_path):
    with pytest.raises(InputError, match="no compiled kernels"):
        Cubins.of(tmp_path)
    first = sorted(gpu_folder.rglob("records.json"))[0]
    shutil.copy(first, tmp_path)
    held = json.loads((tmp_path / "records.json").read_text())
    (tmp_path / "records.json").write_text(json.dumps([{**record, "source": "0"} for record in held]))
    with pytest.raises(InputError, match="from another version of gluon"):
        Cubins.of(tmp_path)


def test_refuses_other_arguments():
    tensor = torch.zeros(2)
    for kinds, args in ((["u64", "u32"], [tensor, 1]), (["u32", "u64", "u64"], [tensor])):
        with pytest.raises(InputError, match="match the parameters"):
            gpu_cubin.values_of(kinds, args)
    made = gpu_cubin.values_of(["u64", "u32", "u64", "u64"], [tensor, None, -3])
    assert [type(value) for value in made] == [ctypes.c_uint64, ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64]
    assert [value.value for value in made] == [tensor.data_ptr(), -3, 0, 0]


def test_builds_have_the_names_of_their_files(records):
    for build in records:
        assert Build(**{**build.__dict__}).name in records[build]["cubin"]
