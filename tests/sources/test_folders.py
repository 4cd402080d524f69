"""Folders with something wrong: each problem is named in one line."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import mpcompile
from mpcompile.errors import ArtifactError, ConfigError, InputError, MPCompileError
from tests.support.folders import edit_config, timm_folder, vit_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return vit_folder(tmp_path_factory.mktemp("made") / "vit"), timm_folder(tmp_path_factory.mktemp("made") / "resnet")


@pytest.fixture
def vit(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "vit")


@pytest.fixture
def resnet(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "resnet")


def refused(path, kind=MPCompileError, **options):
    with pytest.raises(kind) as caught:
        mpcompile.load_model(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_architecture_that_transformers_does_not_know(vit):
    import transformers

    edit_config(vit, architectures=["ViTOfTomorrow"])
    text = refused(vit, ConfigError)
    assert "ViTOfTomorrow" in text and f"transformers {transformers.__version__}" in text
    edit_config(vit, architectures=["ViTImageProcessor"])
    assert "not a model of transformers" in refused(vit, ConfigError)


@pytest.mark.parametrize("names", [None, [], "ViTForImageClassification", [3]])
def test_a_configuration_without_an_architecture(names, vit):
    edit_config(vit, architectures=names)
    assert "names no architecture" in refused(vit, ConfigError)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"vit"'])
def test_a_configuration_that_is_none(text, vit):
    (vit / "config.json").write_text(text)
    assert "config.json" in refused(vit, ArtifactError)


def test_code_of_a_folder_is_not_run(vit, tmp_path):
    (vit / "modeling.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(vit, auto_map={"AutoModelForImageClassification": "modeling.Mine"})
    text = refused(vit, InputError)
    assert "trust_remote_code" in text and "modeling.Mine" in text
    assert not (tmp_path / "ran").exists()


def test_code_of_an_image_processor_is_not_run(vit, tmp_path):
    (vit / "processing.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    path = vit / "preprocessor_config.json"
    known = json.loads(path.read_text())
    path.write_text(
        json.dumps({**known, "auto_map": {"AutoImageProcessor": "processing.Mine"}, "image_processor_type": "Mine"})
    )
    loaded = mpcompile.load_model(vit)
    assert "its image processor cannot be read" in loaded.summary() and not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_named(vit):
    state = load_file(vit / "model.safetensors")
    meta = {"format": "pt"}

    def save(**changes):
        changed = {**state, **changes}
        save_file({k: v for k, v in changed.items() if v is not None}, vit / "model.safetensors", meta)

    save(**{"classifier.weight": None})
    assert "also classifier.weight" in refused(vit, ArtifactError)
    save(**{"classifier.wight": torch.ones(1)})
    assert "classifier.wight" in refused(vit, ArtifactError)
    save(**{"classifier.weight": torch.ones(5, 32)})
    text = refused(vit, ArtifactError)
    assert "classifier.weight of shape (3, 32)" in text and "(5, 32)" in text


def test_weights_of_a_timm_folder_that_do_not_fit_are_named(resnet):
    state = load_file(resnet / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "fc.weight"}, resnet / "model.safetensors")
    assert "fc.weight" in refused(resnet)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_damaged_and_missing_weights(kind, request):
    path = request.getfixturevalue(kind)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert str(path) in refused(path)
    file.unlink()
    assert "has no weights" in refused(path, ArtifactError)


def test_pickled_weights_hold_only_tensors(vit):
    state = load_file(vit / "model.safetensors")
    (vit / "model.safetensors").unlink()
    torch.save(state, vit / "pytorch_model.bin")
    loaded = mpcompile.load_model(vit)
    assert loaded.weights["file"] == "pytorch_model.bin"
    assert torch.equal(loaded.model.state_dict()["classifier.weight"], state["classifier.weight"])
    torch.save({**state, "more": Hostile()}, vit / "pytorch_model.bin")
    assert "cannot be read" in refused(vit, ArtifactError)


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_weights_in_several_files(vit):
    state = load_file(vit / "model.safetensors")
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, vit / file, {"format": "pt"})
    index = {name: file for file, held in parts.items() for name in held}
    (vit / "model.safetensors").unlink()
    (vit / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    loaded = mpcompile.load_model(vit)
    assert sorted(loaded.weights["shards"]) == sorted(parts)
    (vit / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refused(vit, ArtifactError)
    index["classifier.weight"] = "../elsewhere.safetensors"
    (vit / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert "is not an index of weights" in refused(vit, ArtifactError)


def test_a_folder_without_preprocessing_says_what_is_assumed(vit):
    (vit / "preprocessor_config.json").unlink()
    loaded = mpcompile.load_model(vit)
    assert loaded.data["input_size"] == [3, 32, 32] and "no preprocessor_config.json" in loaded.summary()


def test_an_image_processor_of_another_size_gives_way_to_the_model(vit):
    path = vit / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"height": 48, "width": 48}}))
    loaded = mpcompile.load_model(vit)
    assert loaded.data["input_size"] == [3, 32, 32] and "makes 3x48x48, but the model takes 3x32x32" in loaded.summary()


def test_transformers_is_an_extra(vit, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "mpcompile[hub]" in refused(vit, ConfigError)


def test_models_of_text_and_images_are_refused_with_the_next_step(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    towers = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {**towers, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**towers, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    assert "architecture=CLIPVisionModel" in refused(tmp_path / "clip", ConfigError)


def test_quantized_weights_are_refused(vit):
    edit_config(vit, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert "quantized" in refused(vit, InputError)
