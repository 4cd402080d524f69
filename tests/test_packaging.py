"""The contents of an installation, for every way to install: offline, built from a copy of the tree."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"mpcompile": "mpcompile", "passes": "mpcompile.passes", "kernels": "mpcompile.kernels"}
IS_SDIST = (ROOT / "PKG-INFO").is_file()  # a source archive carries no links
NOT_PACKAGED = {".md", ".so", ".o"}  # all other files in the rooms are part of the package, but for caches of Python


def package_files() -> dict[str, Path]:
    """Every file of the package: its name in a wheel -> its path in the tree."""
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*")):  # rglob enters no links
            inner = path.relative_to(ROOT / folder)
            linked = folder == "mpcompile" and inner.parts[0] in ROOMS
            cached = "__pycache__" in inner.parts  # another process may be writing there
            passed_over = linked or cached or path.suffix in NOT_PACKAGED or path.name.startswith(".")
            if path.is_file() and not passed_over:
                found[f"{package.replace('.', '/')}/{inner.as_posix()}"] = path
    return found


def copy_tree(target: Path) -> Path:
    """The tree as a checkout without links has it: on Windows, and in an unpacked source archive."""
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ROOMS:
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=skip)
    for name in ("passes", "kernels"):
        (target / "mpcompile" / name).unlink(missing_ok=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile"):
        shutil.copy(ROOT / name, target)
    return target


def run_python(code: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Call setuptools as pip does, without isolation. Importing torch fails, as it does when pip builds."""
    out.mkdir(parents=True, exist_ok=True)
    hide_torch = "import sys; sys.modules['torch'] = None; "
    call = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    return out / run_python(hide_torch + call, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def configured() -> Distribution:
    """The configuration as setuptools understands it."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        distribution = Distribution()
        distribution.parse_config_files([str(ROOT / "pyproject.toml")])
    finally:
        os.chdir(before)
    return distribution


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    base = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("wheel", copy_tree(base / "tree"), base / "out")) as wheel:
        return wheel.namelist()


def test_links_lead_to_the_rooms():
    for name in ("passes", "kernels"):
        link = ROOT / "mpcompile" / name
        if IS_SDIST:
            assert not link.exists()
        else:
            # on a file system without links, git writes the target into a plain file
            assert (os.readlink(link) if link.is_symlink() else link.read_text()) == f"../{name}"


def test_every_folder_is_a_listed_package(configured: Distribution):
    on_disk = {Path(name).parent.as_posix().replace("/", ".") for name in package_files() if name.endswith(".py")}
    assert set(configured.packages) == on_disk, "[tool.setuptools] packages in pyproject.toml has to list every folder"
    assert len(configured.packages) == len(on_disk)
    for package in on_disk:
        assert f"{package.replace('.', '/')}/__init__.py" in package_files()


def test_version_is_read_from_the_source(configured: Distribution):
    tree = ast.parse((ROOT / "mpcompile" / "_version.py").read_text(encoding="utf-8"))
    literals = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if [ast.unparse(target) for target in node.targets] == ["__version__"]
    ]
    assert literals == [configured.metadata.version]


def test_entry_points_lead_to_something(configured: Distribution):
    targets = [line.split("=")[1].strip() for lines in configured.entry_points.values() for line in lines]
    assert sorted(targets) == ["mpcompile.backend:mpsparse", "mpcompile.cli:main"]
    for target in targets:
        module, name = target.split(":")
        folder = ROOT / module.replace(".", "/")
        source = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        bound = {node.name for node in ast.parse(source.read_text(encoding="utf-8")).body if hasattr(node, "name")}
        assert name in bound, f"{source} defines no {name}"


def test_wheel_holds_each_file_once_and_no_bare_room(wheel_names: list[str]):
    content = [name for name in wheel_names if ".dist-info/" not in name]
    assert sorted(content) == sorted(package_files())
    assert {name.split("/")[0] for name in content} == {"mpcompile"}
    assert "mpcompile/py.typed" in content


def test_checkout_with_links_gives_the_same_wheel(wheel_names: list[str], tmp_path: Path):
    tree = copy_tree(tmp_path / "tree")
    for name in ("passes", "kernels"):
        (tree / "mpcompile" / name).symlink_to(f"../{name}")
    with zipfile.ZipFile(build("wheel", tree, tmp_path / "out")) as wheel:
        assert sorted(wheel.namelist()) == sorted(wheel_names)


def test_source_archive_gives_the_same_wheel(wheel_names: list[str], tmp_path: Path):
    with tarfile.open(build("sdist", copy_tree(tmp_path / "tree"), tmp_path)) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # absent before Python 3.10.12
        archive.extractall(tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert (source / "Makefile").is_file()
    with zipfile.ZipFile(build("wheel", source, tmp_path / "out")) as wheel:
        assert sorted(wheel.namelist()) == sorted(wheel_names)


def test_editable_install_maps_the_package_alone(tmp_path: Path):
    with zipfile.ZipFile(build("editable", copy_tree(tmp_path / "tree"), tmp_path / "out")) as wheel:
        (finder,) = [name for name in wheel.namelist() if name.endswith("_finder.py")]
        source = wheel.read(finder).decode()
    lines = [line for line in source.splitlines() if line.startswith("MAPPING")]
    mapping = ast.literal_eval(lines[0].split("=", 1)[1].strip())
    assert {name: Path(path).name for name, path in mapping.items()} == {v: k for k, v in ROOMS.items()}


@pytest.mark.parametrize("in_place_of_links", ["nothing", "text files"])
def test_rooms_import_without_links_and_uninstalled(in_place_of_links: str, tmp_path: Path):
    tree = copy_tree(tmp_path / "tree")
    if in_place_of_links == "text files":
        for name in ("passes", "kernels"):
            (tree / "mpcompile" / name).write_text(f"../{name}")
    code = "import mpcompile.passes as p, mpcompile.kernels.nm_linear as k; print(p.__file__, k.__file__, sep='\\n')"
    places = run_python(code, cwd=tmp_path, PYTHONPATH=str(tree)).splitlines()[-2:]
    assert [Path(place) for place in places] == [tree / "passes/__init__.py", tree / "kernels/nm_linear/__init__.py"]


def test_imports_are_declared(configured: Distribution):
    """Imports of the package are declared dependencies; those of an extra are imported inside functions."""
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
    required = {requirement.split(">=")[0].strip() for requirement in configured.install_requires}
    extras = {line.split(">=")[0] for lines in configured.extras_require.values() for line in lines}
    for path in package_files().values():
        if path.suffix != ".py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nested = {inner for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"mpcompile"}:
                allowed = required | extras if node in nested else required
                assert names.get(module, module) in allowed, f"{path}:{node.lineno} imports {module}"
