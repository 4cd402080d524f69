"""Models made by a user's function: found, called with arguments, and every failure in one line with its place."""

import sys

import pytest
import torch

import mpcompile
from mpcompile.errors import ConfigError, InputError, MPCompileError

FILE = """
import torch
from beside import width
from torch import nn

print("making models")

class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.head = nn.Linear(width, classes)
    def forward(self, image):
        return self.head(self.stem(image).mean((2, 3)))

def build(classes=3, wide=False):
    return Net(classes)

def with_inputs():
    return Net(), {"image": torch.zeros(2, 3, 48, 40)}

def half(): return Net().half()
def nothing(): return {"model": 1}
def needy(path): return Net()
def failing(): return build(1 / 0)
def leaving(): raise SystemExit(3)
ready_made = Net(5)
number = 3
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    (tmp_path / "package").mkdir()
    for folder in (tmp_path, tmp_path / "package"):
        (folder / "mine.py").write_text(FILE)
        (folder / "beside.py").write_text("width = 16\n")
    (tmp_path / "package" / "__init__.py").write_text("")
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "beside", "package", "broken", "lost"):
            del sys.modules[name]


@pytest.mark.parametrize(
    "name", ["mine:build", "mine.py:build", "package.mine:build", "package/mine.py:build", "mine:Net"]
)
def test_functions_are_found(name, capsys):
    loaded = mpcompile.load_model(name, classes=7)
    assert loaded.kind == "function" and loaded.num_classes == 7 and not loaded.model.training
    assert loaded.model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    heard = capsys.readouterr()
    assert heard.out == "" and "making models" in heard.err  # stdout has results alone


def test_a_model_itself_and_a_model_with_inputs():
    assert mpcompile.load_model("mine.py:ready_made").num_classes == 5
    loaded = mpcompile.load_model("mine.py:with_inputs")
    assert loaded.input_name == "image" and loaded.data["input_size"] == [3, 48, 40]
    inputs = loaded.example_inputs(4)
    assert inputs["image"].shape == (4, 3, 48, 40) and loaded.model(**inputs).shape == (4, 3)


def test_what_is_assumed_is_said():
    line = mpcompile.load_model("mine.py:build").summary()
    assert "preprocessing is not known" in line and "image size is not known: 3x224x224 is assumed" in line
    assert mpcompile.load_model("mine.py:build", input_size=(3, 64, 64)).data["input_size"] == [3, 64, 64]
    assert "converted from float16" in mpcompile.load_model("mine.py:half").summary()


def test_models_of_torchvision():
    loaded = mpcompile.load_model("torchvision.models:resnet18", num_classes=None)
    assert loaded.num_classes == 1000
    size = mpcompile.load_model("torchvision.models:VisionTransformer", **TINY).data["input_size"]
    assert size == [3, 32, 32]


TINY = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 32,
    "mlp_dim": 32,
}


def test_a_checkpoint_is_loaded_into_the_model(tmp_path):
    state = {
        name: torch.ones_like(value) for name, value in mpcompile.load_model("mine.py:build").model.state_dict().items()
    }
    torch.save(state, tmp_path / "ones.pt")
    loaded = mpcompile.load_model("mine.py:build", checkpoint="ones.pt")
    assert bool((loaded.model.head.weight == 1).all()) and loaded.weights["file"] == "ones.pt"


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "parts"),
    [
        ("mine.py:bild", {}, ConfigError, ("no function bild", "build, ")),
        ("mine.py:number", {}, ConfigError, ("is no function", "found a int")),
        ("mine.py:build", {"clases": 3}, ConfigError, ("clases", "classes=3, wide=False")),
        ("mine.py:needy", {}, ConfigError, ("'path'", "--model-args NAME=VALUE")),
        ("mine.py:nothing", {}, InputError, ("returns no module", "found a dict")),
        ("mine.py:failing", {}, InputError, ("ZeroDivisionError", "def failing(): return build(1 / 0)")),
        ("mine.py:leaving", {}, InputError, ("mine.py:leaving fails", "SystemExit")),
        ("broken.py:f", {}, InputError, ("broken.py cannot be imported", "NameError", "broken.py, line 2: y = x")),
        ("broken:f", {}, InputError, ("broken cannot be imported", "NameError", "broken.py, line 2")),
        ("syntax.py:f", {}, InputError, ("syntax.py cannot be imported", "SyntaxError", "syntax.py, line 1")),
        ("lost.py:f", {}, InputError, ("lost.py cannot be imported", "No module named 'nowhere'", "lost.py, line 1")),
        ("gone.py:f", {}, InputError, ("there is no file gone.py",)),
        ("gone:f", {}, InputError, ("there is no module gone", "working directory")),
        ("package.gone:f", {}, InputError, ("there is no module package.gone",)),
    ],
)
def test_failures_are_one_line(name, arguments, kind, parts, place):
    (place / "broken.py").write_text("def f(): pass\ny = x\n")
    (place / "syntax.py").write_text("def f(:\n")
    (place / "lost.py").write_text("import nowhere\n")
    with pytest.raises(MPCompileError) as caught:
        mpcompile.load_model(name, **arguments)
    text = str(caught.value)
    assert type(caught.value) is kind and "\n" not in text
    for part in parts:
        assert part in text


def test_a_file_that_is_named_like_a_library_does_not_replace_it(place):
    import timm

    (place / "timm.py").write_text("import torch\ndef f(): return torch.nn.Linear(2, 2)\n")
    assert isinstance(mpcompile.load_model("timm.py:f").model, torch.nn.Linear)
    assert sys.modules["timm"] is timm
