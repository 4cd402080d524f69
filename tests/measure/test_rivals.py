"""Audits against other runtimes: a fake one that can be wrong or refuse, and the sentences that say who wins."""

import json

import pytest
import torch

from mpcompile import Config, audit, cli, page, transform
from mpcompile.errors import ConfigError
from mpcompile.page.sources import Sources
from mpcompile.runtimes.base import Build, Port, Runtime
from mpcompile.runtimes.catalogue import RUNTIMES
from tests.support.helpers import mlp


class Fake(Runtime):
    """Runs torch instead of the file. bf16 is off by 1 %; int8 refuses the model, or is wrong, as told."""

    name, title, package, extra = "fake", "Fake", "torch", "fake"
    model, wrong, calibrated = None, 0.0, 0

    def precisions(self):
        return ("fp32", "bf16", "int8")

    def load(self, path, precision="fp32", threads=None, calibration=()):
        assert path.stat().st_size and threads == torch.get_num_threads()
        if precision == "int8":
            self.calibrated += sum(len(args[0]) for args, _ in calibration)
            if not self.wrong:
                raise RuntimeError("an operator of\na new kind")
        scale = {"fp32": 1.0, "bf16": 1.01, "int8": 1 + self.wrong}[precision]
        run = lambda feed: [scale * self.model(torch.from_numpy(feed["input"])).detach().numpy()]  # noqa: E731
        return Build(self.title, "0.1", precision, (Port("input", (6, 32)),), ("logits",), run)


@pytest.fixture
def fake(monkeypatch):
    runtime = Fake()
    monkeypatch.setitem(RUNTIMES, "fake", runtime)
    return runtime


def times(monkeypatch, **medians):
    """Invent the milliseconds of builds by name; "Fake" is one in the runtime."""

    def invented(builds, *_):
        return {name: [medians[name.replace(" ", "_").replace("2:4", "ours")]] * 3 for name in builds}

    monkeypatch.setattr("mpcompile.measure.audit.time_builds", invented)


MEDIANS = {"dense_eager": 9.0, "dense_compiled": 4.0, "dense_Fake": 3.0, "dense_Fake_bf16": 1.0, "ours_in_Fake": 1.5}
MEDIANS |= {"ours_in_Fake_bf16": 0.5, "compiled_sparse": 2.0}


def test_runtimes_join_the_audit_and_the_best_of_all_is_the_baseline(fake, monkeypatch):
    times(monkeypatch, **MEDIANS)
    model, x = mlp(), torch.randn(6, 32)
    fake.model = gm = transform(model, x, Config(pattern="2:4", score="magnitude"))
    monkeypatch.setattr(Fake, "load", _of_both(model, gm, Fake.load))
    data = [(x, torch.arange(6) % 5), (torch.randn(4, 32), torch.arange(4))]
    report = audit(
        model, gm, data, dense_compiled=model, dense_bf16=False, against=["fake"], calibration=[x, x[:4]], rounds=3
    )
    assert [row.name for row in report.rows] == [
        "dense eager",
        "dense compiled",
        "dense Fake",
        "dense Fake bf16",
        "dense Fake int8",
        "2:4 in Fake",
        "2:4 in Fake bf16",
        "2:4 in Fake int8",
        "compiled sparse",
    ]
    assert fake.calibrated == 20  # 10 inputs for each of two models
    rival, ours = report["dense Fake"], report["2:4 in Fake"]
    assert report.best_dense is rival and rival.speedup == 1 and report["compiled sparse"].speedup == 1.5
    assert (rival.samples, rival.agree, rival.difference < 1e-6) == (10, 1.0, True)
    assert report["dense Fake bf16"].difference == pytest.approx(0.01, rel=1e-3)
    assert report["dense Fake bf16"].speedup == 3 and report["dense eager"].weight_bytes == rival.weight_bytes
    assert report["dense Fake bf16"].weight_bytes * 2 == rival.weight_bytes
    assert (ours.macs, rival.macs) == (gm.plan.macs.executed, gm.plan.macs.dense)
    assert ours.difference == pytest.approx(report["compiled sparse"].difference, rel=1e-4)
    assert report["dense Fake int8"].reason == "RuntimeError: an operator of" and not report["dense Fake int8"].samples
    assert "the best dense build is dense Fake: 3.00 ms" in report.notes
    assert "this build runs fastest in Fake 1.50 ms; torch.compile 2.00 ms" in report.notes
    assert any(n.startswith("dense Fake bf16 takes 1.00 ms, 2.00x as fast as this fp32 build") for n in report.notes)
    assert "dense Fake int8 was not run: RuntimeError: an operator of" in report.notes
    assert report.environment["fake"] == fake.version
    data = json.loads(report.to_json())
    html = page.render(Sources(audit=data))
    for text in (str(report), html):
        assert "dense Fake int8" in text and "not run" in text and "3.00x" in text


