"""Fixtures of all tests. No test depends on the machine's speed: engines are timed only if a test asks for it.

A run of the whole suite is shared by as many processes as there are cores (pytest-xdist); ``-n 0`` keeps it in one.
A run of chosen files or tests stays in one process unless ``-n`` asks for more.
"""

import os
import re
from pathlib import Path

import pytest

from tests.isa import BY_FILE

HERE = Path(__file__).resolve().parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST = 4  # processes: each may need 4 GB
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before torch is imported, here and in the processes that tests start
    share = str(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, share)


def pytest_configure():
    for path, names in BY_FILE.items():
        text = (HERE / path).read_text(encoding="utf-8") if (HERE / path).is_file() else ""
        missing = [name for name in names if f"def {name.partition('[')[0]}(" not in text]
        if missing or not text:
            raise pytest.UsageError(f"tests/isa.py: {path} does not have {', '.join(missing) or 'any test'}")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads these options
def pytest_cmdline_main(config):
    option = config.option
    whole = {Path(arg).resolve() for arg in config.args} <= {HERE, HERE.parent} and not hasattr(config, "workerinput")
    if whole and getattr(option, "numprocesses", 0) is None and not option.usepdb and option.capture != "no":
        option.numprocesses, option.dist = min(CORES, MOST), "loadfile"  # fixtures of a module are made once
        option.maxworkerrestart = "0"  # a run that loses a process ends; with a new one in its place it may never end


def pytest_ignore_collect(collection_path, config):
    """With ``-m isa``, files without such tests are not even imported."""
    if config.option.markexpr == "isa" and collection_path.suffix == ".py":
        return True if collection_path.relative_to(HERE).as_posix() not in BY_FILE else None


def pytest_collection_modifyitems(items):
    # Processes that share a run must collect the same names: values drawn at random and addresses differ between them.
    unstable = [item.nodeid for item in items if re.search(r"tensor\(|array\(| at 0x", item.nodeid)]
    if unstable:
        raise pytest.UsageError(
            f"the name of {unstable[0]} has a value in it that another process may not have: give it an id"
        )
    for item in items:
        names = BY_FILE.get(item.path.relative_to(HERE).as_posix())
        if names is not None and (not names or {item.name, item.originalname} & {*names}):
            item.add_marker(pytest.mark.isa)


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setenv("MPCOMPILE_TIMING", "off")


@pytest.fixture
def no_inductor(monkeypatch):
    """Lowered graphs run as they are: code generation is tested with the backend (test_backend.py)."""
    import torch

    from mpcompile import backend

    torch._dynamo.reset()
    monkeypatch.setattr(backend, "_inductor", lambda gm, *_: gm)


@pytest.fixture(scope="session")
def gpu_folder(tmp_path_factory, pytestconfig):
    """The folder in which kernels are compiled, once for all tests and all processes that share them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if hasattr(pytestconfig, "workerinput") else base) / "gpu"
    folder.mkdir(exist_ok=True)
    return folder
