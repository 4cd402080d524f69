"""Whole runs of reconstruction, on networks two blocks deep."""

import torch

import mpcompile
from mpcompile import Config, Reconstruction
from tests.support.helpers import images, tiny_vit

BATCHES = [images(8, seed=seed) for seed in range(5)]
SHORT = Reconstruction(views=2, epochs=6)


def divergence(model, dense, x):
    with torch.no_grad():
        wanted, found = (m.eval()(x).log_softmax(-1) for m in (dense, model))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_outputs_come_closer_and_masks_stay():
    model = tiny_vit()
    gm = mpcompile.transform(model, config=Config(tome_r=2), calibration=BATCHES)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    closer = mpcompile.reconstruct(gm, model, BATCHES, options=SHORT)
    x = images(32, seed=99)
    assert divergence(closer, model, x) < 0.9 * divergence(gm, model, x)
    after = closer.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())
    masks = [name for name in after if name.endswith("mask")]
    assert masks and all(torch.equal(after[name], before[name]) for name in masks)
    assert all(not after[name.replace("mask", "weight")][~after[name]].any() for name in masks)
    record = closer.plan.passes[-1].decision
    assert record["images"] == 40 and record["held"] == 4 and len(record["regions"]) == 4
    assert all(region["held_after"] < region["held_before"] for region in record["regions"])
