"""Dumps: what every pass did to the graph, as files that a person reads."""

import ast
import json
import os

import pytest
import torch
from torch import nn

from mpcompile import Config, MPCompileError, Pipeline, lower, transform
from mpcompile.__main__ import main
from mpcompile.dump import FILES, Dump, readable
from mpcompile.passes.base import Pass
from mpcompile.passes.mask import Mask
from mpcompile.sources import timm_models
from tests.support.helpers import images, mlp, tiny_created, tiny_vit

DEFAULT = ["01-analyze", "02-allocate", "03-permute", "04-merge_tokens", "05-mask", "06-restore", "07-skip_dead_tokens"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_every_pass_leaves_its_graph_before_and_after(tmp_path):
    gm = transform(tiny_vit(), images(), Config(tome_r=2), dump=tmp_path / "new" / "graphs")
    folder = tmp_path / "new" / "graphs"
    assert names(folder) == DEFAULT
    for path in folder.iterdir():
        assert names(path) == sorted(FILES)
        for name in ("before.py", "after.py"):
            ast.parse((path / name).read_text())
    texts = [(folder / name / part).read_text() for name in DEFAULT for part in ("before.py", "after.py")]
    assert texts[1:-1:2] == texts[2::2] and texts[-1] == readable(gm)
    merged = folder / "04-merge_tokens"
    assert "token_merge" in (merged / "after.py").read_text()
    assert "token_merge" not in (merged / "before.py").read_text()
    assert "# float32 (3, 17, 32)" in (merged / "before.py").read_text()
    diff = (merged / "change.diff").read_text()
    assert diff.startswith("--- before.py\n+++ after.py\n") and "\n+" in diff
    assert (folder / "01-analyze" / "change.diff").read_text() == ""
    decisions = [json.loads((folder / name / "decision.json").read_text()) for name in DEFAULT]
    assert decisions == [record.decision for record in gm.plan.passes]


def test_numbers_continue_and_nothing_is_replaced(tmp_path):
    (tmp_path / "01-analyze").mkdir()
    (tmp_path / "01-analyze" / "before.py").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    gm = transform(mlp(), torch.randn(2, 32), dump=tmp_path)
    assert names(tmp_path)[:2] == ["01-analyze", "02-analyze"]
    assert (tmp_path / "01-analyze" / "before.py").read_text() == "mine"
    lower(gm, torch.randn(2, 32), Config(engine="reference"), dump=tmp_path)
    assert names(tmp_path)[-5:] == ["09-fold_norm", "10-fold_scale", "11-lower", "12-fuse", "notes.txt"]
    assert "self.packed" in (tmp_path / "11-lower" / "after.py").read_text()


def test_the_environment_asks_for_dumps_in_transform_and_in_the_backend(tmp_path, monkeypatch):
    monkeypatch.setenv("MPCOMPILE_DUMP", str(tmp_path))
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        torch.compile(model, backend="mpsparse", options={"engine": "reference"})(torch.randn(2, 64))
    assert names(tmp_path) == [*DEFAULT, "08-lower", "09-fuse"]
    monkeypatch.setenv("MPCOMPILE_DUMP", "")
    transform(mlp(), torch.randn(2, 32))
    assert len(names(tmp_path)) == 9


def test_names_of_passes_are_not_paths(tmp_path):
    class Odd(Pass):
        name = "../odd"

        def plan(self, gm, ctx):
            return {"kind": torch.float32}

        def apply(self, gm, decision, ctx):
            return False

    transform(mlp(), torch.randn(2, 32), pipeline=Pipeline([Odd()]), dump=tmp_path / "in")
    assert names(tmp_path) == ["in"] and names(tmp_path / "in") == ["01-.._odd"]


@pytest.mark.parametrize("where", ["file", "file/below", "x" * 300])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(MPCompileError, match="make the folder"):
        Dump(tmp_path / where)
    with pytest.raises(MPCompileError, match="make the folder"):
        transform(mlp(), torch.randn(2, 32), dump=tmp_path / where)
    assert os.listdir(tmp_path) == ["file"]


def test_a_dump_that_fails_later_is_one_of_our_errors(tmp_path):
    dump = Dump(tmp_path / "graphs")
    (tmp_path / "graphs").rmdir()
    (tmp_path / "graphs").write_text("")
    with pytest.raises(MPCompileError, match="cannot write graphs"):
        transform(mlp(), torch.randn(2, 32), pipeline=Pipeline(after_each=dump))


def test_callback_sees_every_pass_also_one_that_is_refused():
    seen = []

    class Break(Mask):
        name = "break"

        def apply(self, gm, decision, ctx):
            output = next(n for n in gm.graph.nodes if n.op == "output")
            output.args = (next(n for n in gm.graph.nodes if n.target == "0"),)
            return True

    def record(step, before, gm, decision):
        seen.append((step.name, before != readable(gm), sorted(decision.masked)))

    pipeline = Pipeline([Mask(), Break()], after_each=record)
    with pytest.raises(MPCompileError, match="changed the output"):
        transform(mlp(), torch.randn(2, 32), pipeline=pipeline)
    assert [name for name, _, _ in seen] == ["mask", "break"] and seen[1][1]
    assert seen[0][2] and not seen[1][2]


def test_compile_command_dumps(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_models, "create", tiny_created)
    out, graphs = tmp_path / "out.mpc", tmp_path / "graphs"
    assert main(["compile", "tiny", "--out", str(out), "--dump", str(graphs)]) == 0
    assert names(graphs) == DEFAULT


@pytest.mark.parametrize("place", ["file", "file/x", "fifo", "loop"])
def test_compile_command_refuses_a_dump_before_the_work(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timm_models, "create", lambda *_, **__: pytest.fail("the model was made"))
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert main(["compile", "tiny", "--out", str(tmp_path / "out.mpc"), "--dump", str(tmp_path / place)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("mpcompile: ") and "folder" in message and len(message) < 600
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "out.mpc").exists()
