"""Building the CPU kernels: no compiler, broken files, unwritable folders, processes that start at once."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpcompile.io import messages
from mpcompile.kernels import ops, store
from mpcompile.kernels.cpu import build
from mpcompile.kernels.cpu.engine import CpuEngine
from mpcompile.kernels.dispatch import LayerSpec
from mpcompile.kernels.nm_format import Pattern
from mpcompile.kernels.nm_linear import layouts
from mpcompile.kernels.nm_linear import operators as native
from tests.support.helpers import relative

SPEC = LayerSpec((8, 16), torch.float32, torch.device("cpu"), Pattern(2, 4))
FLAGS = build.FLAGS.replace("-O3", "-O0")  # builds fastest
CACHES = (build.load, build.unavailable, build.compiler_version, native.kernels)
SCRIPT = """
import json, os, pathlib, re, sys, torch
from mpcompile.kernels import ops
from mpcompile.kernels.nm_linear import layouts
from mpcompile.kernels.cpu import build
build.FLAGS = build.FLAGS.replace("-O3", "-O0")
build.operators = lambda: None  # built as the kernels are, but for longer
torch.set_num_threads(1)  # packing starts no threads then
mask = (torch.arange(64) % 4 < 2).expand(256, 64)
weight, x = torch.randn(256, 64), torch.randn(2000, 64)
packed = layouts.pack(weight, mask, 2, 4, layouts.ROWS)
assert build.unavailable() is None, build.unavailable()
torch.set_num_threads(int(sys.argv[1]))
before = len(os.listdir("/proc/self/task"))
y = ops.nm_gemm(x, *packed, None, None, 256, 2, 4, layouts.ROWS, "none")
after = len(os.listdir("/proc/self/task"))
exact = x.double() @ (weight * mask).double().T  # only now: torch's product starts threads too
# A library that another process has replaced meanwhile is marked "(deleted)".
maps = {line.split(None, 5)[5].strip().removesuffix(" (deleted)") for line in open("/proc/self/maps") if ".so" in line}
print(json.dumps({
    "error": float((y - exact).norm() / exact.norm()),
    "new": after - before,
    "openmp": sorted(path for path in maps if re.match(r"lib.*omp", pathlib.Path(path).name)),
    "kernels": [path for path in maps if pathlib.Path(path).name.startswith("nm-")],
}))
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A process that has built nothing, with an empty cache and the instruction set that builds fastest."""
    monkeypatch.setenv("MPCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPCOMPILE_CPU_ISA", "portable")
    for name in ("CXX", "MPCOMPILE_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(messages, "_WARNED", set())
    monkeypatch.setattr(build, "FLAGS", FLAGS)
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))

    def forget():
        for cache in CACHES:
            cache.cache_clear()
        native.use(None)

    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The bytes of a good library, built once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPCOMPILE_CACHE", str(tmp_path_factory.mktemp("built")))
        patch.setattr(build, "FLAGS", FLAGS)
        return build.build("portable").read_bytes()


@pytest.fixture
def copying(built, monkeypatch, tmp_path):
    """A compiler that gives a copy of the good library at once, for tests of the places where libraries are kept."""
    (tmp_path / "compiled").write_bytes(built)
    (tmp_path / "compiler").write_text(
        f'for word; do if [ "$last" = -o ]; then cp "{tmp_path}/compiled" "$word"; fi; last=$word; done\n'
    )
    monkeypatch.setenv("CXX", f"sh {shlex.quote(str(tmp_path / 'compiler'))}")


def works():
    """True if the operators are correct, whatever implements them."""
    mask = (torch.arange(16) % 4 < 2).expand(8, 16)
    weight, x = torch.randn(8, 16), torch.randn(5, 16)
    y = ops.nm_gemm(x, *layouts.pack(weight, mask, 2, 4, layouts.ROWS), None, None, 8, 2, 4, layouts.ROWS, "none")
    return relative(y, x.double() @ (weight * mask).double().T) < 1e-6


def place():
    """The path of this process's library, without building it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_find", lambda name, folders: folders[0] / name)
        return build.build("portable")


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def start(threads=1, **env):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(threads)], cwd=Path(__file__).parents[3], env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "/nonexistent", "no C++ compiler (/nonexistent)"),
        ("CXX", "'g++", "no C++ compiler ('g++)"),
        ("CXX", "false", "false cannot build the CPU kernels: exit status 1"),
        ("CXX", "g++ -DW=", "error"),
        ("MPCOMPILE_CPU_ISA", "sse9", "MPCOMPILE_CPU_ISA=sse9: this processor runs"),
    ],
)
def test_without_a_library_plain_torch_runs_and_the_reason_is_logged_once(monkeypatch, caplog, name, value, reason):
    monkeypatch.setenv(name, value)
    for _ in range(2):
        assert reason in CpuEngine().supports(SPEC)
        assert works()
    output = warnings(caplog)
    assert len(output) == 1 and reason in output[0] and "masked layers stay dense" in output[0]
    assert native.kernels() is None


