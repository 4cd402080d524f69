"""Files are replaced as a whole or not at all; no temporary file remains, and no planted link is followed."""

import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mpcompile
from mpcompile.errors import ArtifactError
from mpcompile.io import writing
from mpcompile.io.writing import TEMPORARY, replacing, temporary_path, write_atomically


def named(monkeypatch):
    """Simulate a file system that does not support files without names."""
    monkeypatch.setattr(writing, "_unnamed", lambda folder, mode: None)


@pytest.mark.parametrize("content", ["grün", b"\0bytes", lambda path: path.write_bytes(b"written")])
def test_content_of_every_kind(content, tmp_path):
    expected = {str: "grün".encode(), bytes: b"\0bytes"}.get(type(content), b"written")
    for _ in range(2):  # a new file, and one in the place of another
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == expected
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("content", ["text", lambda path: path.write_text("text")])
def test_only_regular_files_are_replaced(content, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("fifo", "link", "folder", "loop", "no/such/folder"):
        with pytest.raises(ArtifactError, match=f"cannot write .*{name}"):
            write_atomically(tmp_path / name, content)
    assert len(list(tmp_path.iterdir())) == 4


def test_temporary_files_follow_no_planted_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = []
    monkeypatch.setattr(writing.secrets, "token_hex", lambda n: names.append(n) or "guessed")
    for name in ("guessed.tmp", "guessed.tmp.html"):
        (tmp_path / f"{TEMPORARY}{name}").symlink_to(victim)
    for content in ("x", lambda path: path.write_text("x")):
        with pytest.raises(ArtifactError, match="cannot write"):
            write_atomically(tmp_path / "page.html", content)
    named(monkeypatch)
    with pytest.raises(FileExistsError), replacing(tmp_path / "page.html"):
        pass
    assert len(names) == 3 and victim.read_text() == "precious" and not (tmp_path / "page.html").exists()
    assert (tmp_path / f"{TEMPORARY}guessed.tmp").is_symlink()  # only files that were created are removed


@pytest.mark.parametrize("unnamed", [True, False])
def test_permissions_and_links(unnamed, tmp_path, monkeypatch):
    if not unnamed:
        named(monkeypatch)
    (tmp_path / "link").symlink_to("real")
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "text", "x")
        write_atomically(tmp_path / "path", lambda path: path.write_text("x"))
        with replacing(tmp_path / "link") as file:
            file.write(b"y")
        with replacing(tmp_path / "exact", mode=0o604) as file:
            file.write(b"z")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "y"
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "path", "real")} == {0o640}
    assert (tmp_path / "exact").stat().st_mode & 0o777 == 0o604
    assert len(list(tmp_path.iterdir())) == 5


def test_a_link_that_is_not_followed_is_replaced(tmp_path):
    """A cache may be in a folder where others can plant links to this user's files."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "cache").symlink_to(victim)
    with replacing(tmp_path / "cache", follow=False) as file:
        file.write(b"{}")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "cache").is_symlink() and (tmp_path / "cache").read_text() == "{}"
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError), replacing(tmp_path / "folder", follow=False):
        pass


@pytest.mark.parametrize("durable", [True, False])
def test_files_that_have_to_survive_a_power_failure_are_flushed(durable, tmp_path, monkeypatch):
    """The file is flushed before it gets its name, the folder afterwards."""
    calls = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("flush") or flush(file))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or rename(*paths))
    with replacing(tmp_path / "a", durable=durable) as file:
        file.write(b"x")
    assert calls == (["flush", "rename", "flush"] if durable else ["rename"])
    calls.clear()
    write_atomically(tmp_path / "a", lambda path: path.write_text("x"))
    assert calls == ["flush", "rename", "flush"]


def _stream(path, end):
    with replacing(path) as file:
        file.write(b"x" * 10**6)
        end()


def _named_stream(path, end):
    writing._unnamed = lambda *_: None
    _stream(path, end)


def _path(path, end):
    with temporary_path(path) as file:
        file.write_bytes(b"x" * 10**6)
        end()


def _nested(path, end):
    with temporary_path(path), temporary_path(f"{path}2"):
        end()


WRITERS = [_stream, _named_stream, _path, _nested]
ENDS = [*((writer, signal.SIGTERM) for writer in WRITERS), (_stream, signal.SIGKILL)]


@pytest.mark.parametrize(("writer", "number"), ENDS)
def test_an_ended_process_leaves_the_old_file_and_no_other(writer, number, tmp_path):
    """After SIGKILL nothing can be removed; only a stream, whose file has no name yet, leaves nothing."""
    (tmp_path / "a").write_text("old")
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            writer(tmp_path / "a", lambda: os.kill(os.getpid(), number))
        finally:
            os._exit(0)  # not reached by a process that ends as it has to
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_program_keeps_its_own_handler_of_sigterm(tmp_path):
    def handle(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        with pytest.raises(KeyboardInterrupt), temporary_path(tmp_path / "a"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())
    with temporary_path(tmp_path / "a"):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


FULL = [
    lambda path: save_file({"a": torch.zeros(50_000)}, path),
    lambda path: torch.save(torch.zeros(50_000), path),
    lambda path: path.write_bytes(bytes(200_000)),
    bytes(200_000),
]


@pytest.mark.parametrize("content", FULL)
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_is_reported_in_one_line_whatever_raises_it(content, old, tmp_path):
    if old:
        (tmp_path / "a").write_text("old")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(ArtifactError, match=r"cannot write .*a; expected a writable folder with room"):
            write_atomically(tmp_path / "a", content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"] * old


def test_no_other_module_renames_files():
    """The guarantees of the one writer hold for everything that mpcompile writes."""
    root = Path(mpcompile.__file__).parent
    by_hand = re.compile(r"os\.(replace|rename)\(|mkstemp\(|NamedTemporaryFile\(")
    paths = [path for folder in (root, root / "kernels", root / "passes") for path in folder.rglob("*.py")]
    writers = {path.relative_to(root).as_posix() for path in paths if by_hand.search(path.read_text("utf-8"))}
    assert len(paths) > 100 and writers == {"io/writing.py"}
