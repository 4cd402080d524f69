"""MACs: the published and derived figures at full size, counted from tensors."""

import operator

import pytest
import timm
import torch

from mpcompile import Config, Pipeline, transform
from mpcompile.ir.macs import count
from mpcompile.ir.shapes import propagate
from mpcompile.passes.mask import Mask
from mpcompile.passes.merge_tokens.insert import MergeTokens
from tests.support.helpers import images, mlp, tiny_vit

FIGURES = [
    ("vit_base_patch16_224", "2:4", 8, {}, 17.5638, 59.81, 61.10),
    ("deit_small_patch16_224", "2:4", 8, {}, 4.599, 58.57, 59.80),
    ("resnet50", "2:4", 0, {}, 4.089, 48.53, 48.53),
    ("convnextv2_base", "12:16", 0, {}, 15.355, 24.59, 24.59),
    ("convnextv2_base", "12:16", 0, {"exclude": ("stem", "head", "depthwise", "*.downsample.*")}, 15.355, 24.09, 24.09),
]


@pytest.mark.parametrize(("name", "pattern", "r", "options", "dense", "paper", "executed"), FIGURES)
def test_known_figures(name, pattern, r, options, dense, paper, executed):
    config = Config(pattern, tome_r=r, score="magnitude", **options)
    macs = transform(
        timm.create_model(name), images(1, 224), config, pipeline=Pipeline([Mask(), MergeTokens()])
    ).plan.macs
    assert macs.dense / 1e9 == pytest.approx(dense, abs=6e-4)
    assert round(100 * macs.paper_reduction, 2) == paper
    assert round(100 * macs.reduction, 2) == executed


def test_batch_size_does_not_matter():
    plans = [transform(tiny_vit(), images(b), Config(tome_r=3, score="magnitude")).plan for b in (1, 4)]
    assert plans[0].macs == plans[1].macs
    assert plans[0].macs.matching > 0


def test_layers_add_up():
    plan = transform(mlp(), torch.randn(2, 32), Config("1:4", score="magnitude")).plan
    assert plan.macs.dense == 32 * 48 + 48 * 64 + 64 * 5 == sum(x.macs_dense for x in plan.layers.values())
    assert plan.macs.executed == (32 * 48 + 48 * 64) // 4 + 64 * 5
    assert operator.eq(plan.macs.executed, sum(x.macs_executed for x in plan.layers.values()))


def test_a_weight_that_is_not_nm_counts_as_dense():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    layer = gm.get_submodule("0")
    with torch.no_grad():
        layer.weight[5, 0:4] = 1.0  # one illegal group in storage
    propagate(gm, [torch.randn(2, 32)])
    macs, per_layer = count(gm)
    assert per_layer["0"] == 32 * 48
    assert macs.executed == 32 * 48 + 48 * 64 // 2 + 64 * 5
