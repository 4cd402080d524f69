"""Saving refuses modules that an artifact cannot hold, and writes a file as a whole or not at all."""

import errno
import os
import resource
import signal
import subprocess

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations

from mpcompile import Config, load, save, transform
from mpcompile.capture.importers import import_model
from mpcompile.errors import ArtifactError
from mpcompile.ir.module import IRModule
from tests.support.helpers import images, mlp, tiny_vit


@pytest.fixture(scope="module")
def vit() -> IRModule:
    return transform(tiny_vit(), images(2), Config(pattern="2:4", tome_r=1))


def calling(module: nn.Module) -> IRModule:
    """An IR that calls one layer."""
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    root = nn.Module()
    root.add_module("layer", module)
    return IRModule(root, graph)


def applying(target, *args, **kwargs) -> IRModule:
    """An IR that calls one function on its input."""
    graph = fx.Graph()
    graph.output(graph.call_function(target, (graph.placeholder("x"), *args), kwargs))
    return IRModule(nn.Module(), graph)


# --- Refused to save ---


class Own(nn.Linear):
    pass


def hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *a: None)
    return layer


def patched() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


def altered() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.in_features = 7
    return layer


def changed() -> nn.Module:
    layer = nn.ConvTranspose2d(2, 2, 3)
    layer.transposed = False
    return layer


def helper(x):
    return x


UNSAVABLE = [
    (mlp, "not the IR.*Sequential"),
    (lambda: calling(Own(2, 2)), r"layer layer is a .*\.Own, which"),
    (lambda: calling(parametrizations.weight_norm(nn.Linear(2, 2))), "layer layer is a .*ParametrizedLinear"),
    (lambda: calling(hooked()), "layer layer has hooks"),
    (lambda: calling(patched()), "layer layer has hooks or a patched forward"),
    (lambda: calling(altered()), "layer layer: the tensors do not fit"),
    (lambda: calling(changed()), "layer layer .ConvTranspose2d. has transposed = False"),
    (lambda: calling(nn.Linear(2, 2, device="meta")), "tensor layer.weight cannot be stored.*meta"),
    (lambda: calling(nn.Linear(2, 2, dtype=torch.complex128)), r"tensor layer\.bias has a dtype"),
    (lambda: applying(helper), "node 'helper': it calls .*helper"),
    (lambda: applying(torch.save, "file"), "node 'save': it calls torch.*save"),
    (
        lambda: applying(torch.ops.aten.from_file.default, False, 1),
        r"node 'from_file_default': it calls torch\.ops\.aten\.from_file",
    ),
    (lambda: applying(getattr, "grad_fn"), r"node 'getattr_1': getattr with .*grad_fn.* is not allowed"),
    (lambda: applying(torch.add, 1j), "node 'add': a value of type complex"),
    (lambda: applying(torch.add, range(3)), "node 'add': a value of type range"),
    (lambda: applying(torch.add, **{"größe": 1}), "node 'add': a name cannot be used in Python source"),
]


@pytest.mark.parametrize(("build", "message"), UNSAVABLE, ids=[m for _, m in UNSAVABLE])
def test_refused_to_save(build, message, tmp_path):
    with pytest.raises(ArtifactError, match=message) as caught:
        save(build(), tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_is_not_json_and_dynamo_graphs_are_refused(tmp_path):
    gm = transform(mlp(), torch.ones(1, 32))
    gm.plan.notes.append(object())
    with pytest.raises(ArtifactError, match="plan holds something"):
        save(gm, tmp_path / "file")
    kept = []

    def backend(graph, inputs):
        kept.append(import_model(graph, inputs).gm)
        return graph

    torch.compile(mlp(), backend=backend)(torch.ones(1, 32))
    with pytest.raises(ArtifactError, match="takes as an input"):
        save(kept[0], tmp_path / "file")


# --- Writing: whole or not at all ---


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing/file", "expected the folder .*missing, found"), ("pipe", "something other than a file")],
)
def test_refused_paths(path, message, vit, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match=message):
        save(vit, tmp_path / path)
    for bad in (7, "a\0b"):
        with pytest.raises(ArtifactError, match="not a path"):
            save(vit, bad)


class Broken(Exception):
    pass


FAILURES = [
    ("fsync", OSError(errno.ENOSPC, "No space left on device"), "expected room.*No space left.*Free space"),
    ("replace", PermissionError(errno.EACCES, "Permission denied"), "expected permission, found Permission denied"),
    ("open", OSError(errno.EROFS, "Read-only file system"), "expected permission, found Read-only"),
    ("fsync", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ("replace", KeyboardInterrupt(), None),
]


@pytest.mark.parametrize(("call", "error", "message"), FAILURES)
def test_failure_leaves_the_old_file(call, error, message, vit, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ArtifactError if message else KeyboardInterrupt, match=message):
        save(vit, path)
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    save(vit, path)
    assert load(path).plan.masked


def test_a_file_size_limit_is_like_a_full_disk(vit, tmp_path):
    """The write itself fails, in the middle."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(ArtifactError, match="expected room for the file, found File too large"):
            save(vit, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(vit, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this root may not mount")
    try:
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with pytest.raises(ArtifactError, match="No space left on device"):
            save(vit, path)
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_links_and_permissions(vit, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    old = os.umask(0o027)
    try:
        save(vit, tmp_path / "link")
    finally:
        os.umask(old)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert load(tmp_path / "link").plan == vit.plan
