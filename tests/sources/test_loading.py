"""Names of models: which source each form means, and what every source tells about its model."""

import os

import pytest
import timm
import torch
from torch import nn

import mpcompile
from mpcompile.errors import ArtifactError, ConfigError, InputError
from mpcompile.sources.loaded import LoadedModel, ready
from mpcompile.sources.loading import is_weights, kind_of
from tests.support.folders import LABELS, timm_folder, vit_folder
from tests.support.helpers import tiny_vit


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("folders")
    vit_folder(path / "vit")
    timm_folder(path / "resnet10t")
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "timm"),
        ("vit", "folder"),
        ("resnet10t", "folder"),
        ("./anything", "folder"),
        ("resnet18", "timm"),
        ("local-dir:vit", "folder"),
        ("hf-hub:timm/resnet18", "hub"),
        ("hf-hub:a/b:c", "hub"),
        ("mine:build", "function"),
        ("package.module:build", "function"),
        ("../some where/mine.py:build", "function"),
        ("module:Class.method", "function"),
        ("exported.pt2", "program"),
        ("folder/exported.pt2", "program"),
    ],
)
def test_the_form_of_a_name_decides(name, kind, folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "resnet18").mkdir(exist_ok=True)  # a folder without config.json, such as an artifact's
    assert kind_of(name) == kind


def test_files_of_weights_are_no_models(folders, monkeypatch):
    monkeypatch.chdir(folders)
    gm = mpcompile.transform(tiny_vit(), torch.randn(2, 3, 32, 32), mpcompile.Config(pattern="2:4", score="magnitude"))
    mpcompile.save(gm, "pruned/")
    assert (
        is_weights("pruned") and is_weights("pruned/") and is_weights("vit/model.safetensors") and is_weights("a.pth")
    )
    assert not any(map(is_weights, ("vit", "vit/", "resnet10t", "resnet50", "mine.py:build", "hf-hub:a/b", "m.pt2")))


def test_a_folder_of_transformers(folders):
    loaded = mpcompile.load_model(folders / "vit")
    assert loaded.kind == "transformers" and loaded.input_name == "pixel_values" and not loaded.model.training
    assert tuple(loaded.class_names) == LABELS and loaded.num_classes == 3
    assert loaded.data == {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    inputs = loaded.example_inputs(2)
    assert list(inputs) == ["pixel_values"] and loaded.model(**inputs).logits.shape == (2, 3)
    line = loaded.summary()
    for part in ("ViTForImageClassification", "model.safetensors", "3x32x32 as pixel_values", "cat, dog, fox"):
        assert part in line
    assert "\n" not in line


def test_weights_in_half_precision_are_converted_and_the_line_says_so(tmp_path):
    from transformers import ViTForImageClassification

    model = ViTForImageClassification.from_pretrained(vit_folder(tmp_path / "vit"))
    model.half().save_pretrained(tmp_path / "half")
    loaded = mpcompile.load_model(tmp_path / "half")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert "weights converted from float16 to float32" in loaded.summary()


def test_a_folder_in_the_layout_of_timm(folders, monkeypatch):
    monkeypatch.chdir(folders)
    for name in ("resnet10t", "local-dir:resnet10t", "./resnet10t/"):  # timm has a model of that name, too
        loaded = mpcompile.load_model(name)
        assert loaded.kind == "timm folder" and tuple(loaded.class_names) == LABELS and not loaded.random
        assert loaded.data["input_size"] == [3, 64, 64] and loaded.data["std"] == [0.25] * 3
        with torch.no_grad():
            assert loaded.model(loaded.example_inputs(1)).shape == (1, 3)


def test_weights_of_folders_are_the_ones_in_their_files(folders):
    from safetensors.torch import load_file

    for name in ("vit", "resnet10t"):
        own = mpcompile.load_model(folders / name).model.state_dict()
        stored = load_file(folders / name / "model.safetensors")
        assert len(own) == len(stored)  # transformers renames some
        assert all(any(torch.equal(value, other) for other in stored.values()) for value in own.values())


def test_a_checkpoint_takes_the_place_of_a_folders_weights(folders, tmp_path):
    model = mpcompile.load_model(folders / "vit").model
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "zeros.pt")
    loaded = mpcompile.load_model(folders / "vit", checkpoint=tmp_path / "zeros.pt")
    assert not any(p.any() for p in loaded.model.parameters()) and loaded.weights["file"] == "zeros.pt"
    with pytest.raises(ArtifactError, match=r"model\.safetensors does not fit"):
        mpcompile.load_model(folders / "vit", checkpoint=folders / "resnet10t/model.safetensors")
    with pytest.raises(ArtifactError, match="does not fit the model"):
        mpcompile.load_model(folders / "resnet10t", checkpoint=tmp_path / "zeros.pt")


