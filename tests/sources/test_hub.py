"""Repositories of the hub, from the library's cache; nothing is downloaded."""

import shutil
from typing import ClassVar

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

import mpcompile
from mpcompile.errors import InputError
from tests.support.folders import timm_folder, vit_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made")
    return {"vit": vit_folder(path / "vit"), "resnet": timm_folder(path / "resnet")}


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """The cache of a machine without a network, with two repositories."""
    for name, folder in made.items():
        place = tmp_path / f"models--org--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        shutil.copytree(folder, place / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(("name", "kind"), [("vit", "transformers"), ("resnet", "timm repository")])
def test_the_configuration_says_which_library_loads_a_repository(name, kind, cache):
    loaded = mpcompile.load_model(f"hf-hub:org/{name}")
    assert loaded.kind == kind and loaded.num_classes == 3 and loaded.class_names[1] == "dog" and not loaded.random
    assert loaded.weights == {"repository": f"org/{name}", "revision": COMMIT}
    assert f"org/{name} (0123456789ab)" in loaded.summary()


def test_a_revision_is_taken(cache):
    assert mpcompile.load_model(f"hf-hub:org/vit@{COMMIT}").kind == "transformers"
    with pytest.raises(InputError, match="is not in the cache, and HF_HUB_OFFLINE is set"):
        mpcompile.load_model(f"hf-hub:org/vit@{'f' * 40}")


def test_a_repository_that_is_not_in_the_cache(cache):
    with pytest.raises(InputError, match="hf-hub:org/none is not in the cache, and HF_HUB_OFFLINE is set"):
        mpcompile.load_model("hf-hub:org/none")


class Response:
    headers: ClassVar[dict] = {}
    status_code = 404
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: RepositoryNotFoundError("no", response=Response()), "there is none of that name, or it is private"),
        (lambda: GatedRepoError("no", response=Response()), "access to it has to be requested"),
        (lambda: ConnectionError("Name or service not known"), "is not in the cache, and the hub cannot be reached"),
        (lambda: ValueError("something else\nand more"), "cannot be downloaded: something else"),
    ],
)
def test_repositories_that_cannot_be_downloaded(error, message, monkeypatch):
    def fail(*_, **__):
        raise error()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(InputError, match=message):
        mpcompile.load_model("hf-hub:org/vit")


def test_names_that_are_none_of_a_repository(cache):
    with pytest.raises(InputError, match="this is not the name of a repository"):
        mpcompile.load_model("hf-hub:a/b/c/d")