def test_a_compiler_that_is_too_old_for_the_processor_builds_a_narrower_library(monkeypatch, caplog, tmp_path):
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\ncase "$*" in *mavx512*) echo "unknown option" >&2; exit 1;; esac\nexec g++ "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    monkeypatch.delenv("MPCOMPILE_CPU_ISA")
    monkeypatch.setattr(build, "_processor_isas", lambda: ("avx512_bf16", "avx512", "portable"))
    assert CpuEngine().supports(SPEC) is None and works()
    assert native.kernels().isa == "portable"
    (output,) = warnings(caplog)
    assert "the kernels for avx512_bf16 cannot be built, those for portable are used" in output
    assert "unknown option" in output


def test_a_compiler_that_times_out_is_reported(monkeypatch):
    def refuse(*args, **kwargs):
        raise subprocess.TimeoutExpired("g++", 30)

    monkeypatch.setattr(build.subprocess, "run", refuse)
    assert build.compiler_version(("g++",)) == ""
    assert "timed out" in CpuEngine().supports(SPEC)


@pytest.mark.parametrize("damage", ["garbage", "half", "empty", "a bit", "folder"])
@pytest.mark.usefixtures("copying")
def test_a_damaged_library_is_built_again(caplog, built, damage):
    path = place()
    path.parent.mkdir(parents=True)
    if damage == "folder":
        path.mkdir()
        assert "cannot build the CPU kernels" in CpuEngine().supports(SPEC)
        assert works()
        return
    flipped = built[:5000] + bytes([built[5000] ^ 1]) + built[5001:]
    half = built[: len(built) // 2]
    path.write_bytes({"garbage": b"no library" * 100, "half": half, "empty": b"", "a bit": flipped}[damage])
    assert CpuEngine().supports(SPEC) is None
    assert works() and native.kernels() is not None
    assert build._whole(path)
    assert warnings(caplog) == [f"mpcompile: {path} is damaged and is built again"]


def test_a_library_that_cannot_be_loaded_is_built_again(caplog):
    path = place()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"another system's" + build.hashlib.sha256(b"another system's").digest())
    assert CpuEngine().supports(SPEC) is None and works()
    assert warnings(caplog) == [f"mpcompile: {path} cannot be loaded and is built again"]


def test_a_library_without_the_functions_is_built_again(caplog, tmp_path):
    path = tmp_path / "nm.so"

    def built(again: bool) -> Path:
        source = "".join(f"void {name}() {{}}" for name in build.Kernels.functions if again)
        new = tmp_path / "new.so"
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(new)]
        subprocess.run(command, input=source, text=True, check=True)
        os.replace(new, path)
        return path

    assert build._opened(build.Kernels, built).nm_conv is not None
    assert warnings(caplog) == [f"mpcompile: {path} cannot be loaded and is built again"]
    with pytest.raises(build.Unavailable, match="undefined symbol"):
        build._opened(build.Operators, built)


@pytest.mark.parametrize(
    ("sources", "flags"),
    [
        (build.SOURCES, build.FLAGS),
        (build.OPERATOR_SOURCES, f"{build.OPERATOR_FLAGS} -isystem {Path(torch.__file__).parent / 'include'}"),
    ],
)
def test_a_librarys_name_depends_on_every_file_it_is_compiled_from(sources, flags):
    """If a header were missing from the list, its changes would cause no new build."""
    here = build.NATIVE
    command = [*build.compiler(), *shlex.split(flags), "-MM", str(here / sources[0])]
    rule = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = rule.partition(":")[2].replace("\\\n", " ").split()
    assert sorted(Path(file).resolve() for file in read) == sorted((here / name).resolve() for name in sources)


def test_a_changed_header_is_another_library(tmp_path, monkeypatch):
    here = build.NATIVE
    for name in build.SOURCES:
        (tmp_path / name).write_bytes((here / name).read_bytes())
    monkeypatch.setattr(build, "NATIVE", tmp_path)
    names = {place().name}
    for name in build.SOURCES:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\n")
        names.add(place().name)
    assert len(names) == len(build.SOURCES) + 1


