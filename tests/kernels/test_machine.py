"""Reading /proc/cpuinfo on x86, on Arm, and without such a file."""

from pathlib import Path

import pytest

from mpcompile.kernels import machine
from mpcompile.kernels.cpu import build

X86 = "processor\t: 0\nmodel name\t: A CPU: 2 GHz\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu amx_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(text: str | None) -> None:
        if text is not None:
            (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
        machine._cpuinfo.cache_clear()
        build._processor_isas.cache_clear()

    yield write
    machine._cpuinfo.cache_clear()
    build._processor_isas.cache_clear()


def test_x86(cpuinfo, monkeypatch) -> None:
    cpuinfo(X86)
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert machine.cpu_name() == "A CPU: 2 GHz"
    assert machine.cpu_flags() == {"fpu", "avx2", "fma"}
    assert not machine.has_bf16()
    assert build._processor_isas() == ("avx2", "portable")
    cpuinfo(X86.replace("fpu", "fpu avx512_bf16 avx512f avx512bw avx512dq avx512vl"))
    assert machine.has_bf16()
    assert build._processor_isas() == ("avx512_bf16", "avx512", "avx2", "portable")


def test_arm(cpuinfo, monkeypatch) -> None:
    cpuinfo(ARM)
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    assert machine.cpu_name() == "aarch64"
    assert machine.has_bf16()
    assert build._processor_isas() == ("portable",)


def test_no_file(cpuinfo, monkeypatch) -> None:
    cpuinfo(None)
    monkeypatch.setattr(machine.platform, "processor", lambda: "arm")
    assert machine.cpu_name() == "arm"
    assert machine.cpu_flags() is None
    assert not machine.has_bf16()
    assert machine.core_count()
