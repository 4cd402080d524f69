"""The CPU kernels' own tests under AddressSanitizer and UndefinedBehaviorSanitizer, and proof that these work."""

import functools
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpcompile.kernels.cpu import build

ISAS = build._processor_isas()
CALL = """
import json, os, sys, tempfile, torch
from mpcompile.kernels.nm_linear import layouts
from mpcompile.kernels.cpu import abi, build


def call(isa, dtype, fault):
    half = dtype == "bf16"
    dtype, step = (torch.bfloat16, 2) if half else (torch.float32, 4)
    lib = build.load(isa, True)
    pairs = layouts.RING if fault == "slices" else layouts.QUADS  # RING has a table, and entries to spare at its end
    layout = pairs if half and lib.nm_pairs() else layouts.ROWS
    mask = (torch.arange(64) % 4 < 2).expand(48, 64)
    values, index = layouts.pack(torch.randn(48, 64).to(dtype), mask, 2, 4, layout)
    tensors = {"x": torch.randn(33, 64).to(dtype), "values": values, "index": index, "y": torch.zeros(33, 48).to(dtype)}
    at, kept = [], []
    for name, t in tensors.items():  # each into memory of its own, whose last element may be missing
        size = t.element_size()
        shift = {"slices": size, "odd": 1}.get(fault, 0)
        raw = torch.zeros(shift + t.nbytes - size * (fault == name), dtype=torch.uint8)
        raw[shift:] = t.reshape(-1).view(torch.uint8)[: len(raw) - shift]
        kept.append(raw)
        at.append(raw.data_ptr() + shift)
    print("called", flush=True)
    x, values, index, y = at
    weight = abi.Weight(values, index, None, inputs=64, outputs=48, n=2, m=4, layout=layout)
    args = abi.Linear(x=x, y=y, weight=weight, tokens=33, pixels=1, bf16=int(half), threads=1)
    assert lib.nm_linear(args) == 0
    print("returned", flush=True)


found = []
torch.set_num_threads(1)
for case in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                call(*case)
                os._exit(0)
            finally:
                os._exit(9)
        _, status = os.waitpid(child, 0)
        file.seek(0)
        found.append([status, file.read().decode(errors="replace")])
print(json.dumps(found))
"""


@functools.cache
def environment():
    """Variables for a process that can load a library with sanitizers, or the reason why there are none."""
    try:
        command = build.compiler()
    except build.Unavailable as error:
        return str(error)
    files = []
    for name in ("libasan.so", "libstdc++.so"):  # the second too: ASan has to find the function that throws exceptions
        asked = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        files.append(asked.stdout.strip())
    if not all(os.path.isabs(file) and Path(file).is_file() for file in files):
        return f"{command[0]} has no sanitizer runtime"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(files),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "MPCOMPILE_SANITIZE": "1",
        "MPCOMPILE_TEST_EXAMPLES": "8",
    }


def run(*args):
    env = environment()
    if isinstance(env, str):
        pytest.skip(env)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda isa: build.build(isa, True), ISAS))
    return subprocess.run(
        [sys.executable, *args], cwd=Path(__file__).parents[3], env=env, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip


@functools.cache
def calls():
    """Exit status and output of one call with each fault, in separate processes."""
    faults = ("none", "slices", "odd", "x", "values", "index", "y")
    cases = list(itertools.product(ISAS, ("fp32", "bf16"), faults))
    done = run("-c", CALL, json.dumps(cases))
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_the_kernels_own_tests_report_nothing():
    chosen = "test_gemm or test_mlp or test_no_tokens or test_values or test_large or (test_convolution and 2-4)"
    done = run(
        "-m", "pytest", "-qsx", "-p", "no:cacheprovider", "tests/kernels/nm_linear/test_cpu_kernels.py", "-k", chosen
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    assert "AddressSanitizer" not in printed and "runtime error" not in printed
    assert " passed" in printed and "skipped" not in printed


@pytest.mark.parametrize("fault", ["none", "slices"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_any_alignment_of_slices_is_accepted(isa, dtype, fault):
    status, printed = calls()[isa, dtype, fault]
    assert (status, printed) == (0, "called\nreturned\n")


@pytest.mark.parametrize("fault", ["x", "values", "index", "y"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", ISAS)
def test_memory_that_is_too_small_is_detected(isa, dtype, fault):
    status, printed = calls()[isa, dtype, fault]
    assert status != 0 and "called" in printed and "returned" not in printed
    assert "ERROR: AddressSanitizer" in printed


def test_undefined_behaviour_is_detected():
    status, printed = calls()["portable", "fp32", "odd"]
    assert status != 0 and "called" in printed and "returned" not in printed
    assert "runtime error" in printed and "misaligned" in printed


SWEEP = Path(__file__).parents[2] / "support/kernel_sweep.cpp"
EVERY = int(os.environ.get("MPCOMPILE_TEST_SWEEP", "61"))  # 1: every case


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Output of the sweep over all N:M, kernels, strides and dilations, for each number of lanes."""
    if isinstance(environment(), str):
        pytest.skip(environment())
    folder = tmp_path_factory.mktemp("sweep")

    def run_one(lanes):
        flags = ["-std=c++17", "-O0", "-fopenmp", "-Wno-psabi", "-fsanitize=address,undefined"]
        flags += ["-fno-sanitize-recover=undefined"]
        made = folder / f"lanes{lanes}"
        sources = ["-I", str(build.NATIVE), str(SWEEP), "-o", str(made)]
        command = [*build.compiler(), *flags, f"-DMPCOMPILE_LANES={lanes}", *sources]
        subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run([made, str(EVERY)], env=env, capture_output=True, text=True, timeout=1200, check=False)
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((4, 8, 16), pool.map(run_one, (4, 8, 16)), strict=True))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_pattern_stays_inside_whatever_the_processor(sweeps, lanes):
    status, printed = sweeps[lanes]
    assert status == 0, printed[-3000:]
    assert printed.endswith(f" of 76032 cases, {lanes} lanes\n")
