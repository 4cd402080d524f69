"""Files: what is read is a regular file, what is written is whole, and nothing of anybody else's is replaced."""

import argparse
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpcompile import Config, cli, load, save, transform
from mpcompile.artifact.verify import read, verify
from mpcompile.cli.options import read_config
from mpcompile.errors import ArtifactError, ConfigError, MPCompileError, printable
from mpcompile.export.programs import save_dense, save_pt2
from mpcompile.io import files
from mpcompile.io.state_dicts import Ignored
from mpcompile.measure.report import Report, Row
from mpcompile.page.merged import visualize_merging
from mpcompile.plan import LayerPlan, PassRecord, Plan
from mpcompile.training import checkpoint, events
from mpcompile.training.recipes.recipe import Recipe
from tests.support.helpers import images, mlp, tiny_vit


@pytest.fixture(scope="module")
def pruned():
    return transform(mlp(), torch.randn(2, 32), Config(pattern="2:4")).eval()


def odd_places(folder):
    """Things that can stand where a file is expected, and that reading may wait for."""
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    return [folder / name for name in ("fifo", "link", "folder", "loop", "none")] + [Path("/dev/zero")]


def resumed(path):
    return events.EventLog(path, resume_at=1)


def lines(path):
    return list(events.read(path))


READERS = [files.read_json, load, files.read_checkpoint, read, resumed, lines, checkpoint.read, read_config]


@pytest.mark.parametrize("reader", READERS)
def test_nothing_but_a_regular_file_is_read(reader, tmp_path):
    signal.alarm(60)
    try:
        for place in odd_places(tmp_path):
            if place.name == "none" and reader is resumed:
                continue  # a log is made
            with pytest.raises(MPCompileError) as caught:
                reader(place)
            assert re.search(f"{place.name}|fifo", str(caught.value)) and str(caught.value).isprintable()
    finally:
        signal.alarm(0)


def test_a_recipe_and_the_plan_of_a_folder_are_regular_files(pruned, tmp_path):
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Recipe.load(tmp_path / "r.yaml")
    save(pruned, f"{tmp_path}/a/")
    (tmp_path / "a/plan.json").unlink()
    assert load(tmp_path / "a").plan == pruned.plan  # it is there for people
    os.mkfifo(tmp_path / "a/plan.json")
    with pytest.raises(ArtifactError, match=r"plan\.json can't be read"):
        load(tmp_path / "a")


def test_temporary_files_follow_no_planted_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    names = []
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: names.append(n) or "guessed")
    for name in ("guessed.tmp", "guessed.tmp.html"):
        (tmp_path / f"{files.TEMPORARY}{name}").symlink_to(victim)
    with pytest.raises(ArtifactError, match="can't write"):
        files.write_atomically(tmp_path / "page.html", "x")
    monkeypatch.setattr(files, "_unnamed", lambda folder: None)
    with pytest.raises(FileExistsError), files.replacing(tmp_path / "page.html"):
        pass
    assert names and victim.read_text() == "precious" and not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("unnamed", [True, False])
def test_permissions_and_links(unnamed, tmp_path, monkeypatch):
    if not unnamed:
        monkeypatch.setattr(files, "_unnamed", lambda folder: None)
    (tmp_path / "link").symlink_to("real")
    before = os.umask(0o027)
    try:
        files.write_atomically(tmp_path / "text", "x")
        with files.replacing(tmp_path / "link") as file:
            file.write(b"y")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "y"
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "real")} == {0o640}
    assert len(list(tmp_path.iterdir())) == 3


