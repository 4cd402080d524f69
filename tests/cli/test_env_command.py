"""``mpcompile env``: all that a bug report needs and nothing private, even if parts are missing."""

import json
import subprocess
import sys

import pytest

import mpcompile
from mpcompile import cli
from mpcompile.io.ownership import is_ours
from mpcompile.measure.environment import environment


def test_text_and_json_show_every_value(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPCOMPILE_CACHE", str(tmp_path / "cache"))
    for _ in range(2):  # the second run may replace the file of the first
        assert cli.main(["env", "--json", str(tmp_path / "env.json")]) == 0
        lines = capsys.readouterr().out.splitlines()
    values = json.loads((tmp_path / "env.json").read_text())
    assert is_ours(tmp_path / "env.json") and list(values) == list(environment())
    assert len(lines) == len(values) and lines[0].split() == ["mpcompile", mpcompile.__version__]
    assert len({line.index(line.split("  ", 1)[1].strip(), 10) for line in lines}) == 1  # one column
    assert cli.main(["env", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == values.keys()


@pytest.mark.parametrize("inside", [True, False])
def test_no_private_folder_is_named(inside, tmp_path, monkeypatch, capsys):
    home = tmp_path / "secret"
    cache = (home if inside else tmp_path / "elsewhere") / "cache"
    compiler = home / "tools" / "g++"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\necho g++ 12\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPCOMPILE_CACHE", str(cache))
    monkeypatch.setenv("CXX", f"{compiler} -I{home}/include")
    assert environment()["compiler"].startswith(str(home))
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["env", "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert "secret" not in text and "secret" not in json.dumps(values)
    assert values["compiler"] == "g++" and values["cache"] == ("~/cache" if inside else str(cache))


def test_missing_parts_are_named(tmp_path):
    """Without timm, a compiler and a cache, in a separate process, since nothing else may import timm, either."""
    code = (
        "import importlib.metadata as m, sys\n"
        "sys.modules['timm'] = None\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'timm':\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from mpcompile import cli\n"
        "sys.exit(cli.main(['env']))\n"
    )
    variables = {"CXX": "no-such-compiler", "MPCOMPILE_CACHE": str(tmp_path / "none"), "PATH": "/nonexistent"}
    variables |= {"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = {line[:18].strip(): line[18:].strip() for line in done.stdout.splitlines()}
    assert shown["timm"] == "not installed" and shown["compiler"] == shown["compiler version"] == "none"
    assert shown["kernel libraries"] == "0" and shown["cache size"] == "0.0 MiB"
