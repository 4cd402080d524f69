"""The environment of a run: facts that a bug report needs, and conditions that affect latency."""

import json

import pytest
import torch

import mpcompile
from mpcompile.errors import InputError
from mpcompile.kernels import machine, timing
from mpcompile.kernels.cpu import build
from mpcompile.measure.environment import conditions, environment


def test_an_environment_is_json_and_names_versions_and_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("MPCOMPILE_CACHE", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "nm-portable-0.so").write_bytes(bytes(100))
    (tmp_path / timing.cache_file().name).write_text("{}")
    values = environment()
    assert json.loads(json.dumps(values)) == values
    assert values["mpcompile"] == mpcompile.__version__ and values["torch"] == torch.__version__
    assert values["cache"] == str(tmp_path) and values["cache_bytes"] == 102
    assert values["kernel_libraries"] == ["nm-portable-0.so"]
    assert values["timings"] == str(timing.cache_file())
    assert values["threads"] == torch.get_num_threads() and values["cores"] >= 1
    assert values["processor"] and values["memory_bytes"] > 1 << 20


def test_forced_instruction_sets_and_missing_compilers_are_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("MPCOMPILE_CACHE", str(tmp_path / "none"))
    monkeypatch.setenv("MPCOMPILE_CPU_ISA", "portable")
    monkeypatch.setenv("CXX", "no-such-compiler")
    values = environment()
    assert values["isa"] == "portable" and values["isa_forced"]["MPCOMPILE_CPU_ISA"] == "portable"
    assert values["compiler"] is None and values["compiler_version"] is None
    assert (values["cache_bytes"], values["kernel_libraries"], values["timings"]) == (0, [], None)
    monkeypatch.setenv("MPCOMPILE_CPU_ISA", "no-such-isa")
    assert "no-such-isa" in environment()["isa"]


def test_a_compiler_that_fails_has_no_version(monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: ["/no/such/compiler"])
    values = environment()
    assert values["compiler"] == "/no/such/compiler" and values["compiler_version"] is None


def test_conditions_of_a_batch():
    values = conditions({"pixels": torch.zeros(3, 2, dtype=torch.bfloat16)})
    assert values["batch"] == 3 and values["dtype"] == "bfloat16" and values["threads"] == torch.get_num_threads()
    assert values["device"] == machine.cpu_name()
    with pytest.raises(InputError, match="no tensor"):
        conditions(["text"])
