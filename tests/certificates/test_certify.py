"""Certificates against the networks themselves, a control that must fail, and refusals."""

import copy
import json
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from scipy.stats import binomtest
from torch import nn

import mpcompile
from bench.certificates import audit as bench
from mpcompile import Config, certify, cli, errors, transform
from mpcompile.certificates import bounds
from mpcompile.certificates.enclosures import rules
from tests.support.helpers import Branching, mlp, tiny_vit


def samples(model, count=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        count, *((3, 32, 32) if isinstance(model, timm.models.VisionTransformer) else (32,)), generator=generator
    )


@pytest.mark.parametrize("kind", bench.KINDS)
def test_no_certificate_is_contradicted(kind):
    total = bench.Counts()
    for pattern, _, dense, sparse, x, thetas in bench.cases(len(kind), kind, 24):
        if pattern == "12:16":
            total.add(bench.check(dense, sparse, x, certify(dense, sparse, x, progress=False), thetas))
    assert total.contradictions == 0
    assert total.certified["1 enclosure"] > total.cases / 10  # certificates exist
    assert total.closest["1 enclosure"] > 0.5  # and bounds are tight (max pooling loosens them)


def test_the_check_catches_an_unsound_rule():
    """With ReLU enclosed only by its chord, the same check on the same networks must find contradictions."""
    with mock.patch.object(bench, "PATTERNS", ("2:4",)), mock.patch.object(bench, "ACTIVATIONS", (nn.ReLU,)):
        sound = bench.Counts()
        for _, _, dense, sparse, x, thetas in bench.cases(0, "mlp", 24):
            sound.add(bench.check(dense, sparse, x, certify(dense, sparse, x, progress=False), thetas))
        unsound = bench.control(24, networks=1)
    assert sound.contradictions == 0 and sound.cases == unsound.cases
    assert unsound.bounds["1 enclosure"] > 0


def test_a_wrong_bound_is_reported():
    model, x = mlp(), samples(mlp(), 8)
    sparse = transform(model, x[:2], Config(pattern="2:4"))
    with mock.patch.dict(rules.RULES, {"gelu": lambda value, approximate="none": bench.chord(value)}):
        report = certify(model, sparse, x, progress=False)
    assert report.violations > 0 and "the bounds above are wrong" in str(report)


def test_permuted_and_refitted_model_is_compared_with_its_dense_model():
    model = mlp()
    x = samples(model, 64)
    calibration = [samples(model, 64, seed) for seed in (2, 3)]
    gm = transform(model, x[:2], Config(pattern="12:16", permute=True), calibration)
    (entry, *_) = next(r for r in gm.plan.passes if r.name == "permute").decision["classes"]
    assert sorted(entry["order"][0]) == list(range(entry["channels"]))
    report = certify(model, gm, x, torch.randint(0, 5, (64,)), l2=1.0, progress=False)
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert report.layers[0].split == "moved"
    assert report.violations == 0 and report["1"].certified > 0
    assert any("repeated on the dense model" in s.text for s in report.statements)
    plain = transform(model, x[:2], Config(pattern="12:16", permute=False, restore=False, score="magnitude"))
    layers = certify(model, plain, x, progress=False).layers
    assert [layer.split for layer in layers] == ["mask", "mask"]


def test_plan_without_orders_or_of_another_model_is_refused():
    model, x = mlp(), samples(mlp(), 8)
    gm = transform(model, x[:2], Config(pattern="12:16", permute=True), [samples(model, 64, 2)])
    entry = next(r for r in gm.plan.passes if r.name == "permute").decision["classes"][0]
    other = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    with pytest.raises(errors.GraphError, match="order of channels does not fit"):
        certify(other, gm, x, progress=False)
    del entry["order"]
    with pytest.raises(errors.GraphError, match=r"reordered, but not how.*this version's mpcompile.transform"):
        certify(model, gm, x, progress=False)


def test_vision_transformer_and_its_last_layers():
    model, x = tiny_vit(), samples(tiny_vit(), 6)
    gm = transform(model, x[:2], Config(pattern="15:16", exclude=("*",), include=("blocks.1.mlp.*",)))
    report = certify(model, gm, x, progress=False, splits=2)
    assert [layer.name for layer in report.layers] == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert report["1"].certified and report.violations == 0 and not any(layer.reason for layer in report.layers)
    whole = certify(model, transform(model, x[:2], Config(pattern="2:4")), x[:2], progress=False, splits=1)
    lost = [layer for layer in whole.layers if layer.reason]
    assert lost and whole["1"].certified == 0 and whole["0"].certified >= 0
    assert any(s.kind == "not certified" and lost[0].name in s.text for s in whole.statements)


