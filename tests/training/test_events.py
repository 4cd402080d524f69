"""The log of a run: complete lines after any interruption, and optional sinks."""

import json
import sys
import types

import numpy as np
import pytest
import torch

from mpcompile.errors import ArtifactError, ConfigError
from mpcompile.training import events
from mpcompile.training.events import EventLog


def test_lines_are_json_whatever_the_values(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    with EventLog(path) as log:
        log.write("start", config={"pattern": "2:4", "exclude": ("stem",)})
        log.write("step", step=3, loss=torch.tensor(float("nan")), lr=np.float32(0.5), seen=np.int64(7), ok=True)
        log.write("step", step=4, counts=torch.arange(3), path=tmp_path)
    first, second, third = [json.loads(line) for line in path.read_text().splitlines()]
    assert first["config"] == {"pattern": "2:4", "exclude": ["stem"]} and "step" not in first
    assert (second["step"], second["loss"], second["lr"], second["seen"], second["ok"]) == (3, "nan", 0.5, 7, True)
    assert third["counts"] == [0, 1, 2] and third["path"] == str(tmp_path)
    assert list(events.read(path)) == [first, second, third]


def test_a_line_is_in_the_file_before_the_next_call(tmp_path):
    log = EventLog(tmp_path / "run.jsonl")
    log.write("step", step=0)
    assert len(list(events.read(tmp_path / "run.jsonl"))) == 1
    log.close()
    log.close()


def test_resuming_drops_lines_of_repeated_steps_and_half_a_line(tmp_path):
    path = tmp_path / "run.jsonl"
    with EventLog(path) as log:
        log.write("start")
        for step in range(5):
            log.write("step", step=step, loss=float(step))
    with path.open("a") as file:
        file.write('{"event": "st')  # killed here
    assert len(list(events.read(path))) == 6
    with EventLog(path, resume_at=3) as log:
        log.write("step", step=3, loss=30.0)
    assert [line.get("loss") for line in events.read(path)] == [None, 0.0, 1.0, 2.0, 30.0]
    assert [p.name for p in tmp_path.iterdir()] == ["run.jsonl"]


def test_appending_keeps_earlier_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    for _ in range(2):
        with EventLog(path) as log:
            log.write("start")
    assert len(list(events.read(path))) == 2


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EventLog(None) as log:
        log.write("step", step=0, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_errors_name_the_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write the log .*run\.jsonl"):
        EventLog(tmp_path / "file" / "run.jsonl")
    with pytest.raises(ArtifactError, match="cannot read the log"):
        list(events.read(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"event": "start"}\n[1]\n{}\n')
    with pytest.raises(ArtifactError, match=r"line 2 of .* is damaged"):
        list(events.read(tmp_path / "bad.jsonl"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /dev/full")
def test_a_full_disk_is_reported(tmp_path):
    log = EventLog(tmp_path / "run.jsonl")
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(ArtifactError, match="No space left"):
        log.write("step", step=0)
    log.close()


def test_sinks_get_only_numbers(tmp_path):
    got, closed = [], []

    class Sink:
        def write(self, numbers, step):
            got.append((numbers, step))

        def close(self):
            closed.append(True)

    with EventLog(tmp_path / "run.jsonl", sinks=(Sink(),)) as log:
        log.write("start", model="vit")
        log.write("epoch", step=9, top1=0.5, name="x", done=True)
    assert got == [({"epoch/top1": 0.5}, 9)] and closed == [True]


@pytest.mark.parametrize(("make", "package"), [(events.tensorboard, "tensorboard"), (events.wandb, "wandb")])
def test_a_missing_package_is_named(make, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"Run pip install 'mpcompile\[{package}\]'"):
        make("name")


def test_wandb_is_called_as_its_documentation_says(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.append(("log", numbers, step)), finish=lambda: calls.append(("finish",))
    )

    def init(**options):
        calls.append(("init", options))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with EventLog(None, sinks=(events.wandb("prune", config={"lr": 1}, mode="offline"),)) as log:
        log.write("step", step=1, loss=2.0)
    assert calls == [
        ("init", {"project": "prune", "config": {"lr": 1}, "mode": "offline"}),
        ("log", {"step/loss": 2.0}, 1),
        ("finish",),
    ]
