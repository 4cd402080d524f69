"""Old import paths: each resolves, warns, and does not affect the public functions of the same names."""

import importlib
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import mpcompile
from mpcompile._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_old_paths_give_what_the_new_ones_hold(old):
    module = importlib.import_module(f"mpcompile.{old}")
    for path in MOVED[old].split():
        new = importlib.import_module(f"mpcompile.{path}")
        defined = [
            n for n, v in vars(new).items() if not n.startswith("_") and getattr(v, "__module__", "") == new.__name__
        ]
        name = next(iter(defined), None) or next(name for name in vars(new) if not name.startswith("_"))
        with pytest.warns(DeprecationWarning, match=new.__name__):
            assert getattr(module, name) is getattr(new, name)


NAMES = (Path(__file__).parent / "support" / "public_names.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("row", NAMES, ids=lambda row: row.partition(":")[0] or "mpcompile")
def test_names_of_version_0_1_resolve(row):
    """Public functions and classes, by the module that held them before the package was divided into rooms."""
    path, _, names = row.partition(":")
    module = importlib.import_module(f"mpcompile.{path}".rstrip("."))
    assert [name for name in names.split() if not hasattr(module, name)] == []


def test_old_paths_do_not_lead_into_each_other():
    assert not {path for paths in MOVED.values() for path in paths.split()} & MOVED.keys()


def test_names_that_never_existed_do_not_resolve():
    assert not hasattr(mpcompile, "no_such_module")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mpcompile.no_such_module")


def test_functions_stay_functions():
    """``audit``, ``certify``, ``distill`` and ``explain`` were modules as well as functions."""
    code = (
        "import mpcompile, mpcompile.audit as a, mpcompile.explain, mpcompile.certify.bounds\n"
        "from mpcompile.certify import certify\nfrom mpcompile.distill import distill\n"
        "from mpcompile.certify.bounds import __name__ as n\n"
        "from mpcompile import graph, scores\n"
        "assert a is mpcompile.audit and callable(a) and callable(mpcompile.explain)\n"
        "assert certify is mpcompile.certify and distill is mpcompile.distill\n"
        "assert graph.IRModule is mpcompile.ir.module.IRModule"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_patches_through_an_old_path_reach_the_module(monkeypatch):
    from mpcompile.pruning import scores

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        monkeypatch.setattr("mpcompile.scores.magnitude_mask", None)
    assert scores.magnitude_mask is None
    monkeypatch.undo()
    assert scores.magnitude_mask is not None


def test_pickles_that_name_an_old_path_are_read():
    from mpcompile.pruning.project import Projection

    with pytest.warns(DeprecationWarning):
        assert pickle.loads(b"cmpcompile.passes.project\nProjection\n.") is Projection


def test_nothing_of_ours_uses_an_old_path():
    """Importing and running the package warns nobody."""
    code = "import mpcompile, mpcompile.backend, mpcompile.cli as c; c.parser()"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:mpcompile", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
