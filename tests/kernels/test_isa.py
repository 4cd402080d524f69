"""Instruction sets set in the environment: `make test-isa` restricts all it should, and timings are kept apart."""

import os
import platform

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa

from mpcompile.kernels import timing
from mpcompile.kernels.nm_linear import operators as native

HELD = {"avx2": ("AVX2", 256), "portable": ("DEFAULT", 0)}  # torch's name for it, and the bits of Inductor's vectors


def test_the_environment_restricts_every_library():
    held = os.environ.get("MPCOMPILE_CPU_ISA")
    kernels = native.kernels()
    assert held is None or kernels is None or kernels.isa == held
    if held in HELD and "ATEN_CPU_CAPABILITY" in os.environ and platform.machine().lower() in ("x86_64", "amd64"):
        capability, bits = HELD[held]
        assert torch.backends.cpu.get_cpu_capability() == capability
        isa = pick_vec_isa()
        assert (isa.bit_width() if isa else 0) == bits


def test_timings_of_an_instruction_set_are_its_own(monkeypatch):
    keys = []
    for ours, theirs in (("", ""), ("portable", ""), ("", "AVX2"), ("portable", "")):
        monkeypatch.setenv("MPCOMPILE_CPU_ISA", ours)
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", theirs)
        keys.append(timing.machine_key.__wrapped__())
    assert len(set(keys)) == 3 and keys[1] == keys[3]
