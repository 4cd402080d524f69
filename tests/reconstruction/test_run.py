"""Whole runs of reconstruction, on networks two blocks deep."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import mpcompile
from mpcompile import Config, Reconstruction
from mpcompile.errors import ConfigError, GraphError
from mpcompile.reconstruction import run
from mpcompile.reconstruction.finish import Finish
from mpcompile.reconstruction.fit import Fit
from tests.support.helpers import images, randomise, tiny_vit

BATCHES = [images(8, seed=seed) for seed in range(5)]
SHORT = Reconstruction(views=2, epochs=6, precision="fp32")
ONCE = Reconstruction(views=1, epochs=1, precision="fp32")


def divergence(model, dense, x):
    with torch.no_grad():
        wanted, found = (m.eval()(x).log_softmax(-1) for m in (dense, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def decision(gm):
    assert gm.plan.passes[-1].name == "reconstruct"
    return gm.plan.passes[-1].decision


def equal(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.fixture(scope="module")
def dense():
    return tiny_vit()


@pytest.fixture(scope="module")
def masked(dense):
    """Masked, channels reordered, tokens merged, the last block's computed for the class token alone."""
    return mpcompile.transform(dense, config=Config(tome_r=2), calibration=BATCHES)


def test_outputs_come_closer_and_masks_stay(dense, masked):
    before = copy.deepcopy(masked.state_dict())
    closer = mpcompile.reconstruct(masked, dense, BATCHES, options=SHORT)
    x = images(32, seed=99)
    assert divergence(closer, dense, x) < 0.9 * divergence(masked, dense, x)
    after = closer.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in masked.state_dict().items())
    masks = [name for name in after if name.endswith("mask")]
    assert masks and all(torch.equal(after[name], before[name]) for name in masks)
    assert all(not after[name.replace("mask", "weight")][~after[name]].any() for name in masks)
    record = decision(closer)
    assert record["images"] == 40 and record["held"] == 4 and len(record["regions"]) == 4
    assert all(region["held_after"] < region["held_before"] for region in record["regions"])
    assert record["outputs"]["after"] < record["outputs"]["before"] and record["outputs"]["share"] == 1


