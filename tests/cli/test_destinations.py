"""Destinations: checked before any work, for every command and every option that names a file."""

import json
import os

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mpcompile import Config, cli, load, save, transform
from mpcompile.cli import destinations
from mpcompile.io.ownership import is_ours
from tests.support.helpers import mlp

MODEL = "test_resnet"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A folder with every kind of file that a command can read."""
    folder = tmp_path_factory.mktemp("read")
    save(transform(mlp(), torch.randn(2, 32), Config(pattern="2:4")).eval(), folder / "a.mpc")
    save_file(timm.create_model(MODEL).state_dict(), folder / "model.safetensors")
    return folder


class Worked(Exception):
    """Raised when the work begins."""


@pytest.fixture
def idle(monkeypatch):
    """Stop every command where its work begins."""
    parse = cli._Parser.parse_args

    def run(args):
        raise Worked

    def parsed(self, *arguments):
        args = parse(self, *arguments)
        args.run = run
        return args

    monkeypatch.setattr(cli._Parser, "parse_args", parsed)


COMMANDS = {
    "compile --out": ["compile", MODEL],
    "compile --json": ["compile", MODEL, "--out", "x.mpc"],
    "audit --json": ["audit", MODEL],
    "verify --json": ["verify", "a.mpc"],
    "explain --json": ["explain", MODEL],
    "analyze --json": ["analyze", "a.mpc"],
    "analyze --plot": ["analyze", "a.mpc"],
    "visualize --out": ["visualize", MODEL, "--image", "cat.jpg"],
    "env --json": ["env"],
    "certify --json": ["certify", MODEL, "--artifact", "a.mpc", "--images", "."],
    "distill --json": ["distill", "r.yaml", "--data", ".", "--out", "run"],
    "export --out": ["export", "a.mpc", "--format", "onnx"],
    "export --json": ["export", "a.mpc", "--format", "onnx", "--out", "x.onnx"],
    "report --out": ["report", "a.mpc"],
    "optimize --out": ["optimize", MODEL, "--images", "."],
    "optimize --json": ["optimize", MODEL, "--images", ".", "--out", "x.mpc"],
    "optimize --report": ["optimize", MODEL, "--images", ".", "--out", "x.mpc"],
}


def test_every_option_that_names_a_file_is_declared():
    """A new option whose type can be written to has to be in this list or be a known input."""
    inputs = {"artifact", "checkpoint", "config", "images", "image", "audit", "explain", "analyze", "certify"}
    inputs |= {"class_map", "recipe", "data", "target", "optimize", "validation", "timings"}
    named = set()
    for name, job in cli.parser()._subparsers._group_actions[0].choices.items():
        declared = job.get_default("destinations") or {}
        for action in job._actions:
            if action.metavar in ("FILE", "FOLDER") and action.dest not in inputs:
                assert action.dest in declared, (name, action.dest)
                named.add(f"{name} --{action.dest}")
        assert set(declared) <= {action.dest for action in job._actions}
    # tests/training, tests/test_dump.py and tests/cli/test_reconstruct_command.py
    folders = {"distill --out", "compile --dump", "compile --statistics", "optimize --folder"}
    assert named - folders == set(COMMANDS)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("option", COMMANDS)
def test_an_output_that_cannot_be_written_is_reported_before_the_work(option, pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pruned)
    command = [*COMMANDS[option], option.split()[1]]
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = ["none/sub/x", "file/x", "file", "fifo", "loop", "x" * 300]
    places += [] if option == "compile --out" else ["folder", "new/"]
    for place in places:
        assert cli.main([*command, f"{tmp_path}/{place}"]) == 2, place
        output = capsys.readouterr().err
        assert option.split()[1] in output or "cannot write" in output or "cannot make" in output
        assert output.startswith("mpcompile: ") and output[:-1].isprintable() and len(output) < 600
    assert (tmp_path / "file").read_text() == "mine"
    for place in ("x.png", "empty"):
        (tmp_path / "empty").touch()
        with pytest.raises(Worked):
            cli.main([*command, f"{tmp_path}/{place}"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "fifo", "file", "folder", "loop"]


PATHS = [
    [name, *action.option_strings[:1]]
    for name, job in cli.parser()._subparsers._group_actions[0].choices.items()
    for action in job._actions
    if action.metavar in ("FILE", "FOLDER", "PATH") or action.dest in ("artifact", "target", "recipe")
]


@pytest.mark.parametrize("call", PATHS, ids=" ".join)
def test_an_empty_path_is_not_the_current_folder(call, tmp_path, monkeypatch, capsys):
    """For inputs and outputs: ``Path("")`` is ``.``, which nobody typed."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main([*call, ""])
    assert caught.value.code == 2 and "the path is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("visualize {model} --image a.png --out v.xyz", "ends in .png, found .xyz"),
        ("visualize {model} --image a.png --out v", "ends in .png, found a name without a suffix"),
        ("report a.mpc --out page.pdf", "ends in .html or .htm, found .pdf"),
        ("analyze a.mpc --plot a.xyz", ".pdf"),
    ],
)
def test_a_name_has_the_suffix_of_its_format(command, expected, pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(pruned)
    before = sorted(pruned.iterdir())
    assert cli.main(command.format(model=MODEL).split()) == 2
    assert expected in capsys.readouterr().err and sorted(pruned.iterdir()) == before


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "command",
    [
        "verify a.mpc --json a.mpc",
        "verify a.mpc --json hard.mpc",
        "verify a.mpc --json soft.mpc",
        "analyze a.mpc --plot a.mpc",
        "export a.mpc --format pt2 --out ./a.mpc",
        "export a/ --format pt2 --out a/model.safetensors",
        "export a --format pt2 --out x.pt2 --json a/plan.json",
        "report --audit audit.json --out audit.json",
        "report a.mpc --image a.mpc hard.mpc --out hard.mpc",
        f"compile {MODEL} --checkpoint a/model.safetensors --out a/",
        f"compile {MODEL} --checkpoint a.mpc --out a.mpc",
        f"compile {MODEL} --config audit.json --out x.mpc --json audit.json",
        f"compile {MODEL} --out x.json --json x.json",
        "export a.mpc --format pt2 --out x --json ./x",
    ],
)
def test_an_input_is_never_replaced(command, pruned, tmp_path, monkeypatch, capsys):
    """Inputs are kept although mpcompile wrote all of these."""
    monkeypatch.chdir(tmp_path)
    gm = load(pruned / "a.mpc")
    for name in ("a.mpc", "a/"):
        save(gm, name)
    os.link("a.mpc", "hard.mpc")
    os.symlink("a.mpc", "soft.mpc")
    (tmp_path / "audit.json").write_text(json.dumps({"rows": [], "environment": {}, "fell_back": False}))
    assert is_ours(tmp_path / "audit.json")
    assert cli.main(command.split()) == 2
    output = capsys.readouterr().err
    assert "which this command reads" in output or "the same file" in output


