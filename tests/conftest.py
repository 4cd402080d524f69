"""No test depends on how fast the machine is: engines are timed only where a test asks for it."""

from pathlib import Path

import pytest

# Files of tests whose outcome could rest on the instruction set of torch, oneDNN or our kernels: `make test-isa`.
ISA = (
    "test_artifact_packed",
    "test_cpu_kernels",
    "test_cpu_operators",
    "test_fold",
    "test_fold_scale",
    "test_fuse",
    "test_fuse_nodes",
    "test_isa",
    "test_lower",
    "test_lowered",
    "test_merge_tokens",
    "test_nm_format",
    "test_token_merge",
    "test_triton_kernels",
)


def pytest_configure():
    missing = set(ISA) - {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(sorted(missing))}")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in ISA:
            item.add_marker(pytest.mark.isa)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setenv("MPCOMPILE_TIMING", "off")


@pytest.fixture(scope="session")
def gpu_folder(tmp_path_factory):
    """Where kernels are compiled, once for all tests."""
    return tmp_path_factory.mktemp("gpu")