def test_a_killed_write_leaves_the_old_file_alone(tmp_path):
    code = "import os, signal, sys; from mpcompile.io.files import replacing\n"
    code += "with replacing(sys.argv[1]) as file: file.write(b'x' * 10**6); os.kill(os.getpid(), signal.SIGKILL)"
    (tmp_path / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_file({"a": torch.zeros(50_000)}, path),
        lambda path: torch.save(torch.zeros(50_000), path),
        lambda path: path.write_bytes(bytes(200_000)),
    ],
)
def test_a_full_disk_by_any_name_is_one_line(write, tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(ArtifactError, match=r"can't write .*a; expected a writable folder with room"):
            files.replace_atomically(tmp_path / "a", write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_what_mpcompile_wrote_is_known_again(pruned, tmp_path):
    save(pruned, tmp_path / "a.mpc")
    save(pruned, f"{tmp_path}/f/")
    save_dense(pruned, tmp_path / "dense.safetensors")
    save_pt2(pruned, torch.randn(2, 32), tmp_path / "p.pt2", engine="dense")
    assert torch.export.load(tmp_path / "p.pt2").module()(torch.randn(2, 32)).shape == (2, 5)
    checkpoint.write(tmp_path / "checkpoint.pt", {"step": 1})
    files.write_atomically(tmp_path / "plan.json", pruned.plan.to_json())
    visualize_merging(tiny_vit(), images(1)[0], tmp_path / "merged.png", Config(pattern="dense", tome_r=2))
    (tmp_path / "empty").touch()
    ours = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(ours) == 9 and all(files.is_ours(p) for p in ours)
    other = tmp_path / "others"
    other.mkdir()
    save_file({"a": torch.ones(2)}, other / "model.safetensors", {"format": "pt"})
    torch.save({"a": torch.ones(2)}, other / "a.pt")
    np.savez(other / "a.npz", a=np.ones(2))
    (other / "package.json").write_text('{"name": "mpcompile", "version": "1"}')
    (other / "list.json").write_text('[{"a": 1}]')
    (other / "notes.html").write_text("<!doctype html><p>mpcompile is nice")
    (other / "notes.txt").write_text("precious, about mpcompile")
    os.mkfifo(other / "fifo")
    assert not any(files.is_ours(p) for p in other.iterdir())


def test_a_folder_of_another_program_is_left_alone(pruned, tmp_path):
    dense = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, dense)
    before = dense.read_bytes()
    with pytest.raises(ArtifactError, match=r"holds a model\.safetensors that mpcompile didn't write"):
        save(pruned, f"{tmp_path}/")
    assert dense.read_bytes() == before and list(tmp_path.iterdir()) == [dense]
    dense.unlink()
    (tmp_path / "plan.json").write_text('{"of": "mine"}')
    with pytest.raises(ArtifactError, match=r"holds a plan\.json"):
        save(pruned, tmp_path)
    (tmp_path / "plan.json").unlink()
    for _ in range(2):  # its own files are replaced
        save(pruned, tmp_path)
    assert load(tmp_path).plan == pruned.plan and read(tmp_path).plan == pruned.plan


# --- Checkpoints as training scripts leave them ---


class Lightning(dict):
    """Stands for a class of hyperparameters, of a package that isn't here."""


class Metric:
    def __init__(self):
        self.best = 0.5


def layouts(state):
    """Files of common training scripts: what is in them, and a word of what has to be told."""
    under = {f"module.{k}": v for k, v in state.items()}
    compiled = {f"_orig_mod.{k}": v for k, v in state.items()}
    both = {f"module._orig_mod.{k}": v for k, v in state.items()}
    lightning = {f"model.{k}": v for k, v in state.items()} | {"criterion.weight": torch.ones(2)}
    old = {k: torch.zeros_like(v) for k, v in state.items()}
    args, epoch = argparse.Namespace(lr=0.1, out=Path("x")), {"epoch": 3, "best": np.float64(0.5)}
    return {
        "plain": (state, ""),
        "ddp": ({"state_dict": under, **epoch}, "module."),
        "compiled": (compiled, "_orig_mod."),
        "both": ({"model": both, "optimizer": {"state": {}, "param_groups": []}}, "_orig_mod."),
        "inner": ({f"{k.partition('.')[0]}._orig_mod.{k.partition('.')[2]}": v for k, v in state.items()}, "_orig_mod"),
        "timm": ({"state_dict": old, "state_dict_ema": state, "args": args, "arch": "x"}, "state_dict_ema"),
        "torchvision": ({"model": old, "model_ema": {"n_averaged": torch.tensor(3), **under}}, "model_ema"),
        "averaged": ({"n_averaged": torch.tensor(3), **under}, "module."),
        "state": ({"model_state": state, "rng": torch.get_rng_state()}, "model_state"),
        "net": ({"net": state}, "'net'"),
        "deepspeed": ({"module": state, "dp_world_size": 8}, "'module'"),
        "lightning": (
            {"state_dict": lightning, "hyper_parameters": Lightning(lr=1), "callbacks": {"best": Metric()}},
            "model.",
        ),
        "own entry": ({"checkpoint": {"model": state}, "optim": {"state": {0: {"m": torch.ones(2)}}}}, "'checkpoint'"),
        "ema": ({"ema": {"decay": 0.99, "module": state}, "state_dict": old}, "'ema'"),
    }


@pytest.mark.parametrize("name", list(layouts({"0.weight": torch.ones(1)})))
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_training_scripts_load(name, legacy, tmp_path, caplog):
    model, other = mlp(), mlp()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    value, word = layouts(model.state_dict())[name]
    path = tmp_path / f"{name}.pth.tar"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    files.load_checkpoint(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert word in caplog.text and caplog.text.isprintable() is ("\n" not in caplog.text)
    assert (not word) == (not caplog.records)
    assert set(files.read_checkpoint(path)) >= (set(model.state_dict()) if name != "lightning" else set())


def test_wrapped_models_keep_their_names(tmp_path):
    """A name that looks like a wrapper's is the model's own if the model has it."""
    model = nn.ModuleDict({"module": nn.Linear(4, 4)})
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "weights")  # known by its content, not by its name
    for name in ("a.pt", "weights"):
        other = nn.ModuleDict({"module": nn.Linear(4, 4)})
        files.load_checkpoint(other, tmp_path / name)
        assert torch.equal(other["module"].weight, model["module"].weight)


def test_an_artifact_is_a_checkpoint_too(pruned, tmp_path):
    save(pruned, f"{tmp_path}/a/")
    model = mlp()
    files.load_checkpoint(model, tmp_path / "a")
    x = torch.randn(4, 32)
    torch.testing.assert_close(model(x), pruned(x))


class Runs:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


class Shell:
    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("value", [Runs(), Shell()])
def test_nothing_in_a_checkpoint_is_run(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2, 4)}, "x": value}, "a.pt")
    with pytest.raises(ArtifactError, match="can't be read as a checkpoint"):
        files.read_checkpoint(Path("a.pt"))
    assert not Path("ran").exists()


