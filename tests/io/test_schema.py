"""Values of wrong types in every field of a plan and of JSON results: refused, or shown, and never a crash."""

import copy
import dataclasses
import functools
import json
import operator
from typing import Annotated, TypedDict

import pytest

from mpcompile import Config, cli, load, save, transform
from mpcompile.errors import ArtifactError, MPCompileError
from mpcompile.io.schema import Between, Length, Mismatch, check
from mpcompile.page import render, sections
from mpcompile.page.sources import Sources, read_json
from mpcompile.plan import Plan
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
    """The plan is refused, or it can be printed and shown on a page."""
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


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy warns about implausible figures
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
