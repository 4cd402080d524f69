"""The plain Triton kernels (any N:M, token merging): interpreted on the CPU, and compiled without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import pack
from mpcompile.kernels.token_merge import fused, reference
from mpcompile.passes.mask import top_n
from tests.support.gpu_builds import ROOT

TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3}


@pytest.fixture(scope="module")
def interpreted():
    command = [sys.executable, "-m", "tests.support.interpreted"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_any_pattern_is_expanded(interpreted):
    found = interpreted["expanded"]
    assert len(found) >= 20
    assert {name: error for name, error in found.items() if not error < TOLERANCE[name.split()[1]]} == {}


def test_token_merging_is_that_of_the_reference(interpreted):
    found = interpreted["merged"]
    assert len(found) >= 7
    for name, errors in found.items():
        assert errors["shape"] == errors["sizes"] == 0, name
        assert errors["values"] < (1e-3 if name.startswith("70") else 1e-6), name


EXPAND = {"X": "*{}", "V": "*{}", "W": "*u8", "B": "*{}", "Y": "*{}"} | dict.fromkeys(
    ("M", "N", "K", "kept", "words", "ldx"), "i32"
)
TIE = {"TIE": reference.TIE}
MATCH = {"target": "*i32"} | dict.fromkeys(("S", "of_a", "of_b", "best"), "*fp32")
MERGE = {"target": "*i32", "place": "*i32", "norms": "*fp32"} | dict.fromkeys(("X", "size", "Y", "new_size"), "*{}")
MERGING = {
    "metric": ({"K": "*{}", "U": "*fp32"}, {"D": 64, "BD": 64, "BN": 32}),
    "match": (MATCH, TIE | {"LESS_A": False, "LESS_B": False, "D": 64, "BD": 64, "BA": 32, "BB": 32}),
    "match, wide": (MATCH, TIE | {"LESS_A": True, "LESS_B": True, "D": 768, "BD": 256, "BA": 32, "BB": 32}),
    "rank": ({"best": "*fp32", "target": "*i32", "place": "*i32"}, TIE | {"BA": 128}),
    "merge": (MERGE, {"KEEP": False, "BC": 1024}),
    "merge, wide": (MERGE, {"KEEP": True, "BC": 2048}),
}


def cubin(kernel, signature, constants, arch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = kernel.arg_names
    types = {name: "constexpr" if name in constants else signature.get(name, "i32") for name in order}
    source = ASTSource(kernel, types, constexprs={(order.index(name),): v for name, v in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True}).asm["cubin"]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("half", ["bf16", "fp32"])
def test_the_expansion_compiles(half, arch):
    from mpcompile.kernels.nm_linear.gpu.expand_kernel import expand

    tile = {"NV": 2, "MG": 4, "SPAN": 8, "BM": 16, "BN": 32, "BK": 64}
    assert len(cubin(expand, {k: v.format(half) for k, v in EXPAND.items()}, tile, arch)) > 1000


@pytest.mark.parametrize("name", MERGING)
def test_token_merging_compiles(name):
    from mpcompile.kernels.token_merge import merge_kernels

    signature, constants = MERGING[name]
    types = {k: v.format("bf16") for k, v in signature.items()}
    assert len(cubin(getattr(merge_kernels, name.partition(",")[0]), types, constants, 90)) > 1000


def test_on_a_cpu_the_operators_run_the_reference():
    weight = torch.randn(24, 32)
    mask = top_n(torch.randn(24, 8, 4), 2).flatten(-2)
    values, words = pack(weight, mask, 2, 4)
    x, bias = torch.randn(3, 5, 32), torch.randn(24)
    y = torch.ops.mpcompile.nm_expand(x, values, words, bias, 2, 4)
    assert torch.allclose(y, torch.nn.functional.linear(x, weight * mask, bias), atol=1e-5)
    x, keys, size = torch.randn(2, 9, 8), torch.randn(2, 2, 9, 4), torch.ones(2, 9, 1)
    assert not fused.runs(x, keys, size)
    for found, wanted in zip(
        ops.token_merge(x, keys, size, 2, 1), reference.token_merge(x, keys, size, 2, 1), strict=True
    ):
        assert torch.equal(found, wanted)