def test_a_good_library_is_kept(caplog, built, monkeypatch):
    path = place()
    path.parent.mkdir(parents=True)
    path.write_bytes(built)
    inode = path.stat().st_ino
    assert CpuEngine().supports(SPEC) is None and works()
    assert path.stat().st_ino == inode and not warnings(caplog)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_unwritable_cache_is_replaced_by_temporary_files(monkeypatch, caplog, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setenv("MPCOMPILE_CACHE", str(file / "below"))
    assert CpuEngine().supports(SPEC) is None and works()
    folder = tmp_path / f"mpcompile-{os.getuid()}"
    assert [p.suffix for p in folder.iterdir()] == [".so"] and folder.stat().st_mode & 0o777 == 0o700
    build.load.cache_clear()
    assert build.load("portable") is not None
    output = warnings(caplog)
    assert len(output) == 1 and "cannot be written" in output[0] and str(folder) in output[0]


def test_no_folder_at_all(monkeypatch, caplog):
    monkeypatch.setattr(build, "_usable", lambda folder: False)
    assert "no folder for the CPU kernels can be written" in CpuEngine().supports(SPEC)
    assert works() and len(warnings(caplog)) == 1


def test_a_library_of_another_user_among_temporary_files_is_not_loaded(monkeypatch, tmp_path, built):
    name = place().name
    planted = tmp_path / f"mpcompile-{os.getuid()}"
    planted.mkdir()
    (planted / name).write_bytes(built)
    assert build._find(name, build._folders()) == planted / name
    monkeypatch.setattr(build, "_own", lambda folder: folder != planted)
    assert build._find(name, build._folders()) is None


def test_processes_that_build_at_the_same_time():
    """One library is left. Its loops run on the OpenMP that torch has loaded, on as many threads as torch may use."""
    running = [start(threads) for threads in (1, 2, 1)]
    found = [finish(process) for process in running]
    path = place()
    assert [p.name for p in path.parent.iterdir()] == [path.name] and build._whole(path)
    for result in found:
        assert result["kernels"] == [str(path)] and result["error"] < 1e-6
        assert len(result["openmp"]) == 1, result["openmp"]
    assert [result["new"] for result in found] == [0, 1, 0]


# --- The owner of a library ---


@pytest.fixture
def mine(built, copying):
    """A good library in the place where this process looks for it."""
    path = place()
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(built)
    path.chmod(0o700)
    return path


def spoil(path, what, tmp_path):
    """Change permissions or owners so that another user could have written the library, its folder or one above."""
    folder = path.parent
    if what == "file":
        path.chmod(0o777)
    elif what == "group":
        path.chmod(0o770)
        os.chown(path, -1, 54321)
    elif what == "folder":
        folder.chmod(0o777)
    elif what == "above":
        folder.parent.chmod(0o777)
    elif what in ("link", "linked folder"):
        real = path if what == "link" else folder
        moved = real.rename(tmp_path / "elsewhere")
        real.symlink_to(moved)
    else:
        owner = {"owner": path, "owner of folder": folder, "owner above": folder.parent}[what]
        os.chown(owner, 12345, 12345)


SPOILT = ["file", "group", "folder", "above", "link", "linked folder", "owner", "owner of folder", "owner above"]


@pytest.mark.parametrize("what", SPOILT)
def test_a_library_that_others_could_have_written_is_not_loaded(what, mine, tmp_path):
    if os.getuid() and ("owner" in what or what == "group"):
        pytest.skip("only root gives files away")
    assert build._find(mine.name, build._folders()) == mine
    spoil(mine, what, tmp_path)
    assert build._find(mine.name, build._folders()) is None
    made = build.build("portable")
    assert made.stat().st_mode & 0o077 == 0 and not made.is_symlink()
    assert build._find(made.name, build._folders()) == made
    if what in ("file", "group", "link", "owner"):
        assert made == mine  # in a safe folder, a new library replaces it
    else:
        assert made.parent == store.temporary_folder()


def test_a_cache_folder_of_others_is_logged_once(mine, caplog, tmp_path):
    spoil(mine, "folder", tmp_path)
    for _ in range(2):
        build.load.cache_clear()
        assert build.load("portable") is not None
    output = [text for text in warnings(caplog) if "others can write" in text]
    assert len(output) == 1 and "(mode 777)" in output[0]


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("home", [None, "", "~", "relative"])
def test_without_a_home_caches_are_among_temporary_files(home, monkeypatch, tmp_path):
    for name in ("MPCOMPILE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    # Without an entry in the user database, expanduser returns the path as it is.
    monkeypatch.setattr(store.os.path, "expanduser", lambda path: home or path)
    assert store.cache_folder() == tmp_path / f"mpcompile-{os.getuid()}"
    assert build.unavailable() is None and works()
