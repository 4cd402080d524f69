"""The whole search on two blocks: what it returns, keeps on disk, resumes and refuses."""

import json
import logging
import os

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

import mpcompile
from mpcompile import Config, optimize
from mpcompile.errors import ArtifactError, ConfigError, InputError
from mpcompile.optimization import builds, runner, search
from mpcompile.optimization.contest import Contest
from mpcompile.optimization.numbers import space
from mpcompile.optimization.recipe import Recipe
from mpcompile.optimization.runner import Runner, load_runner, runner_file
from mpcompile.runtimes.catalogue import RUNTIMES
from tests.support.helpers import images, tiny_vit


def labelled(model, count=160, size=32):
    """Images, with the dense model's own classes as labels: it is right everywhere, and changes are losses."""
    x = torch.cat([images(32, seed=seed) for seed in range(count // 32)])
    with torch.no_grad():
        return list(zip(x.split(size), model(x).argmax(1).split(size), strict=True))


@pytest.fixture(scope="module")
def vit():
    return tiny_vit(embed_dim=64, num_heads=4)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few levels and steps; builds run as they are, three times: compiling takes a minute each."""
    monkeypatch.setattr(space, "REDUCTIONS", (0.2, 0.4))
    monkeypatch.setattr(search, "LADDER", (0.3, 1.0, 3.0))
    monkeypatch.setattr(builds, "MAX_ROUNDS", 3)
    monkeypatch.setattr(builds, "MIN_ROUNDS", 3)
    monkeypatch.setattr("mpcompile.optimization.runner.compiled_with", lambda module, backend: module)


def invented(monkeypatch, time_of):
    """Let the milliseconds of a build be a function of its entry."""

    def timed(self, *_):
        keeping = [e for e in self.frontier if self.frontier.keeps(e) and self.slot(e) in self.builds]
        for entry in keeping:
            entry.latency_ms = time_of(entry)
            entry.quartiles_ms = (entry.latency_ms, entry.latency_ms)
        best = self.frontier.best_dense
        for entry in keeping:
            entry.speedup = best.latency_ms / entry.latency_ms

    monkeypatch.setattr(Contest, "time", timed)


def by_macs(entry):
    return (10.0 if entry.dense else 9.0) * (entry.macs or 1) / 1e6


OPTIONS = {"runtimes": ("torch",), "progress": False, "confidence": 0.8}


def test_the_fastest_that_keeps_the_accuracy_is_chosen(vit, monkeypatch, tmp_path):
    invented(monkeypatch, by_macs)
    data = labelled(vit)
    result = optimize(vit, data, max_drop=0.3, allow=("tokens",), out=tmp_path / "fast.mpc", **OPTIONS)
    chosen = result.chosen
    assert sum(chosen.recipe.merges) > 0 and not chosen.recipe.masked
    assert chosen.outcome.upper(0.8) <= 0.3 and chosen.outcome.labelled
    assert chosen.outcome.samples == 160  # merging is fitted to nothing: all images judge it
    kept = [e for e in result.frontier if e.latency_ms is not None]
    assert min(kept, key=lambda e: e.latency_ms) is chosen
    judged = [e for e in result.frontier if e.outcome is not None and not result.frontier.keeps(e)]
    assert all(e.verdict.startswith("drop may be") for e in judged)
    x = images(1, seed=99)
    torch.testing.assert_close(result.runner(x), result.module(x))
    saved = mpcompile.load(tmp_path / "fast.mpc").eval()
    torch.testing.assert_close(saved(x), result.module(x))
    torch.testing.assert_close(load_runner(tmp_path / "fast.mpc")(x), result.module(x))
    assert saved.plan.provenance["optimized"]["held_out_images"] == 120
    text = str(result)
    assert "as fast as the best dense build" in text and "160 held-out images" in text and "80% confidence" in text


def test_what_beats_nothing_is_returned_dense(vit, monkeypatch):
    invented(monkeypatch, lambda entry: 1.0 if entry.dense else 2.0)
    result = optimize(vit, labelled(vit), max_drop=0.3, allow=("tokens",), **OPTIONS)
    assert result.chosen.dense and result.speedup == 1
    assert "nothing beats the best dense build" in str(result)
    x = images(1, seed=9)
    torch.testing.assert_close(result.module(x), vit(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.runner(x), vit(x))


def test_masks_and_tokens_share_a_budget(vit, monkeypatch):
    result = optimize(
        vit, labelled(vit, 320), max_drop=0.45, objective="macs", config=Config(score="magnitude"), minutes=5, **OPTIONS
    )
    recipes = {e.recipe for e in result.frontier if not e.dense}
    assert any(recipe.masked for recipe in recipes)
    masked = next(e for e in result.frontier if e.recipe.masked)
    assert masked.outcome.samples == 240  # fits have seen the others
    macs = {e.recipe: e.macs for e in result.frontier if e.macs is not None and result.frontier.keeps(e)}
    assert result.chosen.macs == min(macs.values())
    graph = mpcompile.transform(vit, images(1), result.recipe.config(Config(score="magnitude")))
    assert graph.plan.macs.executed == result.chosen.macs


def test_without_labels_changed_classes_count(vit, monkeypatch):
    invented(monkeypatch, by_macs)
    data = [x for x, _ in labelled(vit)]
    result = optimize(vit, data, max_drop=0.3, allow=("tokens",), **OPTIONS)
    assert not result.chosen.outcome.labelled
    assert "class changes" in str(result) and "changed" in str(result.frontier).splitlines()[0]


def test_validation_images_judge_and_calibration_fits(vit, monkeypatch):
    invented(monkeypatch, by_macs)
    data = labelled(vit)
    fit = [x for x, _ in data[:1]]
    result = optimize(vit, fit, validation=data[1:], max_drop=0.3, allow=("tokens",), **OPTIONS)
    assert result.chosen.outcome.samples == 128


def test_a_search_resumes_from_its_folder(vit, monkeypatch, tmp_path, caplog):
    invented(monkeypatch, by_macs)
    data = labelled(vit)
    options = {"max_drop": 0.3, "allow": ("tokens",), "folder": tmp_path / "search", **OPTIONS}
    first = optimize(vit, data, **options)
    calls = []
    judge = search.Images.judge
    monkeypatch.setattr(search.Images, "judge", lambda self, *a, **k: calls.append(1) or judge(self, *a, **k))
    with caplog.at_level(logging.INFO, logger="mpcompile"):
        again = optimize(vit, data, **options)
    assert not calls and "resuming" in caplog.text
    assert again.recipe == first.recipe
    optimize(vit, data, **options, seed=1)  # another split: nothing is reused
    assert calls
    (tmp_path / "search" / "search.json").write_text("{")
    assert optimize(vit, data, **options).recipe == first.recipe


def test_targets_stop_at_the_build_that_damages_least(vit, monkeypatch):
    invented(monkeypatch, by_macs)
    data = labelled(vit)
    fastest = optimize(vit, data, max_drop=0.3, allow=("tokens",), **OPTIONS)
    enough = 1 + (fastest.speedup - 1) / 2
    result = optimize(vit, data, max_drop=0.3, allow=("tokens",), speedup=enough, **OPTIONS)
    assert enough <= result.speedup <= fastest.speedup
    assert sum(result.recipe.merges) <= sum(fastest.recipe.merges)
    with pytest.raises(InputError, match=r"cannot be reached.*expected .*ms"):
        optimize(vit, data, max_drop=0.3, allow=("tokens",), latency=1e-6, **OPTIONS)


def test_a_runtime_that_fails_is_reported_and_the_others_go_on(vit, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("an operator of a new kind")

    monkeypatch.setattr(type(RUNTIMES["onnxruntime"]), "load", refuse)
    monkeypatch.setattr(type(RUNTIMES["onnxruntime"]), "installed", True)
    monkeypatch.setattr(type(RUNTIMES["onnxruntime"]), "version", "0")
    monkeypatch.setattr(builds, "write_onnx", lambda model, example, path: path.write_bytes(b""))
    options = {**OPTIONS, "runtimes": ("torch", "onnxruntime")}
    result = optimize(vit, labelled(vit), max_drop=0.3, allow=("masks",), minutes=0.01, **options)
    failed = next(e for e in result.frontier if e.runtime == "onnxruntime")
    assert failed.verdict.startswith("failed") and "operator of a new kind" in failed.verdict


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0}, "max_drop is not a share"),
        ({"max_drop": "1%"}, "max_drop is not a number"),
        ({"confidence": 1}, "confidence is out of range"),
        ({"allow": ("int8",)}, "allow has no such value"),
        ({"runtimes": ("tensorrt",)}, "runtimes has no such value"),
        ({"objective": "speed"}, "objective has no such value"),
        ({"minutes": 0}, "minutes is out of range"),
        ({"batch": 0}, "batch is out of range"),
        ({"latency": 3, "speedup": 2}, "two targets"),
        ({"speedup": -1}, "speedup is out of range"),
        ({"latency": 3, "objective": "macs"}, "are for objective"),
        ({"config": Config(tome_r=8)}, "the search decides tome_r itself"),
        ({"config": {"score": "obs"}}, "config has the wrong type"),
    ],
)
def test_options_out_of_range_are_refused_before_the_work(options, message):
    with pytest.raises(ConfigError, match=message):
        optimize(nn.Linear(2, 2), [torch.randn(4, 2)], **options)


def test_too_few_images_say_how_many_are_needed(vit):
    with pytest.raises(InputError, match=r"too few images.*expected 71 images"):
        optimize(vit, labelled(vit, 32), max_drop=0.01, **OPTIONS)
    with pytest.raises(InputError, match="calibration is empty"):
        optimize(vit, [], **OPTIONS)


def test_models_and_data_that_do_not_fit_are_refused(vit):
    data = labelled(vit)
    with pytest.raises(InputError, match="single class"):
        optimize(tiny_vit(num_classes=1), [x for x, _ in data], max_drop=0.2, **OPTIONS)
    with pytest.raises(InputError, match="label"):
        optimize(vit, [(x, y + 10) for x, y in data], max_drop=0.2, **OPTIONS)
    with pytest.raises(ConfigError, match="in fp32"):
        optimize(tiny_vit().bfloat16(), data, **OPTIONS)
    with pytest.raises(InputError, match="too much memory"):
        optimize(vit, data, memory=1000, max_drop=0.2, **OPTIONS)
    features = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 1024)))
    with pytest.raises(InputError, match="does not return logits"):
        optimize(features, data, max_drop=0.2, **OPTIONS)


def test_a_runner_belongs_to_its_artifact(vit, tmp_path):
    gm = mpcompile.transform(vit, images(2), Config(pattern="dense", tome_r=2))
    path = tmp_path / "a.mpc"
    mpcompile.save(gm, path)
    with pytest.raises(ArtifactError, match=r"has no runner"):
        load_runner(path)
    Runner(gm, batch=2).save(path)
    x = images(2)
    torch.testing.assert_close(load_runner(path)(x), gm(x))
    record = json.loads(runner_file(path).read_text())
    for change, message in (
        ({"runtime": "tensorrt"}, "unknown runtime"),
        ({"artifact_sha256": "0" * 64}, "not the file that its runner was saved with"),
        ({"batch": "many"}, "is not a runner"),
    ):
        values = {**record["mpcompile_runner"], **change}
        runner_file(path).write_text(json.dumps({"mpcompile_runner": values}))
        with pytest.raises(ArtifactError, match=message):
            load_runner(path)
    runner_file(path).write_text("[]")
    with pytest.raises(ArtifactError, match="is not a runner"):
        load_runner(path)


def test_a_bf16_runner_takes_and_returns_fp32(vit):
    gm = mpcompile.transform(vit, images(2), Config(pattern="dense"))
    x = images(2)
    found = Runner(gm, precision="bf16", batch=2)(x)
    assert found.dtype is torch.float32
    assert 0 < float((found - gm(x)).norm() / gm(x).norm()) < 0.1
    assert next(gm.parameters()).dtype is torch.float32


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runner_of_another_runtime_is_saved_with_its_file(vit, runtime, tmp_path):
    if not RUNTIMES[runtime].installed:
        pytest.skip(f"{runtime} is not installed")
    gm = mpcompile.transform(vit, images(2), Config(pattern="dense", tome_r=2))
    found = builds.Workshop(tmp_path, images(2)).build(gm, runtime, "fp32")
    path = tmp_path / "b.mpc"
    mpcompile.save(gm, path)
    found.hold_file()
    found.save(path)
    again = load_runner(path)
    x = images(2)
    torch.testing.assert_close(again(x), gm(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(again(x[:1]), gm(x)[:1], rtol=1e-3, atol=1e-4)
    path.with_suffix(".onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"b\.onnx is not the file"):
        load_runner(path)


def test_wrong_builds_are_not_used(vit, tmp_path):
    gm = mpcompile.transform(vit, images(2), Config(pattern="dense"))
    shop = builds.Workshop(tmp_path, images(2))
    with pytest.raises(InputError, match="returns wrong outputs"):
        shop.checked(lambda module: lambda x: 2 * module(x), gm)
    with pytest.raises(InputError, match="cannot run it: RuntimeError: no"):

        def refuse(_):
            raise RuntimeError("no")

        shop.checked(refuse, gm)


def test_recipes_are_configs_of_transform(vit):
    recipe = Recipe((3, 0), (("blocks.0.mlp.fc1", "8:16"),))
    gm = mpcompile.transform(vit, images(2), recipe.config(Config(score="magnitude")))
    assert {name for name in gm.plan.masked} == {"blocks.0.mlp.fc1"}
    assert gm.plan.tokens == [17, 14, 14]


def worker(rank, folder):
    """One of two processes: the same search, with its share of the images."""
    os.environ["MPCOMPILE_TIMING"] = "off"
    builds.MAX_ROUNDS = builds.MIN_ROUNDS = 3
    space.REDUCTIONS = (0.2, 0.4)
    runner.compiled_with = lambda module, backend: module
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = tiny_vit(embed_dim=64, num_heads=4)
    result = optimize(model, labelled(model), max_drop=0.3, allow=("tokens",), objective="macs", **OPTIONS)
    values = {"frontier": result.frontier.to_dict()["entries"], "recipe": result.recipe.record()}
    with open(f"{folder}/{rank}.json", "w", encoding="utf-8") as file:
        json.dump({**values, "runner": result.runner is not None}, file)
    torch.distributed.barrier()  # no rank exits while the other still communicates with it
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_images_and_agree(vit, tmp_path):
    alone = optimize(vit, labelled(vit), max_drop=0.3, allow=("tokens",), objective="macs", **OPTIONS)
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["runner"] and not second["runner"]
    assert first["recipe"] == second["recipe"] == json.loads(json.dumps(alone.recipe.record()))
    outcomes = [[entry["outcome"] for entry in part["frontier"] if entry["outcome"]] for part in (first, second)]
    assert outcomes[0] == outcomes[1]
    found = {json.dumps(o["changed"]) for o in outcomes[0]}
    assert found == {json.dumps(e.outcome.changed) for e in alone.frontier if e.outcome is not None}


def test_files_of_others_are_not_replaced(vit, tmp_path):
    (tmp_path / "fast.onnx").write_bytes(b"somebody's model")
    with pytest.raises(ArtifactError, match=r"fast\.onnx would be replaced"):
        optimize(vit, labelled(vit), max_drop=0.3, out=tmp_path / "fast.mpc", **OPTIONS)
    assert (tmp_path / "fast.onnx").read_bytes() == b"somebody's model"
    with pytest.raises(ArtifactError, match="is a folder"):
        optimize(vit, labelled(vit), max_drop=0.3, out=f"{tmp_path}/", **OPTIONS)
    with pytest.raises(ArtifactError):
        optimize(vit, labelled(vit), max_drop=0.3, out=tmp_path / "missing" / "fast.mpc", **OPTIONS)


def test_times_of_another_machine_decide(vit, tmp_path):
    layers = [
        {"name": name, "shape": list(weight.shape), "pattern": "2:4", "tokens": 17, "us": us, "dense_us": 10.0}
        for name, us in {"fc1": 2.0, "fc2": 20.0}.items()
        for weight in [getattr(vit.blocks[0].mlp, name).weight]
    ]
    (tmp_path / "t.json").write_text(json.dumps({"layers": layers, "machine": "Cray-1, 1 thread", "cache": ""}))
    options = {**OPTIONS, "config": Config(score="magnitude"), "allow": ("masks",), "max_drop": 0.9}
    result = optimize(vit, labelled(vit), timings=tmp_path / "t.json", **options)
    masked = dict(result.recipe.patterns)
    assert masked and set(masked.values()) == {"2:4"}
    assert all("fc1" in name for name in masked)  # fc2 would be slower there, and nothing else was timed
    assert "Cray-1" in str(result) and "predicted" in str(result)
    with pytest.raises(ArtifactError, match="is not the JSON of mpcompile explain"):
        (tmp_path / "u.json").write_text("{}")
        optimize(vit, labelled(vit), timings=[tmp_path / "u.json"], **options)
    with pytest.raises(ConfigError, match="a target needs a measured latency"):
        optimize(vit, labelled(vit), timings=tmp_path / "t.json", speedup=2, **options)