def test_a_timm_name():
    loaded = mpcompile.load_model("resnet10t", num_classes=4, input_size=(3, 96, 96))
    assert loaded.kind == "timm" and loaded.random and loaded.num_classes == 4
    assert loaded.example_inputs(1).shape == (1, 3, 96, 96) and loaded.weights == "random"
    given = mpcompile.load_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    assert len(given.model.blocks) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_model", "timm has no model 'no_such_model'.*A model is a timm name, a folder"),
        ("./no_such_folder", "there is no folder ./no_such_folder"),
        ("empty/", "the folder empty/ has no config.json"),
        ("vit/model.safetensors", "is a file, not a model"),
        ("no spaces here", "there is no model 'no spaces here'"),
        ("", "there is no model ''"),
    ],
)
def test_names_of_nothing(name, message, folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "empty").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=message):
        mpcompile.load_model(name)


def test_a_folder_without_config_does_not_hide_that_a_name_is_unknown(folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"timm has no model 'mine'.*The folder mine has no config\.json"):
        mpcompile.load_model("mine")


def test_options_that_a_source_does_not_take(folders, monkeypatch, tmp_path):
    vit = folders / "vit"
    with pytest.raises(ConfigError, match=r"number of classes .* is fixed"):
        mpcompile.load_model(vit, num_classes=5)
    with pytest.raises(ConfigError, match=r"does not take these arguments.*depth"):
        mpcompile.load_model(vit, depth=5)
    with pytest.raises(ConfigError, match="decides itself whether its weights are pretrained"):
        mpcompile.load_model("torch.nn:Identity", pretrained=True)


def test_models_elsewhere_are_moved_or_refused():
    with torch.device("meta"):
        model = timm.create_model("resnet10t")
    with pytest.raises(InputError, match="on the meta device, which have no values"):
        ready(LoadedModel(model, "mine:f", "function", "ResNet", "unknown"))


def test_batches_of_a_folder_of_images(folders, tmp_path):
    from PIL import Image

    for name in ("fox", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 36), "red").save(tmp_path / name / "0.png")
    (batch,) = mpcompile.load_model(folders / "vit").images(tmp_path)
    assert batch["labels"].tolist() == [0, 2] and batch["pixel_values"].shape == (2, 3, 32, 32)
    red = [(1 - 0.1) / 0.4, (0 - 0.2) / 0.5, (0 - 0.3) / 0.6]
    torch.testing.assert_close(batch["pixel_values"][0, :, 5, 5], torch.tensor(red))


def test_a_model_with_several_inputs_takes_no_image_files(tmp_path, monkeypatch):
    (tmp_path / "two.py").write_text(
        "import torch\n"
        "class Two(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = torch.nn.Linear(4, 4)\n"
        "    def forward(self, x, scale):\n        return self.a(x) * scale\n"
        "def build():\n    return Two(), {'x': torch.ones(2, 4), 'scale': torch.ones(1)}\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = mpcompile.load_model("two.py:build")
    assert not loaded.takes_images and isinstance(loaded.model, nn.Module)
    assert {k: tuple(v.shape) for k, v in loaded.example_inputs(8).items()} == {"x": (2, 4), "scale": (1,)}
    with pytest.raises(InputError, match="takes more than images"):
        loaded.images(tmp_path)


def test_paths_are_taken_as_they_are(folders):
    assert mpcompile.load_model(os.fspath(folders / "vit") + os.sep).num_classes == 3
