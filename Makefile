# make demo    the whole job: train a small vision transformer on real digits, and find its fastest build
# make test    the tests
# make test-isa ISA=avx2    the tests of kernels, merging and packing, with torch, oneDNN and our kernels restricted to
#              that instruction set: avx2, or portable, which runs on any processor
# make lint    ruff (rules and formatting), and clang-format for the C++ sources
# make cpp-warnings   compile the C++ sources with -Wall -Wextra -Werror, for each instruction set; part of `make test`
# make types   mypy
# make docs    the documentation site, into site/index.html
# The first run creates a virtual environment (Python >= 3.10); later runs reuse it.
#
#   make demo ARGS=--quick        arguments for `mpcompile demo`; in `make test`, for pytest
#   make test PYTHON=python3.12   the interpreter for a new environment
#   make test VENV=/tmp/env       the folder of the environment
#   make test TRITON=/tmp/triton  the folder of a newer Triton for the tests of GPU kernels, if torch's is too old

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
ISA ?= avx2
TRITON ?= .triton

ifneq ($(words $(VENV)),1)
$(error VENV has to be one path without spaces, not '$(VENV)')
endif
VPY := $(VENV)/bin/python

.PHONY: help demo test test-isa cpp-warnings lint types docs clean FORCE
.NOTPARALLEL:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-demo
	$(VPY) -m mpcompile demo $(ARGS)

test: $(VENV)/.installed-test $(TRITON)/.complete
	MPCOMPILE_TRITON="$(abspath $(TRITON))" $(VPY) -m pytest $(ARGS)

# ATEN_CPU_CAPABILITY restricts torch's own kernels and Inductor. MKL's only switch for baseline code is the mode whose sums
# are the same on all processors. Inductor's cache does not distinguish instruction sets, so compiled code gets its own folder.
HELD_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
HELD_portable := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE

test-isa: $(VENV)/.installed-test $(TRITON)/.complete
	@test -n "$(HELD_$(ISA))" || { echo "mpcompile: ISA has to be avx2 or portable, not '$(ISA)'" >&2; exit 1; }
	caches=$$(mktemp -d) && trap 'rm -rf "$$caches"' EXIT && $(HELD_$(ISA)) MPCOMPILE_CPU_ISA=$(ISA) \
	  TORCHINDUCTOR_CACHE_DIR="$$caches" MPCOMPILE_TRITON="$(abspath $(TRITON))" $(VPY) -m pytest -m isa $(ARGS)

# The GPU kernels compile with Triton 3.9, without a GPU. If torch brought an older one, a newer one is installed beside it,
# only for the tests: they compile kernels in separate processes.
$(TRITON)/.complete: $(VENV)/.installed-test
	@"$(VPY)" -c 'from triton.experimental.gluon.language import inline_asm' 2>/dev/null || { \
	  echo "mpcompile: installing Triton 3.9 into $(TRITON), for the tests of GPU kernels"; \
	  $(PIP) --no-deps --upgrade --target "$(TRITON)" "triton>=3.9"; }
	@mkdir -p "$(TRITON)" && touch $@

cpp-warnings: $(VENV)/.installed-test
	$(VPY) -m pytest tests/kernels/nm_linear/test_cpp_warnings.py $(ARGS)

CXX_FILES = $(or $(shell find kernels tests -name '*.cpp' -o -name '*.h'),$(error no C++ sources found))

lint: $(VENV)/.installed-dev
	$(VPY) -m ruff check .
	$(VPY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

types: $(VENV)/.installed-dev
	$(VPY) -m mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VPY) -m mkdocs build --strict

clean:
	rm -rf build dist site mpcompile.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# The mark is made only after a successful installation; a newer pyproject.toml or a missing interpreter repeats it.
MARKS := $(foreach extra,demo test dev docs,$(VENV)/.installed-$(extra))
$(MARKS): $(VENV)/.installed-%: pyproject.toml $(shell test -x "$(VPY)" || echo FORCE)
	@$(ENVIRONMENT)
	@echo "mpcompile: installing .[$*] into $(VENV); the first time this downloads PyTorch and takes minutes"
	@$(PIP) "pip>=22"
	@$(PIP) --editable ".[$*]"
	@touch $@

PIP = "$(VPY)" -m pip install --quiet --disable-pip-version-check

# Leaves a usable environment in $(VENV), whatever was there before, or reports what to do.
define ENVIRONMENT
fail() { printf 'mpcompile: %s\n' "$$1" >&2; exit 1; }; \
new_enough() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }; \
again='choose another: make $(MAKECMDGOALS) PYTHON=python3.12'; \
if ! "$(VPY)" -c '' 2>/dev/null; then \
  command -v "$(PYTHON)" >/dev/null || fail "there is no '$(PYTHON)'; Python >= 3.10 is needed; $$again"; \
  new_enough "$(PYTHON)" || fail "'$(PYTHON)' is $$("$(PYTHON)" -V 2>&1); Python >= 3.10 is needed; $$again"; \
  "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
    fail "'$(PYTHON)' cannot make environments; install its venv module (Debian, Ubuntu: python3-venv) or $$again"; \
  if [ ! -f "$(VENV)/pyvenv.cfg" ] && [ -n "$$(ls -A "$(VENV)" 2>/dev/null)" ]; then \
    fail "$(VENV) exists but is not a virtual environment; choose another: make $(MAKECMDGOALS) VENV=..."; \
  fi; \
  "$(PYTHON)" -m venv --clear "$(VENV)" || fail "making the environment $(VENV) failed, as reported above"; \
fi; \
new_enough "$(VPY)" || fail "$(VENV) holds $$("$(VPY)" -V); Python >= 3.10 is needed; remove $(VENV) or choose another: VENV=..."; \
"$(VPY)" -m pip --version >/dev/null 2>&1 || "$(VPY)" -m ensurepip >/dev/null || \
  fail "$(VENV) has no pip and none could be installed; remove $(VENV) and try again"; \
command -v "$${CXX:-g++}" >/dev/null || \
  echo "mpcompile: warning: no $${CXX:-g++} found; torch.compile needs a C++ compiler" >&2; \
"$(VPY)" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || \
  echo "mpcompile: warning: no Python.h found for $(VPY); torch.compile needs it (Debian, Ubuntu: python3-dev)" >&2
endef

FORCE:
