"""Distillation on two processes (gloo): equal to one process, and refused when ranks differ."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import mpcompile
from mpcompile.data import ranks
from mpcompile.errors import InputError
from mpcompile.training.distill import distill, evaluate
from mpcompile.training.policies import masked_weights
from tests.support.helpers import tiny_vit

ROOT = Path(__file__).resolve().parents[2]
# Not AdamW, which makes whole steps of rounding errors where a gradient is zero (biases of keys).
OPTIONS = {"epochs": 2, "optimizer": "sgd", "lr": 1e-3, "weight_decay": 0.05, "progress": False}


def batches(rank: int, world: int) -> list:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (4, 8), generator=generator)
    return [(a[rank::world], b[rank::world]) for a, b in zip(x, y, strict=True)]


def models() -> tuple:
    dense = tiny_vit()
    gm = mpcompile.transform(dense, torch.randn(2, 3, 32, 32), mpcompile.Config(score="magnitude", tome_r=2))
    return dense, gm


def normed() -> tuple:
    """A network with BatchNorm, which sees different images on each rank."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)).eval()
    return dense, mpcompile.transform(dense, torch.randn(2, 3, 32, 32), mpcompile.Config(score="magnitude"))


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    out = Path(folder)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    made = models()
    dense, fresh = made
    val = batches(0, 1)[:1]
    found = {}

    def trained(name: str, pair: tuple = made, **options):
        dense, gm = copy.deepcopy(pair)
        mine = [(x[rank::2], y[rank::2]) for x, y in val]
        result = distill(gm, dense, batches(rank, 2), mine, out=out / name, **{**OPTIONS, **options})
        torch.save(gm.state_dict(), out / f"{name}.{rank}.pt")
        found[name] = [result.losses, result.accuracy, result.images, result.resumed, evaluate(gm, mine)]

    trained("ddp", accumulate=2, ema=0.9)
    trained("features", features=1.0, optimizer="adamw")
    trained("norms", normed(), ema=0.5)
    trained("averaged", normed(), bn_batches=2)
    trained("fsdp", sharding="fsdp", checkpoint_steps=3)
    trained("fsdp", sharding="fsdp", resume="auto")
    refused = {}
    for name in ("masks", "code", "loss"):
        gm, data = copy.deepcopy(fresh), batches(rank, 2)
        version = ranks.__version__
        if rank == 1 and name == "masks":
            _, mask, _ = next(iter(masked_weights(gm).values()))
            mask.copy_(mask.roll(1, -1))
        if rank == 1 and name == "code":
            ranks.__version__ = "0.0.1"
        if rank == 1 and name == "loss":
            data[0] = (data[0][0] * float("nan"), data[0][1])
        try:
            distill(gm, dense, data, **OPTIONS)
        except InputError as error:
            refused[name] = str(error)
        ranks.__version__ = version
    (out / f"{rank}.json").write_text(json.dumps([found, refused]))
    dist.barrier()  # no rank exits while the other still communicates with it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return folder, *(json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))


@pytest.mark.parametrize(("name", "options"), [("ddp", {"accumulate": 2, "ema": 0.9}), ("fsdp", {})])
def test_two_processes_train_as_one_with_the_whole_batch(two, name, options):
    folder, (first, _), (second, _) = two
    dense, gm = models()
    alone = distill(gm, dense, batches(0, 1), batches(0, 1)[:1], **{**OPTIONS, **options})
    losses, accuracy, seen, *_ = first[name]
    assert losses == second[name][0] and accuracy[-1] == alone.accuracy[-1]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone.losses), atol=1e-4, rtol=1e-4)
    assert seen == alone.images
    weights = [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    for key, value in gm.state_dict().items():
        assert torch.equal(weights[0][key], weights[1][key])
        torch.testing.assert_close(weights[0][key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["norms", "averaged"])
def test_batchnorm_statistics_are_equal_on_all_ranks_and_accuracy_is_that_of_the_result(two, name):
    folder, (first, _), (second, _) = two
    weights = [torch.load(folder / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert any("running" in key for key in weights[0])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert first[name][1] == second[name][1] and first[name][1][-1] == first[name][4] == second[name][4]


def test_features_match_on_two_processes(two):
    _, (first, _), (second, _) = two
    assert first["features"] == second["features"] and first["features"][0][1] < first["features"][0][0]


def test_a_sharded_run_resumes(two):
    _, (first, _), _ = two
    assert first["fsdp"][3] == 8


def test_the_first_rank_writes(two):
    folder, _, _ = two
    lines = [json.loads(line) for line in (folder / "ddp" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4]
    assert sorted(p.name for p in (folder / "ddp").iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_ranks_that_differ_are_refused_on_both(two):
    _, (_, first), (_, second) = two
    for refused in (first, second):
        assert "masks differ between processes" in refused["masks"]
        assert "run different code" in refused["code"] and "0.0.1" in refused["code"]
        assert "step 0 is not finite" in refused["loss"]


def test_one_process_is_its_own_world():
    assert (ranks.rank(), ranks.world(), ranks.active()) == (0, 1, False)
    assert ranks.gather(3) == [3] and ranks.broadcast("a") == "a"


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "bench.robustness.kill_resume", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "kill_resume.json").read_text())["function"]["equal"]
