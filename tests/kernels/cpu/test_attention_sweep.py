"""The attention kernel under AddressSanitizer and UndefinedBehaviorSanitizer, for every number of lanes."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpcompile.kernels.cpu import build

SWEEP = Path(__file__).with_name("attention_sweep.cpp")
EVERY = int(os.environ.get("MPCOMPILE_TEST_SWEEP", "61"))  # 1: every case


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory):
    """Output of the sweep over sizes, for each number of lanes."""
    try:
        command = build.compiler()
    except build.Unavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("sweep")
    flags = ["-std=c++17", "-O0", "-fopenmp", "-Wno-psabi", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=undefined", "-I", str(build.NATIVE)]
    empty = folder / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    tried = [*command, *flags, str(empty), "-o", str(folder / "empty")]
    if subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip(f"{command[0]} has no sanitizer runtime")

    def run_one(lanes):
        made = folder / f"lanes{lanes}"
        built = [*command, *flags, f"-DMPCOMPILE_LANES={lanes}", str(SWEEP), "-o", str(made)]
        subprocess.run(built, capture_output=True, text=True, timeout=300, check=True)
        env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1"}
        done = subprocess.run([made, str(EVERY)], env=env, capture_output=True, text=True, timeout=1200, check=False)
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip((4, 8, 16), pool.map(run_one, (4, 8, 16)), strict=True))


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_size_stays_inside_whatever_the_processor(sweeps, lanes):
    status, printed = sweeps[lanes]
    assert status == 0, printed[-3000:]
    assert printed.endswith(f" of 4400 cases, {lanes} lanes\n")
