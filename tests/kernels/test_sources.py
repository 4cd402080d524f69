"""Digests of sources, and names of modules, cover every folder of the kernels."""

import ast
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpcompile import backend, kernels
from mpcompile.kernels.nm_linear.gpu import build, launch, tiles

KERNELS = Path(kernels.__file__).parent
GLUON = KERNELS / "nm_linear/gluon"


def _imported(path: Path) -> set[Path]:
    """The files in gluon/ that a file there imports, directly or not, and the file itself."""
    files = {path}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpcompile.kernels.nm_linear.gluon"):
            modules = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
            for name in {module.partition(".gluon.")[2].split(".")[0] for module in modules} - {""}:
                files |= _imported(GLUON / f"{name}.py")
    return files


@pytest.mark.parametrize("kernel", tiles.MODULES)
def test_a_digest_covers_every_file_that_a_kernel_imports(kernel: str) -> None:
    module = importlib.util.find_spec(tiles.MODULES[kernel])
    assert module is not None and module.origin is not None
    files = build.kernel_files(kernel)
    assert {path.resolve() for path in files} == {path.resolve() for path in _imported(Path(module.origin))}


def test_every_gluon_file_is_in_a_digest() -> None:
    covered = {path.name for kernel in tiles.MODULES for path in build.kernel_files(kernel)}
    assert covered == {path.name for path in GLUON.rglob("*.py")} - {"__init__.py"}


def test_kernels_are_found_by_their_names() -> None:
    assert {tile.kernel for tile in tiles.TILES} | set(launch.KERNELS.values()) <= set(tiles.MODULES)
    assert all(tiles.tiles_of(name) for name in tiles.MODULES)


def test_code_cached_by_torch_depends_on_every_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(KERNELS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(backend, "ops", SimpleNamespace(__file__=str(copy / "ops.py")))
    files = sorted(copy.rglob("*.py"))
    assert {path.parent.name for path in files} >= {"kernels", "nm_linear", "cpu", "gpu", "gluon", "token_merge"}
    tags = [backend._cache_tag.__wrapped__()]
    for path in files:
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        tags.append(backend._cache_tag.__wrapped__())
    assert len(set(tags)) == len(files) + 1
