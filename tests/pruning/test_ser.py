"""The source mask of score="ser": the number of weights removed, the weights restored, and its effect on masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile.capture.importers import import_model
from mpcompile.errors import InputError
from mpcompile.pruning.ser import source_masks
from tests.support.helpers import images, mlp, tiny_vit


def sources(model: nn.Module, x: torch.Tensor, sparsity: float) -> dict:
    gm = import_model(model, x).gm
    weights = {name: p for name, p in gm.named_parameters() if name in ("0.weight", "2.weight")}
    edges = {"0.weight": 1.0, "2.weight": 2.0}
    return source_masks(gm, weights, edges, [[part] for part in x.split(16)], sparsity, progress=False)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.35, 0.6])
def test_exactly_the_wanted_share_of_weights_is_removed(sparsity):
    model, x = mlp(), torch.randn(32, 32)
    kept = sources(model, x, sparsity)
    total = sum(mask.numel() for mask in kept.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == total - round(sparsity * total)


@pytest.mark.parametrize("sparsity", [0.1, 0.2])
def test_up_to_a_fifth_weights_are_removed_by_magnitude_alone(sparsity):
    """Edges have no effect there, even if they differ: the paper's hybrid starts with exact magnitude pruning."""
    model, x = mlp(), torch.randn(32, 32)
    kept = sources(model, x, sparsity)
    magnitudes = {name: p.detach().abs() for name, p in model.named_parameters() if name in kept}
    largest_removed = max(float(magnitudes[name][~mask].max()) for name, mask in kept.items())
    smallest_kept = min(float(magnitudes[name][mask].min()) for name, mask in kept.items())
    assert largest_removed <= smallest_kept


def test_weights_that_the_network_needs_are_restored():
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(64, 32)
    with torch.no_grad():
        model[0].weight[:, :4] *= 0.05  # small weights of large inputs
    x[:, :4] *= 60
    kept = sources(model, x, 0.25)["0.weight"]
    by_size = model[0].weight.abs() >= model[0].weight.abs().flatten().sort().values[int(0.25 * kept.numel())]
    assert float(kept[:, :4].float().mean()) > float(by_size[:, :4].float().mean()) + 0.1


def test_the_dense_model_is_not_changed_and_masks_are_legal():
    model, x = tiny_vit(), images(8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    gm = mpcompile.transform(model, x, mpcompile.Config(score="ser", tome_r=2, restore=False), [x])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not any(mpcompile.passes.mask.verify(gm).values())
    assert {entry.notes["mask"]["score"] for entry in gm.plan.layers.values() if entry.pattern != "dense"} == {"ser"}
    plain = mpcompile.transform(model, x, mpcompile.Config(score="covariance", tome_r=2, restore=False), [x])
    masks = [dict(g.named_buffers())["blocks.0.mlp.fc1.mask"] for g in (gm, plain)]
    assert 0 < float((masks[0] != masks[1]).float().mean()) < 0.5


def test_the_same_data_gives_the_same_source():
    model, x = mlp(), torch.randn(32, 32)
    first, second = sources(model, x, 0.35), sources(model, x, 0.35)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals():
    x = torch.randn(16, 32)
    with pytest.raises(InputError, match="sparsity"):
        sources(mlp(), x, 1.0)
    gm = import_model(mlp(), x).gm
    with pytest.raises(InputError, match="calibration is empty"):
        source_masks(gm, {"0.weight": gm.get_parameter("0.weight")}, {"0.weight": 1.0}, [])
    config = mpcompile.Config(score="ser")
    with pytest.raises(InputError, match="read again"):
        mpcompile.transform(mlp(), x, config, iter([x]), calibrate="dense")
