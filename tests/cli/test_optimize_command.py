"""``mpcompile optimize``: its files, its page, and bad input."""

import json

import pytest
import torch

import mpcompile
from mpcompile.cli import main
from mpcompile.cli.commands.optimize import milliseconds, share
from mpcompile.io.ownership import is_ours
from mpcompile.optimization import builds
from mpcompile.optimization.numbers import space
from tests.support.helpers import labelled_images

MODELS = """
import torch
from timm.models.vision_transformer import VisionTransformer


def vit():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=3).eval()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return labelled_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def command(folder, tmp_path, monkeypatch):
    """Search on a few images; builds run as they are, three times."""
    monkeypatch.setattr(space, "REDUCTIONS", (0.3,))
    monkeypatch.setattr(builds, "MAX_ROUNDS", 3)
    monkeypatch.setattr(builds, "MIN_ROUNDS", 3)
    monkeypatch.setattr("mpcompile.optimization.runner.compiled_with", lambda module, backend: module)
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    made = ["optimize", "models.py:vit", "--input-size", "3", "32", "32", "--images", str(folder / "train")]
    made += ["--max-drop", "40%", "--confidence", "50%", "--runtimes", "torch", "--allow", "tokens", "--quiet"]
    return [*made, "--out", "fast.mpc"]


def test_the_artifact_its_runner_the_page_and_the_json_are_written(command, tmp_path, capsys):
    assert main([*command, "--json", "found.json", "--report", "page.html"]) == 0
    text = capsys.readouterr().out
    assert "mpcompile.load_runner('fast.mpc')" in text and "verdict" in text
    x = torch.randn(1, 3, 32, 32)
    gm = mpcompile.load("fast.mpc").eval()
    torch.testing.assert_close(mpcompile.load_runner("fast.mpc")(x), gm(x))
    assert gm.plan.provenance["optimized"]["max_drop"] == 0.4
    assert gm.plan.provenance["model"].endswith("models.py:vit")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["confidence"] == 0.5 and any(entry["verdict"] == "chosen" for entry in found["entries"])
    page = (tmp_path / "page.html").read_text()
    assert ">Frontier</h2>" in page and "<circle" in page and "points of top-1" in page
    names = ("fast.mpc", "fast.runner.json", "found.json", "page.html")
    assert all(is_ours(tmp_path / name) for name in names)
    assert main(["report", "fast.mpc", "--optimize", "found.json", "--out", "again.html"]) == 0
    assert "<circle" in (tmp_path / "again.html").read_text()
    assert main([*command, "--json", "found.json"]) == 0  # its own files are replaced


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-drop", "0"], "max_drop is not a share"),
        (["--max-drop", "1%", "--confidence", ".99"], "too few images to show a drop of at most 1.00%"),
        (["--images", "nowhere"], "nowhere"),
        (["--validation", "nowhere"], "nowhere"),
        (["--minutes", "0"], "minutes is out of range"),
        (["--latency", "0ms"], "latency is out of range"),
        (["--latency", "0.000001ms"], "cannot be reached with a drop of at most 40.00%"),
        (["--report", "page.txt"], ".html"),
        (["--out", "missing/fast.mpc"], "missing"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command, more, message, tmp_path, capsys):
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    if "cannot be reached" not in message:  # the best build so far is kept in that case
        assert not (tmp_path / "fast.mpc").exists()


def test_random_weights_have_no_accuracy_to_keep(folder, capsys):
    arguments = ["optimize", "resnet10t", "--images", str(folder / "train"), "--out", "fast.mpc", "--quiet"]
    assert main(arguments) == 2
    assert "the weights are random" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), (".02", 0.02), ("0.5%", 0.005)])
def test_shares_are_numbers_or_percentages(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("40ms", 40), ("0.04s", 40), ("40", 40)])
def test_times_are_milliseconds_unless_they_say_otherwise(text, value):
    assert milliseconds(text) == pytest.approx(value)
