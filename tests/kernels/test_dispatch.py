"""The choice of an engine: the fastest as timed, by more than the noise; cached, or harmless if that fails."""

import dataclasses
import json
import logging
import os
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mpcompile.errors import ConfigError
from mpcompile.io import messages
from mpcompile.kernels import dispatch, store, timing
from mpcompile.kernels.cpu import engine as cpu
from mpcompile.kernels.dispatch import Dense, LayerSpec, Reference, auto_pattern, choose, choose_all
from mpcompile.kernels.nm_format import Pattern

CPU = torch.device("cpu")
LINEAR = LayerSpec((24, 32), torch.float32, CPU, Pattern(2, 4), inputs=(2, 5, 32))
CONV = LayerSpec((8, 16, 3, 3), torch.float32, CPU, Pattern(2, 4), ([2, 2], [1, 1], [1, 1], 1), (3, 16, 9, 9))


class Fake(Dense):
    """A sparse engine that supports only fp32."""

    name = "fake"

    def supports(self, spec):
        return None if spec.dtype == torch.float32 else f"dtype {spec.dtype}"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    monkeypatch.setenv("MPCOMPILE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "ENGINES", (Fake(), Reference(), Dense()))
    monkeypatch.setattr(timing, "_MEMORY", {})
    monkeypatch.setattr(messages, "_WARNED", set())
    yield
    timing.set_cost_model(None)


@pytest.fixture
def clock(monkeypatch):
    """Turn timing on, with times from a table; the list records the calls."""
    calls = []

    def measure(spec, engines, threads):
        calls.append(spec)
        return {"fake": 5.0, "reference": 50.0, "dense": 10.0, "dense prepacked": 8.0}

    monkeypatch.setenv("MPCOMPILE_TIMING", "on")
    monkeypatch.setattr(timing, "measure", measure)
    return calls


def model(**us):
    timing.set_cost_model(lambda name, spec, threads: us.get(name.replace(" ", "_")))


@pytest.mark.parametrize(
    ("us", "picked"),
    [
        ({"fake": 9.69, "dense": 10}, "fake"),
        ({"fake": 9.71, "dense": 10}, "dense"),
        ({"fake": 9, "dense": 10, "dense_prepacked": 9.2}, "dense"),
        ({"fake": 8.9, "dense": 10, "dense_prepacked": 9.2}, "fake"),
        ({"fake": 9, "dense": 10, "reference": 8}, "fake"),  # if there are kernels, the reference is not a candidate
    ],
)
def test_a_sparse_engine_has_to_beat_the_best_dense_build(us, picked):
    model(**{"reference": 99, **us})
    choice = choose(LINEAR)
    assert choice.engine.name == picked
    assert "as fast as dense" in choice.why and ("only" in choice.why) == (picked == "dense")
    assert choice.dense_us == min(us["dense"], us.get("dense_prepacked", 99))
    assert choice.us == (choice.dense_us if picked == "dense" else us[picked])


def test_forced_engines_are_not_timed(clock):
    choice = choose(LINEAR, "reference")
    assert (choice.engine.name, choice.why, choice.us, clock) == ("reference", "asked for", None, [])
    choice = choose(LINEAR, "dense", measured=True)
    assert (choice.engine.name, choice.us, len(clock)) == ("dense", 8.0, 1)
    with pytest.raises(ConfigError, match="no such engine; expected auto, fake, reference, dense, found 'magic'"):
        choose(LINEAR, "magic")


def test_reasons_are_named():
    model(reference=3, dense=2)
    half = dataclasses.replace(LINEAR, dtype=torch.bfloat16)
    choice = choose(half)
    assert choice.engine.name == "dense"
    assert {c.name: c.reason for c in choice.candidates}["fake"] == "dtype torch.bfloat16"
    choice = choose(half, "fake")
    assert (choice.engine.name, choice.why) == ("dense", "fake: dtype torch.bfloat16")
    integers = dataclasses.replace(LINEAR, dtype=torch.int8)
    assert choose(integers).why == "no other engine supports it"


def test_without_timings_the_first_engine_that_supports_a_layer_is_taken(clock, monkeypatch):
    choice = choose(dataclasses.replace(LINEAR, inputs=None))
    assert choice.engine.name == "fake" and "input shape is unknown" in choice.why
    monkeypatch.setenv("MPCOMPILE_TIMING", "off")
    choice = choose(LINEAR)
    assert choice.engine.name == "fake" and "timing is off" in choice.why
    assert choose(dataclasses.replace(LINEAR, dtype=torch.float16)).engine.name == "reference"
    assert clock == []


def test_a_layer_is_timed_once(clock, monkeypatch):
    near = dataclasses.replace(LINEAR, inputs=(11, 32))  # the same bucket as 2 x 5 tokens
    assert [c.engine.name for c in choose_all([LINEAR, near, LINEAR])] == ["fake"] * 3
    assert len(clock) == 1
    monkeypatch.setattr(timing, "_MEMORY", {})  # another process
    assert choose(LINEAR).us == 5.0
    assert len(clock) == 1
    for other in (
        dataclasses.replace(LINEAR, pattern=Pattern(8, 16)),
        dataclasses.replace(LINEAR, inputs=(100, 32)),
        dataclasses.replace(LINEAR, dtype=torch.float64, shape=(24, 64), inputs=(9, 64)),
        CONV,
        dataclasses.replace(CONV, geometry=([1, 1], [1, 1], [1, 1], 1)),
    ):
        before = len(clock)
        choose(other)
        assert len(clock) == before + 1


def test_an_engine_that_the_cache_lacks_is_timed_with_the_others(clock, monkeypatch):
    store.write_json(timing.cache_file(), {timing.entry_key(LINEAR, torch.get_num_threads()): {"dense": 1.0}})
    assert choose(LINEAR).us == 5.0
    assert len(clock) == 1


@pytest.mark.parametrize("content", ["{", "[]", "\xff\xfe", '{"KEY": {"fake": -1, "reference": 1, "dense": "x"}}'])
def test_a_damaged_cache_is_logged_once_and_replaced(clock, content, caplog):
    path = timing.cache_file()
    path.parent.mkdir(parents=True)
    key = timing.entry_key(LINEAR, torch.get_num_threads())
    path.write_bytes(content.replace("KEY", key).encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert choose(LINEAR).us == 5.0
        choose(CONV)
    assert len(clock) == 2
    assert [r for r in caplog.records if "is ignored" in r.message].__len__() == ("KEY" not in content)
    assert json.loads(path.read_text())[key]["fake"] == 5.0


def test_an_unwritable_folder_is_logged_once(clock, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert choose(LINEAR).us == choose(CONV).us == choose(LINEAR).us == 5.0
    assert len(clock) == 2
    assert [record.message.count("cannot be written") for record in caplog.records] == [1]
    assert list(store.cache_folder().iterdir()) == []


def test_cache_folder(monkeypatch, tmp_path):
    assert store.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MPCOMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "mpcompile"
    store.write_json(tmp_path / "a.json", {"a": 1})
    store.write_json(tmp_path / "a.json", {"b": 2})
    assert store.read_json(tmp_path / "a.json") == {"a": 1, "b": 2}
    assert store.read_json(tmp_path / "missing.json") == {}


def test_buckets():
    found = [timing.bucket(count) for count in range(1, 5000)]
    assert all(b >= count for count, b in enumerate(found, 1))
    assert found == sorted(found)
    assert all(b <= 1.19 * count for count, b in enumerate(found, 1) if count >= 64)
    assert [timing.bucket(b) for b in set(found)] == list(set(found))
    assert {128, 152, 181, 215, 256} <= set(found)
    assert timing.bucketed(LINEAR).inputs == (11, 32)
    assert timing.bucketed(CONV).inputs == (3, 16, 9, 9)


def test_tokens():
    y = F.conv2d(torch.zeros(3, 16, 9, 9), torch.zeros(8, 16, 3, 3), None, 2, 1)
    assert CONV.tokens == y[:, 0].numel()
    assert LINEAR.tokens == 10
    assert dataclasses.replace(LINEAR, inputs=None).tokens is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [LINEAR, CONV], ids=["linear", "conv"])
def test_the_clock(spec, dtype):
    spec, state = dataclasses.replace(spec, dtype=dtype), torch.get_rng_state()
    threads = torch.get_num_threads()
    us = timing.measure(spec, (Reference(), Dense()), 1)
    assert {"reference", "dense"} <= set(us) <= {"reference", *timing.DENSE}
    assert all(0.1 < value < 1e6 for value in us.values())
    assert us["reference"] > us["dense"]
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


@pytest.mark.parametrize("spec", [LINEAR, CONV], ids=["linear", "conv"])
def test_every_dense_build_that_is_timed_computes_the_layer(spec):
    runs = list(timing._runs(spec, (Reference(), Dense())))
    results = [run() for _, calls in runs for run in calls]
    assert all(len(calls) == timing._COPIES for _, calls in runs)
    assert {name for name, _ in runs} >= {"reference", "dense"}
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_patterns_keep_half_and_start_with_the_widest(dtype):
    for device in ("cpu", "cuda"):
        patterns = auto_pattern(torch.device(device), dtype)
        assert all(p.density == 0.5 for p in patterns) and patterns[-1] == (2, 4)
        assert [p.m for p in patterns] == sorted((p.m for p in patterns), reverse=True)


@pytest.mark.parametrize("pairs", [True, False])
def test_bf16_keeps_2_of_4_where_pairs_of_columns_are_multiplied(monkeypatch, pairs):
    monkeypatch.setattr(cpu.native, "kernels", lambda: types.SimpleNamespace(nm_pairs=lambda: int(pairs)))
    device = torch.device("cpu")
    assert auto_pattern(device, torch.bfloat16)[0] == ((2, 4) if pairs else (8, 16))
    assert auto_pattern(device, torch.float32)[0] == (8, 16)


WRONG = [None, [], "x", *({"dense": wrong} for wrong in ("1", True, 10**400, -1, None, [1], float("nan")))]


@pytest.mark.parametrize("entry", WRONG, ids=range(len(WRONG)))
def test_a_timing_of_a_wrong_type_is_ignored(entry):
    assert timing._valid(entry) == {}
    assert timing._valid({"dense": 2, "cpu": 1.5}) == {"dense": 2.0, "cpu": 1.5}


def test_a_cache_that_is_not_our_file_is_ignored(tmp_path):
    path = tmp_path / "timings.json"
    for text in ("[" * 100_000, '{"a": ' * 100_000, "[1]", "{", "\xff\xfe", "9" * 5000):
        path.write_text(text, encoding="latin-1")
        assert store.read_json(path) == {}
    path.unlink()
    os.mkfifo(path)
    assert store.read_json(path) == {}  # and does not wait for a writer
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f".timings.json.{os.getpid()}.tmp").symlink_to(victim)
    path.unlink()
    store.write_json(path, {"a": 1})
    assert victim.read_text() == "mine" and store.read_json(path) == {"a": 1}


def test_timings_depend_on_every_source_of_the_kernels(tmp_path, monkeypatch):
    """Sources in subfolders count, too: a change there invalidates the timings."""
    here = Path(timing.__file__).parent
    found = timing.sources(here / "nm_linear")
    kinds = (".py", ".cpp", ".h")
    assert set(found) == {p for p in (here / "nm_linear").rglob("*") if p.suffix in kinds} and len(found) > 20
    for name in ("timing.py", "nm_linear/a.py", "cpu/deep/b.h"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(timing, "__file__", str(tmp_path / "timing.py"))
    keys = []
    for name in ("timing.py", "nm_linear/a.py", "cpu/deep/b.h"):
        (tmp_path / name).write_text("2")
        keys.append(timing.machine_key.__wrapped__())
    (tmp_path / "cpu/deep/b.h").rename(tmp_path / "nm_linear/b.h")
    assert len({*keys, timing.machine_key.__wrapped__()}) == 4
