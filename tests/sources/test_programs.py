"""Exported programs as models: their inputs and batch, and files that this torch cannot read."""

import json
import zipfile

import pytest
import torch

import mpcompile
from mpcompile.errors import ArtifactError, ConfigError
from tests.support.helpers import tiny_vit

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A program of one batch size, and one of any, whose images have a keyword."""
    path = tmp_path_factory.mktemp("exported")
    torch.export.save(torch.export.export(tiny_vit(), (IMAGES,)), path / "fixed.pt2")
    free = {"x": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(tiny_vit(), (), {"x": IMAGES}, dynamic_shapes=free), path / "free.pt2")
    return path


def test_the_inputs_of_a_program(exported):
    expected = tiny_vit()(IMAGES)
    free = mpcompile.load_model(exported / "free.pt2")
    assert free.input_name == "x" and free.fixed_batch is None and free.data["input_size"] == [3, 32, 32]
    assert free.example_inputs(5)["x"].shape == (5, 3, 32, 32) and free.num_classes == 10
    torch.testing.assert_close(free.model(x=IMAGES), expected)
    fixed = mpcompile.load_model(exported / "fixed.pt2")
    assert fixed.input_name is None and fixed.fixed_batch == 2 and fixed.example_inputs(5).shape == (2, 3, 32, 32)
    torch.testing.assert_close(fixed.model(IMAGES), expected)
    assert "takes batches of 2 alone" in fixed.summary() and fixed.provenance()["weights"]["file"] == "fixed.pt2"


def rewritten(source, target, change):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def of_another_torch(name, content):
    if not name.endswith("models/model.json"):
        return content
    program = json.loads(content)
    return json.dumps({**program, "schema_version": {"major": 99, "minor": 0}, "torch_version": "9.1.0"})


@pytest.mark.parametrize("kind", ["newer", "cut", "text", "absent", "folder"])
def test_programs_that_cannot_be_read(kind, exported, tmp_path, caplog):
    path = tmp_path / "model.pt2"
    if kind == "newer":
        rewritten(exported / "fixed.pt2", path, of_another_torch)
    elif kind == "cut":
        path.write_bytes((exported / "fixed.pt2").read_bytes()[:-500])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ArtifactError) as caught:
        mpcompile.load_model(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text and not caplog.records
    if kind == "newer":
        assert (
            "one of torch 9.1.0: " in text
            and f"torch {torch.__version__}" in text
            and "export the model again" in text.lower()
        )


def test_options_that_a_program_does_not_take(exported):
    with pytest.raises(ConfigError, match="takes no arguments"):
        mpcompile.load_model(exported / "free.pt2", depth=3)
    with pytest.raises(ConfigError, match="num-classes does not apply"):
        mpcompile.load_model(exported / "free.pt2", num_classes=3)