def test_an_interrupted_run_resumes_with_the_same_bits(dense, masked, tmp_path, monkeypatch):
    options = Reconstruction(views=2, epochs=1, final_epochs=1, precision="fp32")
    random = torch.random.get_rng_state()
    whole = mpcompile.reconstruct(masked, dense, BATCHES, options=options)
    assert torch.equal(torch.random.get_rng_state(), random)
    fit, places = run.fit, []

    def killed(task, *arguments, **named):
        places.append(len(places))
        if len(places) == 3:
            raise KeyboardInterrupt
        return fit(task, *arguments, **named)

    monkeypatch.setattr(run, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        mpcompile.reconstruct(masked, dense, BATCHES, options=options, folder=tmp_path)
    # All activations in files: the values are the same.
    resumed = mpcompile.reconstruct(masked, dense, BATCHES, options=options, folder=tmp_path, memory=0)
    assert len(places) == 3 + 2  # two regions came from the folder
    assert equal(whole, resumed) and decision(whole) == decision(resumed)
    assert not equal(whole, masked)
    other = mpcompile.reconstruct(masked, dense, BATCHES[:2], options=options, folder=tmp_path)
    assert len(places) == 5 + 4 and not equal(other, whole)  # other images: nothing in the folder fits


def test_a_region_that_training_does_not_improve_keeps_its_values(dense, masked, tmp_path):
    wild = mpcompile.reconstruct(masked, dense, BATCHES[:2], options=Reconstruction(views=1, epochs=2, lr=1e3))
    reasons = [region["reason"] for region in decision(wild)["regions"]]
    assert all("did not fall" in reason or "not finite" in reason for reason in reasons)
    assert equal(wild, masked)
    # Numbers that are not finite in one block: it is reported, and the others are trained.
    broken = copy.deepcopy(masked)
    with torch.no_grad():
        broken.get_parameter("blocks.1.norm2.weight").fill_(3e38)
    kept = mpcompile.reconstruct(broken, dense, BATCHES, options=SHORT)
    mpcompile.save(kept, tmp_path / "kept.mpc")
    record = decision(mpcompile.load(tmp_path / "kept.mpc"))
    assert [region["reason"] is None for region in record["regions"]] == [True, True, True, False]
    assert "not finite" in record["regions"][-1]["reason"]


def test_what_cannot_be_computed_ends_a_run_without_losing_it(dense, masked, monkeypatch):
    enter = run.Walk.enter

    def failing(walk, step):
        if step is walk.steps[2]:
            raise RuntimeError("no memory")
        enter(walk, step)

    monkeypatch.setattr(run.Walk, "enter", failing)
    record = decision(mpcompile.reconstruct(masked, dense, BATCHES, options=SHORT))
    reasons = [region["reason"] for region in record["regions"]]
    assert reasons[:2] == [None, None] and all("no memory" in reason for reason in reasons[2:]) and len(reasons) == 4


def test_one_image_and_one_batch_size(dense, masked):
    record = decision(mpcompile.reconstruct(masked, dense, [images(1)], options=SHORT))
    assert record["held"] == 0 and any("nothing is held out" in note for note in record["notes"])
    assert all(region["after"] < region["before"] and region["held_after"] is None for region in record["regions"])
    fixed = torch.export.export(dense, (images(4),)).module()
    batches = [images(4, seed=seed) for seed in range(2)]
    gm = mpcompile.transform(fixed, images(4), calibration=batches)
    record = decision(mpcompile.reconstruct(gm, fixed, batches, options=ONCE))
    assert record["held"] == 1 and all(region["after"] < region["before"] for region in record["regions"])


def test_a_network_without_blocks_is_trained_layer_by_layer_in_the_pipeline():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)]
    model = nn.Sequential(*convs, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    randomise(model)
    gm = mpcompile.transform(model.eval(), calibration=BATCHES, calibrate="adapted", reconstruction=SHORT)
    record = next(p.decision for p in gm.plan.passes if p.name == "reconstruct")
    assert [region["kind"] for region in record["regions"]] == ["layer"]
    assert any("no block" in note for note in record["notes"])
    (region,) = record["regions"]
    assert region["held_after"] < region["held_before"]
    without = mpcompile.transform(model, calibration=BATCHES, calibrate="adapted")
    x = images(32, seed=99)
    assert divergence(gm, model, x) < divergence(without, model, x)


def test_what_cannot_be_reconstructed_is_refused(dense, masked):
    with pytest.raises(ConfigError, match=r"too short for one pass.*expected minutes="):
        mpcompile.reconstruct(masked, dense, BATCHES, minutes=1e-4)
    with pytest.raises(GraphError, match="only a masked graph"):
        mpcompile.reconstruct(dense, dense, BATCHES, options=ONCE)
    with pytest.raises(GraphError, match=r"the model that the (graph|sparse one) was made from"):
        mpcompile.reconstruct(masked, tiny_vit(mlp_ratio=2), BATCHES, options=ONCE)
    other = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(5)
    for parameter in other.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    with pytest.raises(GraphError, match="kept in the graph are not those of this model"):
        mpcompile.reconstruct(masked, other, BATCHES, options=ONCE)
    gm = mpcompile.transform(dense, images(2), reconstruction=ONCE)
    assert "no calibration data" in next(p.summary for p in gm.plan.passes if p.name == "reconstruct")


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_vit()
    gm = mpcompile.transform(model, images(2), Config(score="magnitude", tome_r=2))
    options = Reconstruction(views=2, epochs=2, final_epochs=1, precision="fp32")
    done = mpcompile.reconstruct(gm, model, BATCHES, options=options, folder=f"{folder}/kept")
    again = mpcompile.reconstruct(gm, model, BATCHES, options=options, folder=f"{folder}/kept")
    assert equal(done, again)
    torch.save([done.state_dict(), decision(done)], f"{folder}/{rank}.pt")
    dist.barrier()  # no rank exits while the other still communicates with it
    dist.destroy_process_group()


def test_two_ranks_share_the_images_and_get_the_same_result(dense, tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    (first, record), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first) and record == other
    assert record["images"] == 40 and all(r["held_after"] < r["held_before"] for r in record["regions"])
    assert len(list(Path(tmp_path / "kept").glob("*.safetensors"))) == 4


@pytest.mark.parametrize(("best", "share"), [(1.0, 1.0), (0.5, 0.5), (0.2, 0.25), (-1.0, 0.0)])
def test_the_outputs_of_the_whole_model_never_get_worse(dense, masked, monkeypatch, best, share):
    """Every region moves by 1; the loss of the outputs is least where they have moved by ``best``."""
    moved = []

    def step(task, parameters, *arguments, **named):
        parameter = next(p for name, p in parameters.items() if name.endswith("bias"))
        moved.append((parameter, parameter.detach().clone()))
        with torch.no_grad():
            parameter.add_(1)
        return Fit(2.0, 1.0, 2.0, 1.0)

    def loss(self, batches, outputs_only):
        return max(abs(float((now - old).mean()) - best) for now, old in moved)

    monkeypatch.setattr(run, "fit", step)
    monkeypatch.setattr(Finish, "measure", loss)
    result = mpcompile.reconstruct(masked, dense, BATCHES[:2], options=ONCE)
    outputs = decision(result)["outputs"]
    assert outputs["share"] == share and outputs["before"] == abs(best)
    assert outputs["after"] == pytest.approx(abs(share - best), abs=1e-5)
    assert equal(result, masked) == (not share)
    told = result.plan.passes[-1].summary
    assert ("taken back" in told) == (not share) and ("of all changes" in told) == (0 < share < 1)
