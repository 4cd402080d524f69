"""Documentation that runs: examples in docstrings, code on pages, and a reference with every public name."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import mpcompile
from tests.support.folders import LABELS, vit_folder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = [
    info.name
    for info in pkgutil.walk_packages(mpcompile.__path__, "mpcompile.")
    if not info.name.endswith("__main__") and ".gluon." not in info.name  # kernels: nothing to run on a CPU
]
# Modules of mathematics, whose functions are explained by examples -> the least number of them.
EXAMPLES = {
    "pruning.damage": 1,
    "pruning.edge_budget": 1,
    "pruning.knapsack": 1,
    "rmt.analysis": 5,
    "rmt.edges": 1,
    "rmt.fitting": 1,
    "rmt.law": 1,
    "rmt.spikes": 1,
}


def borrowed(module: object, test: doctest.DocTest) -> bool:
    """Return True if the docstring is that of a wrapped function of torch."""
    inner = test.name.removeprefix(getattr(module, "__name__", "")).lstrip(".").partition(".")[0]
    return (
        hasattr(getattr(module, inner, None), "__wrapped__")
        and "torch" in getattr(module, inner).__wrapped__.__module__
    )


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = importlib.import_module(name)
    given = {"torch": torch, "nn": nn, "mpcompile": mpcompile}
    finder = doctest.DocTestFinder(exclude_empty=True)
    tests = [test for test in finder.find(module, extraglobs=given) if test.examples and not borrowed(module, test)]
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)
    assert runner.tries >= EXAMPLES.get(name.removeprefix("mpcompile."), 0)


def blocks(path: Path) -> list[str]:
    """Python blocks of a page that are to run."""
    return [code for skipped, code in BLOCK.findall(path.read_text()) if not skipped]


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_on_pages_runs(path, tmp_path, monkeypatch):
    """Blocks run in order, in one namespace that has the model and the images that the text assumes.

    Dense builds, which pages make only for comparison, are traced but not compiled; our backend compiles. A transformer
    has two blocks even where a page does not ask for fewer than twelve.
    """
    monkeypatch.chdir(tmp_path)
    compiler = torch.compile

    def traced(model, *, backend="inductor", options=None, **how):
        if backend == "inductor":
            return compiler(model, backend="eager", **how)
        return compiler(model, backend=backend, options=options, **how)

    created = timm.create_model
    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(timm, "create_model", lambda name, **options: created(name, **{"depth": 2, **options}))
    if path.name == "sources.md":
        _folders(tmp_path)
    torch.manual_seed(0)
    images = torch.randn(16, 3, 224, 224)
    given = {
        "model": timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=4).eval(),
        "images": images,
        "labels": torch.arange(16) % 4,
        "batches": images.split(4),
        "calibration": images.split(4),
        "torch": torch,
        "mpcompile": mpcompile,
    }
    for code in blocks(path):
        exec(compile(code, str(path), "exec"), given)


def _folders(place: Path) -> None:
    """Write the folders that docs/sources.md assumes: a ViT of transformers, and images of its classes."""
    vit_folder(place / "vit")
    for number, name in enumerate(LABELS):
        (place / "photos" / name).mkdir(parents=True)
        Image.effect_noise((48, 40), 40 + 20 * number).convert("RGB").save(place / "photos" / name / "0.png")


def test_the_pages_have_code():
    assert sum(len(blocks(path)) for path in PAGES) > 15


@pytest.mark.parametrize("name", mpcompile.__all__)
def test_every_public_name_is_in_the_reference_with_an_example(name):
    reference = "".join(path.read_text() for path in (ROOT / "docs/reference").glob("*.md"))
    assert f"::: mpcompile.{name}\n" in reference
    assert ">>>" in (inspect.getdoc(getattr(mpcompile, name)) or ""), f"mpcompile.{name} has no example"
