"""Files of other types than they should be: every field of a plan, of JSON results, of YAML, and of a run's files."""

import copy
import dataclasses
import functools
import json
import operator
from typing import Annotated, TypedDict

import numpy as np
import pytest
import torch

from mpcompile import Config, cli, load, save, transform
from mpcompile.data import ranks
from mpcompile.errors import ArtifactError, ConfigError, MPCompileError
from mpcompile.io.lock import NAME, locked
from mpcompile.io.schema import Between, Length, Mismatch, check
from mpcompile.io.yaml_options import parse
from mpcompile.page import render, sections
from mpcompile.page.sources import Sources, read_json
from mpcompile.plan import Plan
from mpcompile.training import checkpoint
from mpcompile.training import events as logs
from mpcompile.training.options import Training
from mpcompile.training.recipes.recipe import Recipe
from tests.support.forging import forge, parts
from tests.support.helpers import images, tiny_vit

JUNK = [None, True, -1, 0, 10**30, 1e300, float("nan"), "x", "\x1b[31m\n", [], [[1]], ["x"], {}, {"a": {"b": [1]}}]


def places(value, path=()):
    """Every path into nested lists and dicts."""
    keys = value if isinstance(value, dict) else range(min(2, len(value))) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def changed(value, path, junk):
    whole = copy.deepcopy(value)
    if not path:
        return junk
    functools.reduce(operator.getitem, path[:-1], whole)[path[-1]] = junk
    return whole


@pytest.fixture(scope="module")
def artifact():
    gm = transform(tiny_vit(depth=1), images(), Config(pattern="2:4", tome_r=1), [images(8)]).eval()
    data = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    gm.plan.provenance = {"model": "m", "num_classes": 10, "data": data, "class_names": ["a"] * 10}
    row = {"name": "dense eager", "macs": 5, "top1": 0.5, "interval": [0.4, 0.6], "latency_ms": 1.0, "weight_bytes": 9}
    gm.plan.figures = {"rows": [row, {**row, "name": "compiled sparse"}], "environment": {"cpu": "x"}, "notes": ["n"]}
    return gm


def test_the_checker_names_the_field():
    class Inner(TypedDict, total=False):
        a: int
        b: list[float] | None

    @dataclasses.dataclass
    class Outer:
        inner: Inner
        size: Annotated[list[int], Length(2)]
        share: Annotated[float, Between(0, 1)] = 0.5

    good = {"inner": {"a": 1, "b": [1, 2.5], "more": "x"}, "size": [1, 2]}
    check(good, Outer)
    for path, value, message in [
        (("inner", "a"), True, "inner.a: expected a whole number, found True"),
        (("inner", "a"), 1 << 70, "inner.a: expected a whole number"),
        (("inner", "b"), ["x"], "inner.b.0: expected a number, found 'x'"),
        (("inner",), [], "inner: expected a mapping, found a list"),
        (("size",), [1], "size: expected a list of 2, found one of 1"),
        (("share",), 2, "share: expected 0 to 1, found 2"),
        (("share",), float("nan"), "share: expected 0 to 1, found nan"),
        (("other",), 2, "other: expected one of inner, size, share"),
    ]:
        with pytest.raises(Mismatch) as caught:
            check(changed(good, path, value), Outer)
        assert message in str(caught.value)
    with pytest.raises(Mismatch, match="size: expected a value, found none"):
        check({"inner": {}}, Outer)


def test_every_field_of_a_plan_can_be_of_another_type(artifact):
    """It is refused, or printed and shown on a page."""
    whole, refused = artifact.plan.to_dict(), 0
    everywhere = places(whole)
    kept = artifact.plan
    assert len(everywhere) > 300
    for number, path in enumerate(everywhere):
        for junk in JUNK[number % 3 :: 3]:
            text = json.dumps(changed(whole, path, junk))
            try:
                plan = Plan.from_json(text)
            except MPCompileError as error:
                refused += 1
                assert str(error).isprintable() and len(str(error)) < 600
                continue
            assert all(line.isprintable() for line in str(plan).split("\n"))
            assert Plan.from_json(plan.to_json()) == plan or "NaN" in text
            if path and path[0] in ("provenance", "figures", "config", "macs", "notes"):
                artifact.plan = plan
                sources = Sources(artifact=artifact)
                for section in (sections.headline, sections.against_dense, sections.environment, sections.density):
                    section(sources)
                artifact.plan = kept
    assert refused > len(everywhere)