@pytest.mark.usefixtures("idle")
def test_folders_of_a_run_and_of_the_demo(tmp_path, capsys):
    for command in (["demo"], ["distill", "r.yaml", "--data", "images"]):
        with pytest.raises(Worked):
            cli.main([*command, "--out", f"{tmp_path}/new/run"])
        assert not (tmp_path / "new").exists()
        (tmp_path / "file").write_text("x")
        assert cli.main([*command, "--out", f"{tmp_path}/file/run"]) == 2
    (tmp_path / "distilled.mpc").write_text("mine")
    assert cli.main(["distill", "r.yaml", "--data", "images", "--out", str(tmp_path)]) == 2
    assert "did not write" in capsys.readouterr().err


def test_the_weights_that_were_read_stay(pruned, tmp_path, capsys):
    """Hugging Face gives them the name of an artifact in a folder."""
    dense = tmp_path / "model.safetensors"
    dense.write_bytes((pruned / "model.safetensors").read_bytes())
    before = load_file(dense)
    assert cli.main(["compile", MODEL, "--checkpoint", str(dense), "--out", f"{tmp_path}/", "--quiet"]) == 2
    assert "which this command reads" in capsys.readouterr().err
    assert all(torch.equal(v, before[k]) for k, v in load_file(dense).items())


def test_a_slash_makes_a_folder_that_every_command_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["compile", MODEL, "--score", "magnitude", "--quiet", "--out", "r/"]
    for _ in range(2):
        assert cli.main(command) == 0
    assert json.loads((tmp_path / "r/plan.json").read_text())["plan"]["layers"]
    assert is_ours(tmp_path / "r/plan.json")
    others = ["verify r", "verify r/ --json v.json", "analyze r/ --quiet --json an.json", "report r/ --analyze an.json"]
    for other in (*others, "export r --format dense-masked --out d.safetensors", "verify d.safetensors"):
        assert cli.main(other.split()) == 0, other
    assert all(is_ours(tmp_path / name) for name in ("v.json", "an.json", "report.html", "d.safetensors"))
    assert destinations.is_folder("r") and destinations.is_folder("new/") and not destinations.is_folder("new")
    capsys.readouterr()


def test_a_request_to_end_unwinds(monkeypatch):
    import signal

    before = signal.getsignal(signal.SIGTERM)
    left = []

    def run(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            left.append(True)

    monkeypatch.setattr("mpcompile.cli.commands.measuring.verify.run", run)
    with pytest.raises(SystemExit) as caught:
        cli.main(["verify", "x.mpc"])
    assert caught.value.code == 143 and left and signal.getsignal(signal.SIGTERM) == before
