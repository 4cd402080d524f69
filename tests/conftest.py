"""No test depends on how fast the machine is: engines are timed only where a test asks for it."""

import pytest


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setenv("MPCOMPILE_TIMING", "off")


@pytest.fixture(scope="session")
def gpu_folder(tmp_path_factory):
    """Where kernels are compiled, once for all tests."""
    return tmp_path_factory.mktemp("gpu")
