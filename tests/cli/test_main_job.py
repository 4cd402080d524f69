"""The command line: the main job for real, exit codes, and errors without a traceback."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mpcompile import backend as module
from mpcompile import cli
from mpcompile.cli import demo_job as demo_module
from mpcompile.io.ownership import is_ours
from mpcompile.measure.report import Report, Row
from mpcompile.optimization import builds
from mpcompile.optimization.accuracy.outcome import Outcome
from mpcompile.optimization.frontier import Entry, Frontier
from mpcompile.optimization.recipe import Recipe
from mpcompile.optimization.result import Optimized
from tests.support.helpers import mlp


@pytest.fixture
def no_inductor(monkeypatch):
    """Graphs run as they are: code generation is tested with the backend."""
    torch._dynamo.reset()
    monkeypatch.setattr(module, "_inductor", lambda gm, *_: gm)
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, backend="eager", **kwargs: real(model, backend=backend, **kwargs)
    )


@pytest.mark.usefixtures("no_inductor")
def test_demo_runs_and_its_second_run_starts_from_the_same_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_module.Demo, "epochs", 3)
    monkeypatch.setattr(demo_module, "MAX_DROP", 0.2)
    monkeypatch.setattr(builds, "MAX_ROUNDS", 3)
    monkeypatch.setattr(builds, "MIN_ROUNDS", 3)
    monkeypatch.setattr("mpcompile.optimization.api.installed_runtimes", lambda: ("torch",))
    command = ["demo", "--quick", "--quiet", "--seed", "3", "--out"]
    assert cli.main([*command, str(tmp_path / "first")]) == 0
    audited = {r["name"]: r for r in json.loads((tmp_path / "first/report.json").read_text())["rows"]}
    assert {"dense eager", "dense compiled", "dense frozen", "compiled sparse"} <= audited.keys()
    assert audited["dense eager"]["samples"] == 450
    found = json.loads((tmp_path / "first/frontier.json").read_text())
    chosen = next(entry for entry in found["entries"] if entry["verdict"] == "chosen")
    assert chosen["dense"] or chosen["outcome"]["samples"] == 300  # the scans kept back
    text = capsys.readouterr().out
    heads = [line.split()[0] for line in text.splitlines()[2:]]
    assert heads == ["model", "made", "accuracy", "work", "speed", "tried", "report", "artifact", "tables"]
    assert (str(tmp_path / "first/report.html") in text and "450 held-out scans" in text) or chosen["dense"]
    assert "blocks.0.attn.qkv" not in text  # tables are in the files
    made = {path.name for path in (tmp_path / "first").iterdir()}
    names = {"digits.mpc", "digits.runner.json", "report.html", "report.json", "frontier.json"}
    assert made >= names | {"plan.json", "analysis.json"}
    assert all(is_ours(tmp_path / "first" / name) for name in made)
    page = (tmp_path / "first/report.html").read_text()
    assert demo_module.TITLE in page and ">Frontier</h2>" in page
    assert len(list((tmp_path / "cache" / "mpcompile").glob("*.safetensors"))) == 1

    class EnoughError(Exception):
        pass

    def search(dense, *_args, **_options):
        raise EnoughError(torch.cat([p.flatten() for p in dense.parameters()]).double().sum().item())

    monkeypatch.setattr(demo_module.mpcompile, "optimize", search)
    monkeypatch.setattr(demo_module.F, "cross_entropy", None)  # the dense model comes from the cache
    sums = set()
    for name in ("second", "third"):
        with pytest.raises(EnoughError) as caught:
            cli.main([*command, str(tmp_path / name)])
        sums.add(caught.value.args[0])
    assert len(sums) == 1


@pytest.mark.usefixtures("no_inductor")
def test_audit_writes_json_and_notes_that_random_weights_mean_nothing(tmp_path, capsys):
    out = tmp_path / "audit.json"
    arguments = ["audit", "resnet10t", "--batch", "2", "--rounds", "2", "--quiet", "--json", str(out)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "random weights: accuracy and agreement mean nothing" in text
    report = json.loads(out.read_text())
    assert report["rows"][-1]["macs"] < report["rows"][0]["macs"]
    assert report["rows"][-1]["agree"] is None


@pytest.mark.parametrize("dense", [False, True])
def test_the_summary_of_the_demo_says_what_was_reached_and_how_sure_that_is(dense, tmp_path):
    rows = [
        Row("dense eager", correct=396, samples=400, macs=8_000_000, latency_ms=10.0, baseline=True),
        Row("compiled sparse", correct=394, samples=400, lost=5, won=3, macs=3_000_000, latency_ms=6.4),
    ]
    best = Entry("dense, openvino", runtime="openvino", dense=True, latency_ms=8.0, speedup=1.0)
    ours = Entry("8 tokens merged, mpcompile", Recipe((4, 4)), "torch", latency_ms=6.4, speedup=1.25)
    ours.outcome = Outcome(300, 4, 1, 1, 297, 0.01, 0.002)
    (best if dense else ours).verdict = "chosen"
    result = Optimized(None, None, Frontier([best, ours], 0.01, 0.8, {"batch": 64}))
    (tmp_path / "digits.mpc").write_bytes(bytes(1 << 19))
    text = demo_module.summary(tmp_path, mlp(), Report(rows, {"dtype": "float32", "batch": 64}), result)
    if dense:
        assert "nothing beats the best dense build" in text
    else:
        assert "1.25 times as fast as the best dense build, at a drop of 0.50 ± " in text
        assert "6.40 ms for 64 scans; dense, openvino 8.00 ms" in text
    assert "99.00% -> 98.50% (5 scans lost, 3 won)" in text
    assert "8.00 -> 3.00 million" in text and "62.5% saved" in text and "0.50 MiB" in text


def test_verbose_shows_the_tables(tmp_path, monkeypatch, capsys):
    options = {}

    def run(demo):
        options.update(vars(demo))
        return "summary"

    monkeypatch.setattr(demo_module, "run", run)
    assert cli.main(["demo", "--verbose", "--out", str(tmp_path)]) == 0
    assert options["verbose"] and options["progress"] and capsys.readouterr().out == "summary\n"


def checkpoint(path, keys):
    save_file({key: torch.zeros(2) for key in keys}, path)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet10t", "--pattern", "5:4"], "1 <= N <= M"),
        (["resnet10t", "--checkpoint", "missing.safetensors"], "there is no checkpoint missing.safetensors"),
        (["resnet10t", "--checkpoint", "truncated.safetensors"], "cannot be read as a checkpoint"),
        (["resnet10t", "--checkpoint", "pickled.pt"], "cannot be read as a checkpoint"),
        (["resnet10t", "--checkpoint", "other.safetensors"], "does not fit the model"),
        (["no_such_model"], "timm has no model 'no_such_model'"),
        (["resnet10t", "--tome-r", "8"], "no attention block"),
        (["resnet10t", "--device", "cuda:9"], "cannot be used"),
    ],
)
def test_errors_are_one_line_and_exit_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = checkpoint(tmp_path / "other.safetensors", ["a", "b"]).read_bytes()
    (tmp_path / "truncated.safetensors").write_bytes(whole[:-5])
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "pickled.pt")  # a module, not a state dict
    assert cli.main(["audit", *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("mpcompile: ") and "Traceback" not in error


@pytest.mark.parametrize("arguments", [["explain"], ["demo", "--threads", "0"], ["bake"], []])
def test_usage_errors_exit_2(arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_help_shows_an_example(capsys):
    for job in cli.COMMANDS:
        with pytest.raises(SystemExit) as caught:
            cli.main([job, "--help"])
        assert caught.value.code == 0
        assert f"example:\n  mpcompile {job}" in capsys.readouterr().out
