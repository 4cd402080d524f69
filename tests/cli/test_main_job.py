"""The command line: the main job for real, exit codes, and errors without a traceback."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mpcompile import Config, cli, transform
from mpcompile import backend as module
from mpcompile.cli import demo_job as demo_module
from mpcompile.io.ownership import is_ours
from mpcompile.measure.report import Report, Row
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
def test_demo_runs_and_its_second_run_is_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_module.Demo, "epochs", 3)
    command = ["demo", "--quick", "--quiet", "--seed", "3", "--out"]
    assert cli.main([*command, str(tmp_path / "first")]) == 0
    rows = [
        (r["name"], r["correct"], r["macs"]) for r in json.loads((tmp_path / "first/report.json").read_text())["rows"]
    ]

    class Enough(Exception):
        pass

    def audit(*args, **options):  # compiles the builds that the first run has measured
        raise Enough

    monkeypatch.setattr(demo_module, "audit", audit)
    with pytest.raises(Enough):  # the dense model comes from the cache
        cli.main([*command, str(tmp_path / "second")])
    first, second = (demo_module.mpcompile.load(tmp_path / name / "digits.mpc") for name in ("first", "second"))
    assert first.plan.masked
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    found = {name: (correct, macs) for name, correct, macs in rows if name != "dense bf16"}  # if there is any
    assert list(found) == [
        "dense eager",
        "dense compiled",
        "dense frozen",
        "transformed 2:4",
        "transformed",
        "... distilled",
        "compiled sparse",
    ]
    assert found["dense eager"][1] > 2 * found["compiled sparse"][1] * 0.99
    assert found["... distilled"][0] == found["compiled sparse"][0]  # compiled and eager agree on every scan
    text = capsys.readouterr().out
    heads = [line.split()[0] for line in text.splitlines()[2:]]
    assert heads == ["made", "accuracy", "work", "speed", "report", "artifact", "tables"]
    assert "8:16 masks in 8 of 10 layers" in text and str(tmp_path / "first/report.html") in text
    assert "blocks.0.attn.qkv" not in text  # tables are in the files
    made = {path.name for path in (tmp_path / "first").iterdir()}
    assert made >= {"digits.mpc", "report.html", "report.json", "plan.json", "analysis.json"}
    assert all(is_ours(tmp_path / "first" / name) for name in made)
    page = (tmp_path / "first/report.html").read_text()
    assert demo_module.TITLE in page and "held-out scan 1" in page and "after merge 2" in page
    assert page.count('class="none"') == 2  # certificates, and time per layer
    assert len(list((tmp_path / "cache" / "mpcompile").glob("*.safetensors"))) == 1


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


@pytest.mark.parametrize(("speedup", "word"), [(1.25, "faster"), (0.8, "slower")])
def test_the_summary_of_the_demo_reports_slower_builds(speedup, word, tmp_path):
    best = Row("dense frozen", latency_ms=8.0, baseline=True)
    rows = [
        Row("dense eager", correct=396, samples=400, macs=8_000_000, latency_ms=10.0, baseline=True),
        best,
        Row("dense bf16", latency_ms=1.0),  # another dtype is not a baseline
        Row("compiled sparse", correct=394, samples=400, lost=5, won=3, macs=3_000_000, latency_ms=8.0 / speedup,
            speedup=speedup),
    ]  # fmt: skip
    gm = transform(mlp(), torch.ones(2, 32), Config(pattern="2:4"))
    gm.plan.config["tome_r"] = 8
    (tmp_path / "digits.mpc").write_bytes(bytes(1 << 19))
    text = demo_module.summary(tmp_path, mlp(), Report(rows, {"dtype": "float32", "batch": 64}), gm.plan)
    assert f"{speedup:.2f}x, {word} than the best dense build" in text and "dense frozen 8.00 ms" in text
    assert "99.00% -> 98.50% on 400 held-out scans: -0.50 points (5 scans lost, 3 won)" in text
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