def test_token_merging_is_measured_and_the_reason_for_no_more_is_given():
    model, x = tiny_vit(), samples(tiny_vit(), 4)
    gm = transform(model, x[:2], Config(pattern="2:4", tome_r=2))
    report = certify(model, gm, x[:2], progress=False)
    assert [tier.name for tier in report.tiers] == ["0 measured"]
    assert "token_" in report.statements[-1].text and report.statements[-1].kind == "not certified"
    with pytest.raises(errors.GraphError, match=r"across a change of structure.*tiers=\(0,\)"):
        certify(model, gm, x, tiers=(1,), progress=False)
    merged = transform(model, x[:2], Config(pattern="dense", tome_r=2))  # the same structure: only weights differ
    report = certify(merged, gm, x[:1], progress=False, splits=1)
    assert "which tokens are merged depends on values" in str(report)


def test_a_layer_and_the_batch_norm_after_it_are_one_step():
    dense, shape = bench.network(
        "cnn", SimpleNamespace(choice=lambda s: s[0], randint=lambda a, b: a, random=lambda: 0.9)
    )
    sparse = bench.pruned(dense, ["3"], bench.Pattern(12, 16))
    sparse[4].running_mean += 0.01
    x = torch.randn(16, *shape)
    report = certify(dense, sparse, x, progress=False)
    assert [layer.name for layer in report.layers] == ["3 + 4"]
    assert report.violations == 0 and report["1"].certified
    assert bench.check(dense, sparse, x, report, ()).contradictions == 0


def test_a_captured_graph_is_compared_like_a_traced_one():
    """Its BatchNorms are calls, which name another library than the module's do."""
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    dense = Branching(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), *head).eval()
    x = torch.randn(16, 3, 12, 12)
    sparse = transform(dense, x, Config(pattern="14:16", permute=False))
    report = certify(dense, sparse, x, progress=False)
    assert "export" in str(sparse.plan.captured) and "not certified" not in str(report)
    assert report.violations == 0 and [layer.name for layer in report.layers][-1] == "3"


def test_functions_that_write_in_place_are_followed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x):
            y = self.a(x)
            torch.relu_(y)
            y += x
            return self.b(y)

    torch.manual_seed(0)
    dense = Model().eval()
    sparse = bench.pruned(dense, ["a"], bench.Pattern(12, 16))
    x = torch.randn(16, 32)
    report = certify(dense, sparse, x, progress=False)
    assert bench.check(dense, sparse, x, report, (0.5,)).contradictions == 0 and report["1"].certified


def test_compiled_and_half_precision_models_leave_room_for_their_rounding():
    model, x = mlp(), samples(mlp(), 16)
    sparse = transform(model, x[:2], Config(pattern="12:16"))
    exact = certify(model, sparse, x, progress=False)
    rough = certify(copy.deepcopy(model).bfloat16(), copy.deepcopy(sparse).bfloat16(), x, progress=False)
    assert rough.allowance > 100 * exact.allowance > 0
    compiled = torch.compile(sparse, backend="eager")
    assert certify(model, compiled, x, progress=False)["1"].certified == exact["1"].certified


def test_identical_models_lose_nothing():
    model, x = mlp(), samples(mlp(), 16)
    report = certify(model, copy.deepcopy(model), x, progress=False)
    assert report.layers == [] and report["1"].certified == report["0"].certified == 16 and report["1"].median < 1e-5


def test_report_is_json_and_text():
    model, x = mlp(), samples(mlp(), 16)
    sparse = transform(model, x[:2], Config(pattern="12:16"))
    labels = model(x).argmax(1)
    report = certify(model, sparse, [(x[:10], labels[:10]), (x[10:], labels[10:])], l1=1e-3, l2=10.0, progress=False)
    data = json.loads(report.to_json())
    assert data["samples"] == 16 and len(data["tiers"][1]["eta"]) == 16
    assert {s["kind"] for s in data["statements"]} >= {"deterministic", "high probability"}
    text = str(report)
    assert "falls by at least" in text and "Clopper-Pearson" in text and "0.001 |W|_1" in text
    # the penalty: the exact difference of the two weight matrices
    weights = [
        (p, s)
        for (n, p), (_, s) in zip(model.named_parameters(), sparse.named_parameters(), strict=True)
        if p.dim() > 1
    ]
    squares = sum(float((s**2).sum().detach() - (p**2).sum().detach()) for p, s in weights)
    sizes = sum(float(s.abs().sum().detach() - p.abs().sum().detach()) for p, s in weights)
    tier = report["0"]
    assert tier.objective == pytest.approx(tier.ce_sharp + 10 * squares + 1e-3 * sizes, rel=1e-4)
    assert tier.least_l2 == pytest.approx(tier.ce_sharp / -squares, rel=1e-4)
    assert tier.ce_sharp <= tier.ce_mean and report.ce_change <= tier.ce_sharp


