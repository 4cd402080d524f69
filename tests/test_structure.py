"""The structure of the tree: short files, small folders, one-way imports, no module hidden by a public function."""

import ast
from pathlib import Path

import pytest

import mpcompile

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".py", ".cpp", ".h")
ROOMS = ("mpcompile", "passes", "kernels", "tests", "bench")
LINES, FILES = 400, 12
# Room -> rooms that it may not import: science knows no pass, kernels know no graph, and nothing below knows commands.
FORBIDDEN = {
    "mpcompile/rmt": ("passes", "pipeline", "training", "cli"),
    "mpcompile/pruning": ("passes", "pipeline", "training", "cli"),
    "mpcompile/calibration": ("passes", "pipeline", "training", "cli"),
    "mpcompile/reconstruction": ("passes", "pipeline", "training", "cli"),
    "mpcompile/ir": ("passes", "pipeline", "training", "cli", "backend"),
    "mpcompile/data": ("passes", "pipeline", "training", "measure", "calibration", "cli"),
    "mpcompile/io": ("passes", "pipeline", "training", "cli", "kernels", "ir"),
    "mpcompile/measure": ("training", "cli"),
    "mpcompile/sources": ("passes", "pipeline", "training", "measure", "calibration", "capture", "ir", "cli"),
    "kernels": ("passes", "pipeline", "training", "cli", "ir", "capture", "backend"),
    "passes": ("training", "cli", "backend"),
}


def sources() -> list[Path]:
    """Every source file of the project, links not followed."""
    return [p for room in ROOMS for p in sorted((ROOT / room).rglob("*")) if p.suffix in SUFFIXES and p.is_file()]


def test_files_are_short():
    assert len(sources()) > 200
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > LINES} == {}


def test_rooms_are_small():
    files: dict[str, list[str]] = {}
    for path in sources():
        if path.name != "__init__.py":
            files.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path.name)
    assert {room: sorted(names) for room, names in files.items() if len(names) > FILES} == {}


def test_the_top_folder_holds_only_what_users_meet_first():
    loose = {path.name for path in (ROOT / "mpcompile").glob("*.py")}
    assert {"__init__.py", "config.py", "errors.py", "plan.py", "pipeline.py", "backend.py"} <= loose
    assert len(loose) <= FILES


@pytest.mark.parametrize("name", mpcompile.__all__)
def test_no_module_is_hidden_by_a_public_name(name):
    folder = ROOT / "mpcompile"
    assert not (folder / f"{name}.py").exists() and not (folder / name / "__init__.py").exists()


def imports(path: Path) -> set[str]:
    """Modules of mpcompile that a file imports, anywhere in it, type-checking blocks excepted."""
    names = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpcompile"):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("mpcompile")}
    return {name.removeprefix("mpcompile.") for name in names}


@pytest.mark.parametrize("room", FORBIDDEN)
def test_arrows_between_rooms_go_one_way(room):
    paths = sorted((ROOT / room).rglob("*.py"))
    assert any(name.startswith("errors.") for path in paths for name in imports(path))
    wrong = {
        path.relative_to(ROOT).as_posix(): sorted(bad)
        for path in paths
        if (bad := {name for name in imports(path) if name.split(".")[0] in FORBIDDEN[room]})
    }
    assert wrong == {}