def _of_both(model, gm, load):
    """The fake runtime's model is the dense one in the first three calls, and the graph in the others."""
    calls = []

    def loading(self, *args):
        calls.append(args)
        self.model = model if len(calls) <= 3 else gm
        build = load(self, *args)
        run, own = build.run, self.model
        build.run = lambda feed: (setattr(self, "model", own), run(feed))[1]
        return build

    return loading


def test_wrong_outputs_are_reported_and_not_timed(fake, monkeypatch):
    timed = []
    monkeypatch.setattr(
        "mpcompile.measure.audit.time_builds",
        lambda builds, *_: timed.extend(builds) or {name: [1.0] for name in builds},
    )
    fake.model, fake.wrong = mlp(), 0.7
    report = audit(fake.model, mlp(), torch.randn(6, 32), dense_compiled=mlp(), dense_bf16=False, against="fake")
    assert "differ by 7.0e-01 from those of the same graph" in report["dense Fake int8"].reason
    assert sorted(timed) == ["compiled sparse", "dense Fake", "dense Fake bf16", "dense compiled", "dense eager"]
    assert report["dense Fake int8"].latency_ms is None and "dense Fake int8 was not run: its" in str(report)
    assert not any(row.name.startswith("transformed") for row in report.rows)  # a plain module was audited
    fake.wrong = float("nan")
    report = audit(fake.model, mlp(), torch.randn(6, 32), dense_compiled=mlp(), rounds=0, against="fake")
    assert "differ by nan" in report["dense Fake int8"].reason


def test_a_model_that_cannot_be_exported_gives_its_reason_in_every_row(fake, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr("mpcompile.runtimes.catalogue.write_onnx", refuse)
    report = audit(mlp(), mlp(), torch.randn(6, 32), dense_compiled=mlp(), rounds=0, against="fake")
    assert [row.reason for row in report.rows] == [None, None, *["RuntimeError: no such operator"] * 3, None]


def test_unknown_runtimes_and_inputs_on_other_devices_are_refused(fake):
    with pytest.raises(ConfigError, match=r"no such runtime; expected one of onnxruntime, openvino, fake, found 'tvm'"):
        audit(mlp(), mlp(), torch.randn(6, 32), against=["fake", "tvm"])
    with pytest.raises(ConfigError, match="compared on the CPU"):
        audit(mlp(), mlp(), torch.ones(6, 32, device="meta"), dense_compiled=mlp(), rounds=0, against="fake")


def test_the_command_audits_against_runtimes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    out = tmp_path / "audit.json"
    call = ["audit", "test_resnet", "--batch", "2", "--rounds", "2", "--quiet", "--json", str(out)]
    assert cli.main([*call, "--pattern", "2:4", "--against", "onnxruntime"]) == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["dense ONNX Runtime"]["baseline"] and rows["dense ONNX Runtime"]["latency_ms"] > 0
    assert rows["2:4 in ONNX Runtime"]["macs"] < rows["dense ONNX Runtime"]["macs"]
    assert "the best dense build is dense" in capsys.readouterr().out
    monkeypatch.setattr(Runtime, "installed", False)
    assert cli.main([*call, "--against", "openvino"]) == 2
    assert "OpenVINO needs the package openvino. Run pip install 'mpcompile[openvino]'" in capsys.readouterr().err