FIELDS = [("provenance",), ("config",), ("config", "tome_r"), ("macs", "dense"), ("passes", 0, "decision")]
FIELDS += [("figures",), ("provenance", "data"), ("provenance", "data", "input_size")]
FIELDS += [("layers", "blocks.0.mlp.fc1", "notes")]


@pytest.mark.parametrize("path", FIELDS)
def test_commands_refuse_such_an_artifact(path, artifact, tmp_path, capsys):
    save(artifact, tmp_path / "a.mpc")
    header, data = parts(tmp_path / "a.mpc")
    junk = {} if path[-1] == "tome_r" else "x"
    header["__metadata__"]["plan"] = json.dumps(changed(artifact.plan.to_dict(), path, junk))
    forge(tmp_path / "b.mpc", header, data)
    with pytest.raises(ArtifactError, match=".".join(map(str, path))):
        load(tmp_path / "b.mpc")
    assert cli.main(["report", str(tmp_path / "b.mpc"), "--out", str(tmp_path / "r.html")]) == 2
    assert cli.main(["verify", str(tmp_path / "b.mpc")]) == 2
    assert path[-1] in capsys.readouterr().err and not (tmp_path / "r.html").exists()


RESULTS = {
    "audit": {
        "rows": [{"name": "dense eager", "macs": 5, "top1": 0.5, "interval": [0.4, 0.6], "lost": 1, "won": 2}] * 2,
        "environment": {"cpu": "x"},
        "notes": ["n"],
    },
    "explain": {"layers": [{"name": "a.b", "engine": "cpu", "us": 1.5, "dense_us": 2.0}] * 2, "machine": "m"},
    "analyze": {
        "a": {"shape": [8, 4], "sigma": 0.1, "edge": 0.5, "spikes": 1, "verdict": "mp", "fit_error": 0.1, "fits": {}},
        "b": {"shape": [8, 4], "singular_values": [3.0, 2.0, 1.0, 0.5], "sigma": 0.1, "edge": 1.0, "fits": {}},
    },
    "certify": {
        "samples": 4,
        "tiers": [{"name": "0", "certified": 2, "samples": 4, "median": 0.1}],
        "statements": [{"kind": "k", "text": "t"}],
        "violations": 0,
    },
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, about figures that make no sense
@pytest.mark.parametrize("command", RESULTS)
def test_every_field_of_a_result_can_be_of_another_type(command, tmp_path):
    whole, path, refused = RESULTS[command], tmp_path / "r.json", 0
    path.write_text(json.dumps(whole))
    assert "<h2>" in render(Sources(**{command: read_json(path, command)}))
    for place in places(whole):
        for junk in JUNK:
            path.write_text(json.dumps(changed(whole, place, junk)))
            try:
                found = read_json(path, command)
            except ArtifactError as error:
                refused += 1
                assert "r.json" in str(error) and str(error).isprintable()
                continue
            page = render(Sources(**{command: found}))
            assert "\x1b" not in page
    assert refused > len(places(whole))


# --- YAML ---

LEVELS = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
YAML = {
    "alias bomb": f"a: &a [x,x,x,x,x,x,x,x,x]\n{LEVELS}",
    "alias of itself": "a: &a [*a]",
    "depth": "a: " + "[" * 3000 + "]" * 3000,
    "some depth": "a: " + "[" * 30 + "]" * 30,
    "twice": "pattern: 2:4\npattern: 4:8",
    "twice within": "a: {b: 1, b: 2}",
    "huge integer": f"a: {'9' * 4000}",
    "large integer": f"a: {2**63}",
    "infinite": "a: 1e999",
    "tab": "a:\n\t- b",
    "binary": "a: !!binary aGk=",
    "set": "a: !!set {x, y}",
    "date": "a: !!timestamp 2024-01-01",
    "object": "a: !!python/object/apply:os.system [ls]",
    "list as a name": "? [a]\n: 1",
    "control characters": "a: \x1b[31m",
    "two documents": "a: 1\n---\na: 2",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_plain_values_of_a_reasonable_size(name, tmp_path):
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        parse(YAML[name], "the config")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    (tmp_path / "r.yaml").write_text(YAML[name])
    with pytest.raises(ConfigError):
        Recipe.load(tmp_path / "r.yaml")


def test_yaml_that_people_write():
    text = "base: &b {lr: 1e-4, seed: 010}\nuse: {<<: *b, lr: 0.5}\nday: 2024-01-01\npattern: 2:4\nnone: ~\nok: yes\n"
    assert parse(text, "x") == {
        "base": {"lr": 1e-4, "seed": 10},
        "use": {"lr": 0.5, "seed": 10},
        "day": "2024-01-01",
        "pattern": "2:4",
        "none": None,
        "ok": True,
    }


NO_RECIPES = [b"\xff\xfe", b"- a\n- b", b"5", b"a" * 2_000_000, b"model: [1]", b"{model: m, macs: 3}"]


@pytest.mark.parametrize("value", NO_RECIPES)
def test_files_that_are_no_recipe_are_refused(value, tmp_path):
    (tmp_path / "r.yaml").write_bytes(value)
    with pytest.raises(ConfigError):
        Recipe.load(tmp_path / "r.yaml")


@pytest.mark.parametrize("options", [{"lr": float("nan")}, {"lr": float("inf")}, {"epochs": 10**400}, {"seed": -1}])
def test_numbers_of_training_are_finite(options):
    with pytest.raises(ConfigError, match="out of range"):
        Training(**options)


# --- A run's files ---


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path):
    path = tmp_path / checkpoint.NAME
    checkpoint.write(path, {"student": {"w": torch.randn(40, 50)}, "step": 3})
    assert checkpoint.read(path)["step"] == 3 and torch.load(path, weights_only=True)["step"] == 3
    whole = path.read_bytes()
    draw = np.random.default_rng(0)
    for place in [*draw.integers(0, len(whole), 150).tolist(), *range(len(whole) - 110, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="cannot be read as a checkpoint"):
            checkpoint.read(path)
    for other in (whole[:-1], whole + b"x", whole[:100], b"", whole[1:]):
        path.write_bytes(other)
        with pytest.raises(ArtifactError, match="cannot be read as a checkpoint"):
            checkpoint.read(path)


LINES = [b'{"event": 3}', b'{"step": "x"}', b'{"step": -1}', b'{"time": []}', b"[1]", b"\xff", b"[" * 5000]


@pytest.mark.parametrize("line", LINES)
def test_lines_of_a_log_have_a_schema(line, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "start", "time": 1.5}\n' + line + b"\n")
    with pytest.raises(ArtifactError, match=r"line 2 of .* is damaged"):
        list(logs.read(path))
    with pytest.raises(ArtifactError, match=r"line 2 of .* is damaged"):
        logs.EventLog(path, resume_at=1)


def test_the_name_of_a_wandb_run_is_one(tmp_path):
    for text in (b"../../x", b"a b", b"\xff", b"x" * 5000, b""):
        (tmp_path / "wandb.id").write_bytes(text)
        with pytest.raises(ArtifactError, match=r"wandb\.id"):
            logs._run_name(tmp_path / "wandb.id")


def test_one_run_in_a_folder(tmp_path):
    """In one process too, unless it is the same run; the kernel frees the lock of a killed one."""
    import os
    import signal
    import threading
    import time

    with locked(tmp_path), locked(tmp_path):
        failed = []

        def other():
            try:
                with locked(tmp_path):
                    pass
            except ArtifactError as error:
                failed.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on " in failed[0] and str(tmp_path) in failed[0]
    assert not list(tmp_path.iterdir())
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path):
            worker = os.fork()  # as a loader's, which outlives the run for a while
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            (tmp_path / "worker").write_text(str(worker))
            time.sleep(30)
        os._exit(0)
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        time.sleep(0.01)
    with pytest.raises(ArtifactError, match=f"process {pid} "), locked(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with locked(tmp_path):
        pass
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    assert not (tmp_path / NAME).exists()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    import errno
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path):
        assert "has no locks" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="can't lock"), locked(tmp_path / "file"):
        pass


def test_the_sources_of_all_folders_count(tmp_path, monkeypatch):
    """``passes`` and ``kernels`` are links in a checkout."""
    import mpcompile

    found = ranks.source_files()
    folders = {name.rpartition("/")[0] for name in found}
    assert {"", "passes", "kernels", "kernels/nm_linear/cpu", "kernels/token_merge", "training", "cli"} <= folders
    assert any(name.endswith(".cpp") for name in found) and "kernels/nm_linear/cpu/gemm.h" in found
    (tmp_path / "package").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "package/linked").symlink_to("../elsewhere")
    (tmp_path / "elsewhere/a.py").write_text("1")
    monkeypatch.setattr(mpcompile, "__path__", [str(tmp_path / "package")])
    digests = []
    for text in ("1", "2"):
        (tmp_path / "elsewhere/a.py").write_text(text)
        ranks._sources.cache_clear()
        digests.append(ranks._sources())
    ranks._sources.cache_clear()
    assert digests[0] != digests[1]