def test_the_sharp_bound_holds_is_attained_and_is_below_that_of_the_paper():
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 7).double() * 3, torch.randint(0, 7, (200,))
    eta = torch.rand(200).double() * 2
    bound = bounds.cross_entropy_bound(logits, labels, eta)
    worst = logits + eta[:, None]
    worst[torch.arange(200), labels] -= 2 * eta
    loss = nn.functional.cross_entropy
    rise = loss(worst, labels, reduction="none") - loss(logits, labels, reduction="none")
    assert torch.allclose(bound, rise) and bool((bound <= 2 * eta).all())


@pytest.mark.parametrize(("events", "trials"), [(0, 5000), (3, 100), (100, 100)])
def test_clopper_pearson(events, trials):
    expected = binomtest(events, trials, alternative="less").proportion_ci(0.95, "exact").high
    assert bounds.upper_rate(events, trials) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiers": (3,)}, "no such tier"),
        ({"tiers": 1}, "no such tier"),
        ({"splits": 0}, "splits"),
        ({"confidence": 95}, "confidence"),
        ({"l2": -1.0}, "l2"),
        ({"sparse": "pruned.mpc"}, "sparse is not a model"),
        ({"batches": []}, "no samples"),
        ({"batches": ["photo.jpg"]}, "batch has the wrong type"),
        ({"batches": torch.randn(3, 31)}, "the model rejects a batch"),
        ({"labels": torch.zeros(3)}, "labels do not fit"),
        ({"sparse": nn.Linear(32, 6)}, "different shapes"),
        ({"dense": nn.Sequential(nn.Linear(32, 5), nn.Unflatten(1, (5, 1)))}, "no logits"),
    ],
)
def test_wrong_arguments(change, message):
    model = mlp()
    given = {"dense": model, "sparse": model, "batches": samples(model, 8), **change}
    with pytest.raises(errors.MPCompileError, match=message):
        certify(given.pop("dense"), given.pop("sparse"), given.pop("batches"), progress=False, **given)


def test_different_structures_and_lowered_models_are_refused():
    model, x = mlp(), samples(mlp(), 8)
    deeper = nn.Sequential(*list(model)[:4], nn.Linear(64, 64), nn.ReLU(), model[4]).eval()
    with pytest.raises(errors.GraphError, match="linear of 4"):
        certify(model, deeper, x, tiers=(0, 1), progress=False)
    gm = transform(model, x[:2], Config(pattern="2:4"))
    lowered = mpcompile.lower(gm, x, Config(engine="reference"))
    with pytest.raises(errors.GraphError, match="the module is lowered"):
        certify(model, lowered, x, progress=False)


def test_command_line(tmp_path, monkeypatch, capsys):
    def create(name, pretrained, **_):
        model = tiny_vit()
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return model

    model = create("vit", False)
    cli.parser()  # imports all commands before a name that they share is replaced
    monkeypatch.setattr("mpcompile.sources.timm_models.create", create)
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    gm = transform(
        model, torch.randn(2, 3, 32, 32), Config(pattern="15:16", exclude=("*",), include=("blocks.1.mlp.fc2",))
    )
    mpcompile.save(gm, tmp_path / "pruned.mpc")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=pixels, labels=np.arange(6))
    common = [
        "certify",
        "vit",
        "--artifact",
        str(tmp_path / "pruned.mpc"),
        "--images",
        str(tmp_path / "set.npz"),
        "--quiet",
    ]
    out = str(tmp_path / "report.json")
    assert cli.main([*common, "--checkpoint", str(tmp_path / "dense.pt"), "--samples", "4", "--json", out]) == 0
    assert "blocks.1.mlp.fc2" in capsys.readouterr().out
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["samples"] == 4 and data["violations"] == 0 and data["tiers"][0]["settled"] is not None
    assert cli.main(common) == 2 and "dense weights are missing" in capsys.readouterr().err
