"""Every C++ translation unit compiles without warnings, for each instruction set and number of lanes."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from mpcompile.kernels.cpu import build

HERE = build.NATIVE.resolve()
TESTS = Path(__file__).parents[2]
SWEEPS = [TESTS / "support/kernel_sweep.cpp", TESTS / "kernels/cpu/attention_sweep.cpp"]
STRICT = ["-Wall", "-Wextra", "-Werror"]
KERNELS = [*shlex.split(build.FLAGS), "-I", str(HERE)]


def units():
    """Map the name of each translation unit to its source file and compiler flags."""
    found = {f"cpu.cpp {isa}": (HERE / "cpu.cpp", [*KERNELS, *shlex.split(flags)]) for isa, flags in build.ISAS.items()}
    for lanes in (4, 8, 16):
        flags = ["-std=c++17", "-O1", "-fopenmp", "-Wno-psabi", f"-DMPCOMPILE_LANES={lanes}", "-I", str(HERE)]
        found |= {f"{sweep.name} {lanes} lanes": (sweep, flags) for sweep in SWEEPS}
    headers = ["-isystem", str(Path(torch.__file__).parent / "include")]
    found["ops.cpp"] = (HERE / "operators" / "ops.cpp", [*shlex.split(build.OPERATOR_FLAGS), *headers])
    return found


UNITS = units()


def compiled(source, flags, folder):
    """Return exit status and messages. Flags keep their optimization level: some warnings come from the optimizer."""
    command = [*build.compiler(), *(flag for flag in flags if flag != "-shared"), *STRICT, "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(folder / "unit.o")], capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stderr


def skip_unless_it_builds(flags, folder):
    """Skip a test if the compiler, as one for another processor, does not know these instruction sets."""
    empty = folder / "empty.cpp"
    empty.write_text("int main() { return 0; }\n")
    status, output = compiled(empty, flags, folder)
    if status:
        pytest.skip(f"the compiler rejects the flags: {output.strip()[-200:]}")


def test_every_source_is_compiled():
    sources = {source for source, _ in UNITS.values()}
    everywhere = [*HERE.parents[1].rglob("*.cpp"), *TESTS.rglob("*.cpp")]
    assert sources == {path.resolve() for path in everywhere if ".venv" not in path.parts}


@pytest.mark.parametrize("unit", UNITS)
def test_no_warnings(unit, tmp_path):
    source, flags = UNITS[unit]
    skip_unless_it_builds(flags, tmp_path)
    assert compiled(source, flags, tmp_path) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_a_warning_is_detected(unit, tmp_path):
    """Warnings of the parser and of the optimizer, even though vec.h silences the optimizer inside <immintrin.h>."""
    source, flags = UNITS[unit]
    skip_unless_it_builds(flags, tmp_path)
    included = '#include "vec.h"\n' if source.name == "cpu.cpp" else ""
    bad = tmp_path / "bad.cpp"
    bad.write_text(included + "int f(int unused) { return 0; }\n")
    status, output = compiled(bad, flags, tmp_path)
    assert status != 0 and "unused" in output
    bad.write_text(included + "int g(int n) { int x; if (n > 3) x = n; return n > 2 ? x : 0; }\n")
    status, output = compiled(bad, flags, tmp_path)
    assert status != 0 and "uninitialized" in output