def test_a_pickled_model_is_named(tmp_path):
    for value in (mlp(), {"model": mlp()}, [1], {"epoch": 1}, {}):
        torch.save(value, tmp_path / "whole.pth")
        with pytest.raises(ArtifactError, match=r"whole\.pth can't be read as a checkpoint") as caught:
            files.read_checkpoint(tmp_path / "whole.pth")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert "torch.nn" in str(pickled(mlp(), tmp_path))
    assert Ignored(1, a=2).name == ""


def pickled(value, folder):
    torch.save(value, folder / "x.pth")
    with pytest.raises(ArtifactError) as caught:
        files.read_checkpoint(folder / "x.pth")
    return caught.value


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {f"what.{k}": v for k, v in s.items()},
        lambda s: {**s, "\x1b[31m\n\u202e": torch.ones(1)},
        lambda s: {**s, "x" * 5000: torch.ones(1)},
        lambda s: {k: v for k, v in s.items() if k != "0.weight"},
        lambda s: {**s, "0.weight": torch.ones(3, 3)},
        lambda s: {**s, "0.weight": s["0.weight"].to_sparse()},
        lambda s: {k: (127 * v).to(torch.int8) for k, v in s.items()},  # quantised: the scales are elsewhere
        lambda s: {**s, "0.weight": s["0.weight"].to(torch.complex64)},
        lambda s: {**s, "0.weight": s["0.weight"] > 0},
    ],
)
def test_what_does_not_fit_is_one_line(change, tmp_path):
    torch.save(change(mlp().state_dict()), tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match=r"other\.pth doesn't fit the model; expected .*found ") as caught:
        files.load_checkpoint(mlp(), tmp_path / "other.pth")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 590


def test_odd_tensors_are_passed_over(tmp_path, caplog):
    value = {
        ("a", 1): torch.ones(2, 4),
        3: torch.ones(2, 4),
        "sparse": torch.eye(4).to_sparse(),
        "meta": torch.ones(4, 4, device="meta"),
        "claims": torch.ones(1).expand(1 << 20, 1 << 20),
        "whole": torch.ones(4, 4),
    }
    torch.save(value, tmp_path / "a.pt")
    assert list(read(tmp_path / "a.pt")) == ["whole"] and "5 tensors" in caplog.text


# --- Messages ---


def test_messages_are_one_printable_line():
    nasty = "\x1b]0;owned\x07\n\r\u202e\u2028\udcff\x9b31m" + "x" * 3000
    for error in (
        MPCompileError(nasty, layer=nasty, expected=nasty, found=nasty, hint=nasty),
        MPCompileError("short", found=nasty),
        MPCompileError("number", found=10**5000),
    ):
        assert str(error).isprintable() and len(str(error)) < 590
    assert str(MPCompileError("short", found=nasty)).startswith("short; found \\x1b]0;owned\\x07\\n")
    assert printable("a\tb") == "a\\tb" and printable("x" * 50, 11) == "xxxxx…xxxxx" and printable("—ü漢") == "—ü漢"


def test_tables_and_the_command_line_escape_names(tmp_path, capsys):
    nasty = "\x1b[31m\u202ea\nb"
    plan = Plan(notes=[nasty], passes=[PassRecord(nasty, {}, nasty)])
    plan.layers[nasty] = LayerPlan("linear", (4, 4), reason=nasty, notes={"analyze": {"verdict": nasty}})
    texts = [plan, Report([Row(nasty)], {nasty: nasty}, notes=[nasty]), verify({nasty: torch.ones(2, 4)})]
    for text in map(str, texts):
        assert all(line.isprintable() for line in text.split("\n")) and "a\\nb" in text
    torch.save({nasty: torch.ones(2, 4)}, tmp_path / "a.pt")
    assert cli.main(["verify", str(tmp_path / "a.pt")]) == 0
    assert cli.main(["verify", f"{nasty}.mpc", "--verbose"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["verify", "x", nasty])
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).split("\n"))


def test_json_of_any_size_is_a_value_or_an_error():
    for text in ("[" * 100_000, "[" * 500 + "]" * 500, '{"a": ' + "9" * 30 + "}", "{", b"\xff", "9" * 5000):
        with pytest.raises(ValueError):
            files.parse_json(text)
    assert files.parse_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
