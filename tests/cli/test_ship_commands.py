"""compile, export, audit of an artifact, YAML configs, --json, --quiet and --verbose: through the command line."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mpcompile
from mpcompile import Config, Pipeline, cli, export, transform
from mpcompile.cli.options import config_of
from mpcompile.errors import ConfigError, GraphError
from mpcompile.io.ownership import sign
from mpcompile.passes.mask import Mask
from mpcompile.sources import timm_models
from tests.support.helpers import convolutional, images, relative, tiny_created, tiny_vit

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"  # not timm's: see small_model()


@pytest.fixture(scope="module", autouse=True)
def small_model():
    """Models that commands create by name are two blocks deep."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_models, "create", tiny_created)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, a few images, a config."""
    path = tmp_path_factory.mktemp("ship")
    save_file(tiny_created().state_dict(), path / "dense.safetensors")
    (path / "images").mkdir()
    for number in range(3):
        Image.effect_noise((40, 36), 60 + 20 * number).convert("RGB").save(path / "images" / f"{number}.png")
    (path / "config.yaml").write_text("pattern: 4:8\ntome_r: 3\nexclude: [stem, head]\n")
    return path


@pytest.fixture(scope="module")
def pruned(folder):
    """The artifact that `compile` makes from them."""
    arguments = ["compile", MODEL, "--checkpoint", str(folder / "dense.safetensors"), "--quiet"]
    arguments += ["--images", str(folder / "images"), "--config", str(folder / "config.yaml")]
    arguments += ["--json", str(folder / "plan.json"), "--out", str(folder / "pruned.mpc")]
    assert cli.main(arguments) == 0
    return folder / "pruned.mpc"


def test_compile_saves_the_model_that_it_reports(folder, pruned):
    gm = mpcompile.load(pruned)
    assert gm.plan.to_dict() == json.loads((folder / "plan.json").read_text())
    assert gm.plan.config["pattern"] == "4:8" and gm.plan.config["tome_r"] == 3 and len(gm.plan.masked) == 8
    found = gm.plan.provenance
    assert found["model"] == MODEL and found["calibration_images"] == 3 and found["data"]["input_size"] == [3, 32, 32]
    assert found["weights"]["file"] == "dense.safetensors" and len(found["weights"]["sha256"]) == 64
    assert found["versions"]["torch"] == torch.__version__


def test_dense_masked_loads_into_plain_timm(folder, pruned, tmp_path, capsys):
    assert cli.main(["export", str(pruned), "--format", "dense-masked", "--out", str(tmp_path / "w.safetensors")]) == 0
    assert "dense-masked" in capsys.readouterr().out
    state = load_file(tmp_path / "w.safetensors")
    tiny_created().load_state_dict(state)  # strict
    assert cli.main(["verify", str(tmp_path / "w.safetensors"), "--pattern", "4:8", "--only", "blocks.*"]) == 0
    arguments = ["compile", MODEL, "--checkpoint", str(folder / "dense.safetensors"), "--pattern", "4:8", "--quiet"]
    out = str(tmp_path / "again.safetensors")
    assert cli.main([*arguments, "--format", "dense-masked", "--out", out]) == 0
    assert load_file(out).keys() == state.keys()


@pytest.mark.parametrize("name", ["vit", "resnet18", "convnextv2_atto"])
def test_dense_state_computes_the_same(name):
    model, size = (tiny_vit(), 32) if name == "vit" else (convolutional(name), 64)
    x = images(2, size)
    if name == "vit":
        gm = transform(model, x, Config(pattern="2:4"), [x])  # permuted and refitted
    else:
        gm = transform(model, x, Config(pattern="2:4"), pipeline=Pipeline([Mask()]))
    twin = tiny_vit() if name == "vit" else convolutional(name)
    twin.load_state_dict(export.dense_state(gm))
    with torch.no_grad():
        assert relative(twin(x), gm.eval()(x)) < 1e-5
    with pytest.raises(GraphError, match="lowered module has no dense weights"):
        export.dense_state(mpcompile.lower(gm, x, Config(engine="reference")))


