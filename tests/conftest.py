"""Fixtures of all tests. No test depends on the machine's speed: engines are timed only if a test asks for it."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Test files whose outcome could depend on the instruction set of torch, oneDNN or our kernels: `make test-isa`.
ISA = (
    "artifact/test_packed.py",
    "export/test_lowered.py",
    "kernels/nm_linear/test_cpu_kernels.py",
    "kernels/nm_linear/test_cpu_operators.py",
    "kernels/test_isa.py",
    "kernels/test_nm_format.py",
    "kernels/test_token_merge.py",
    "kernels/test_triton_kernels.py",
    "passes/merge_tokens/schedules/test_solve.py",
    "passes/merge_tokens/test_axis.py",
    "passes/merge_tokens/test_models.py",
    "passes/test_fold_norm.py",
    "passes/test_fold_scale.py",
    "passes/test_fuse.py",
    "passes/test_fuse_nodes.py",
    "passes/test_lower.py",
)


def pytest_configure():
    missing = [name for name in ISA if not (HERE / name).is_file()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names files that do not exist: {', '.join(sorted(missing))}")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.relative_to(HERE).as_posix() in ISA:
            item.add_marker(pytest.mark.isa)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setenv("MPCOMPILE_TIMING", "off")


@pytest.fixture(scope="session")
def gpu_folder(tmp_path_factory):
    """The folder in which kernels are compiled, once for all tests."""
    return tmp_path_factory.mktemp("gpu")