@pytest.mark.parametrize("engine", ["dense", "reference"])
def test_pt2_runs_in_a_fresh_process(engine, pruned, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    arguments = ["export", str(pruned), "--format", "pt2", "--engine", engine, "--dynamic-batch", "--json", "-"]
    assert cli.main([*arguments, "--out", str(out), "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["difference"] < 1e-5 and found["bytes"] == out.stat().st_size
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    save_file({"x": x}, tmp_path / "x")
    needs = "" if engine == "dense" else "import mpcompile; "
    code = (
        f"import torch; {needs}from safetensors.torch import load_file, save_file\n"
        f"y = torch.export.load({str(out)!r}).module()(load_file({str(tmp_path / 'x')!r})['x'])\n"
        f"save_file({{'y': y.detach().contiguous()}}, {str(tmp_path / 'y')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert relative(load_file(tmp_path / "y")["y"], mpcompile.load(pruned)(x)) < 1e-5


def test_a_program_that_computes_something_else_is_found(pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "run_exported", lambda *_: torch.zeros(1, 10))
    arguments = ["export", str(pruned), "--format", "pt2", "--engine", "dense", "--out", str(tmp_path / "m.pt2")]
    assert cli.main(arguments) == 1
    assert "differs by 1.0e+00" in capsys.readouterr().out


def test_onnx_names_what_is_missing(pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["export", str(pruned), "--format", "onnx", "--out", str(tmp_path / "m.onnx")]) == 2
    assert "ONNX needs the package onnx and onnxscript. Run pip install 'mpcompile[onnx]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_onnx_computes_the_same(tmp_path):
    x = images(2)
    gm = transform(tiny_vit(), x, Config(pattern="2:4", tome_r=2))
    export.save_onnx(gm, x, tmp_path / "m.onnx", dynamic_batch=True)
    with torch.no_grad():
        for batch in (x, images(3, seed=4)):
            assert relative(export.run_exported(tmp_path / "m.onnx", "onnx", batch), gm(batch)) < 1e-4


def test_an_export_that_fails_leaves_the_old_file(pruned, tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.pt2"
    with out.open("wb") as file:
        np.savez(file, old=1)
    sign(out)  # like an earlier export
    old = out.read_bytes()

    def full(program, path):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", full)
    arguments = ["export", str(pruned), "--format", "pt2", "--engine", "dense", "--out"]
    assert cli.main([*arguments, str(out)]) == 2
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == old and list(tmp_path.iterdir()) == [out]
    assert cli.main([*arguments, str(tmp_path / "no" / "m.pt2")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_audit_of_an_artifact_can_be_recorded_in_it(folder, pruned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    copy = tmp_path / "copy.mpc"
    copy.write_bytes(pruned.read_bytes())
    arguments = ["audit", MODEL, "--checkpoint", str(folder / "dense.safetensors"), "--artifact", str(copy), "--quiet"]
    arguments += ["--images", str(folder / "images"), "--rounds", "0", "--record", "--json", str(tmp_path / "a.json")]
    assert cli.main(arguments) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert rows[-1]["macs"] < 0.6 * rows[0]["macs"] and rows[-1]["samples"] == 3 and rows[-1]["agree"] is not None
    gm = mpcompile.load(copy)
    assert gm.plan.figures["rows"] == rows
    assert all(torch.equal(a, b) for a, b in zip(gm.parameters(), mpcompile.load(pruned).parameters(), strict=True))
    assert cli.main(["audit", MODEL, "--record"]) == 2
    assert "--record needs --artifact" in capsys.readouterr().err


# --- Options that commands share ---


def parsed(*arguments):
    return config_of(cli.parser().parse_args(["compile", "vit", "--out", "x", *arguments]))


def test_options_go_before_the_file_and_the_file_before_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("pattern: 8:16\ntome_r: [3, 2, 1]\nfrozen: true\nscore: wanda\n")
    assert parsed() == Config()
    assert parsed("--config", str(path)) == Config(pattern="8:16", tome_r=(3, 2, 1), frozen=True, score="wanda")
    typed = parsed("--config", str(path), "--pattern", "2:4", "--tome-r", "5", "--no-restore", "--no-permute")
    assert typed == Config(pattern="2:4", tome_r=5, frozen=True, score="wanda", restore=False, permute=False)
    audit = cli.parser().parse_args(["audit", "vit"])
    assert config_of(audit).score == "magnitude"  # a default of this command
    assert config_of(cli.parser().parse_args(["audit", "vit", "--config", str(path)])).score == "wanda"


@pytest.mark.parametrize("text", ["2:4", '"2:4"', "12:16", "1:2", "8:32", "dense", "31:32"])
def test_patterns_in_yaml_need_no_quotes(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"pattern: {text}\n")
    assert parsed("--config", str(tmp_path / "c.yaml")).pattern == text.strip('"')


def test_every_field_has_an_option():
    """The same fields in Python, YAML and on the command line."""
    arguments = ["--tome-schedule", "linear", "--no-proportional", "--include", "a", "b", "--mac-reduction", "0.3"]
    arguments += ["--exclude", "--prefix-tokens", "2", "--engine", "cpu", "--permute", "--frozen", "--patterns", "1:4"]
    arguments += ["--pattern", "1:4", "--tome-r", "2", "--score", "obs", "--no-restore"]
    arguments += ["--outputs", "logits", "pooler*", "--no-skip-dead-tokens", "--tome-method", "tome"]
    arguments_of_layers = ["--pattern", "1:4", "--layer-patterns", "fc=2:4", "*=dense"]
    values = ("1:4", 0.3, ("1:4",), 2, "linear", None, False, "obs", True, False, "cpu", (), ("a", "b"), 2, True)
    values += (("logits", "pooler*"), False, "tome", ())
    assert len(values) == len(dataclasses.fields(Config))
    expected = Config(*values)
    assert expected.outputs == ("logits", "pooler*")
    assert parsed(*arguments) == expected
    assert parsed(*arguments_of_layers).layer_patterns == ("fc=2:4", "*=dense")
    assert parsed("--tome-r", "auto", "--tome-reduction", "0.3").tome_reduction == 0.3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("patern: 2:4", "did you mean 'pattern'"),
        ("pattern: 5:4", "cannot be met"),
        ("tome_r: x", "has no such value"),
        ("- 1", "is not a config.*found a list"),
        ("a: [", "config .*c.yaml is not YAML.*line 1"),
        ("\x00", "is not YAML"),
        (None, "cannot read the config.*No such file"),
    ],
)
def test_bad_configs_are_explained(text, message, tmp_path):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        parsed("--config", str(tmp_path / "c.yaml"))


def test_an_empty_config_changes_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing yet\n")
    assert parsed("--config", str(tmp_path / "c.yaml")) == Config()


def test_json_alone_on_standard_output(pruned, capsys):
    assert cli.main(["verify", str(pruned), "--json", "-"]) == 0
    assert all(entry["ok"] for entry in json.loads(capsys.readouterr().out).values())


def test_verbose_shows_where_an_error_comes_from(capsys):
    for flag, shown in (("--verbose", True), ("--quiet", False)):
        assert cli.main(["verify", "none.mpc", flag]) == 2
        error = capsys.readouterr().err
        assert ("Traceback" in error) is shown and "mpcompile: " in error
    with pytest.raises(SystemExit):
        cli.main(["verify", "none.mpc", "--quiet", "--verbose"])


def test_help_of_every_command_shows_examples_that_parse(capsys):
    import shlex

    for job in cli.COMMANDS:
        with pytest.raises(SystemExit):
            cli.main([job, "--help"])
        text = capsys.readouterr().out
        assert "exit status: 0 done, 1" in text
        examples = [line.strip() for line in text.split("example:\n")[1].splitlines() if line.startswith("  mpcompile")]
        assert examples
        for example in examples:
            assert cli.parser().parse_args(shlex.split(example)[1:]).job == job
