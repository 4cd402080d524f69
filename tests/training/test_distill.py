"""Distillation: the loss, the masks, the options, and the accuracy of the result."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpcompile
from mpcompile.errors import GraphError, InputError
from mpcompile.training.distill import Training, distill, evaluate
from mpcompile.training.features import pair
from mpcompile.training.losses import distillation_loss, parameter_groups
from mpcompile.training.policies import masked_weights, masks_digest
from tests.support.distilling import Breaking, Stop, data, data_val, loader, mlp, run, same, student
from tests.support.helpers import images, tiny_vit


def test_the_loss_is_the_one_of_the_paper():
    torch.manual_seed(0)
    s, t, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    target = torch.full((4, 5), 0.1 / 5)
    target[torch.arange(4), y] += 0.9
    hard = -(target * s.log_softmax(-1)).sum(-1).mean()
    p = (t / 2).softmax(-1)
    soft = (p * (p.log() - (s / 2).log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(s, t, y, 0.5, 2.0, 0.1), 0.5 * hard + 0.5 * 4 * soft)
    torch.testing.assert_close(distillation_loss(s, t, None, 1.0, 2.0, 0.1), 4 * soft)


def test_weight_decay_applies_to_matrices_and_kernels():
    model = tiny_vit()
    decayed, rest = sorted(parameter_groups(model, 0.1), key=lambda group: -group["weight_decay"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert rest["weight_decay"] == 0
    assert {names[id(p)] for p in decayed["params"]} == {
        n for n, p in model.named_parameters() if p.dim() >= 2 and n not in ("cls_token", "pos_embed")
    }


def test_masks_hold_after_every_step_and_training_lowers_the_loss():
    model = mlp()
    gm = student(model)
    before = masks_digest(gm)
    found = distill(gm, model, loader(), epochs=8, lr=1e-2, weight_decay=0.1, progress=False)
    assert found.losses[-1] < found.losses[0] and found.steps == 48 and found.images == 8 * 48
    assert masks_digest(gm) == before
    assert all(bool((w[~m] == 0).all()) for w, m, _ in masked_weights(gm).values())
    assert not gm.training


@pytest.mark.parametrize("options", [{"optimizer": "sgd"}, {"ema": 0.9, "accumulate": 4}, {"precision": "bf16"}])
def test_options_train_and_keep_masks(options):
    model = mlp()
    dense = copy.deepcopy(model)
    gm = run(model, epochs=2, clip=1.0, **options)
    assert all(bool((w[~m] == 0).all()) for w, m, _ in masked_weights(gm).values())
    assert not same(gm, student(model)) and same(model, dense)


def test_accumulated_batches_are_one_large_batch():
    model = mlp()
    model[2] = nn.Identity()
    x, y = data()[:]
    whole = run(model, train=[(x[i : i + 16], y[i : i + 16]) for i in (0, 16)], epochs=2)
    parts = run(model, train=[(x[i : i + 4], y[i : i + 4]) for i in range(0, 32, 4)], epochs=2, accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["sr-ste", "gradual"])
def test_moving_masks_end_legal_and_removed_weights_come_back(method):
    model = mlp()
    gm = student(model)
    gm.load_state_dict(model.state_dict(), strict=False)
    before = masks_digest(gm)
    distill(gm, model, loader(), epochs=4, lr=3e-2, method=method, progress=False)
    for weight, mask, pattern in masked_weights(gm).values():
        assert bool((weight[~mask] == 0).all())
        assert bool((mask.unflatten(1, (-1, pattern.m)).sum(-1) == pattern.n).all())
    assert masks_digest(gm) != before
    x = data()[:4][0]
    expected = gm(x)
    gm = copy.deepcopy(gm)  # nothing of the method is left in the layers
    torch.testing.assert_close(gm(x), expected)


def test_the_callers_random_numbers_are_left_alone():
    model = mlp()
    torch.manual_seed(3)
    run(model, epochs=1)
    after = torch.rand(1)
    torch.manual_seed(3)
    student(model)  # draws example inputs
    assert torch.equal(after, torch.rand(1))


def test_features_compare_reordered_channels_with_their_own():
    model, x = tiny_vit(), images(8)
    passes = list(mpcompile.Pipeline())[:3]  # reordered, not masked
    gm = mpcompile.transform(model, x, mpcompile.Config(permute=True), [x], pipeline=mpcompile.Pipeline(passes))
    assert any("order" in entry for entry in gm.plan.passes[-1].decision["classes"])
    both = pair(gm, model, [x])
    assert both.blocks == ["blocks.0", "blocks.1"]
    with torch.no_grad():
        (ours, found), (theirs, wanted) = both.student(x), both.teacher(x)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert float(both.loss(found, wanted)) < 1e-9
    both.orders = [None, None]
    assert float(both.loss(found, wanted)) > 0.1


@pytest.mark.parametrize("r", [0, 2])
def test_feature_matching_brings_block_outputs_closer(r):
    model, x = tiny_vit(), images(16)
    gm = mpcompile.transform(model, x, mpcompile.Config(score="magnitude", tome_r=r))
    measure = pair(gm, model, [x])
    with torch.no_grad():
        before = float(measure.loss(measure.student(x)[1], measure.teacher(x)[1]))
    batches = [(x, torch.zeros(16).long())] * 4
    distill(gm, model, batches, lr=3e-3, alpha=1.0, features=30.0, progress=False)
    with torch.no_grad():
        after = float(measure.loss(measure.student(x)[1], measure.teacher(x)[1]))
    assert after < 0.6 * before
    assert all(bool((w[~m] == 0).all()) for w, m, _ in masked_weights(gm).values())


def test_batchnorm_is_reestimated():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    model = nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.BatchNorm2d(16), nn.ReLU(), *tail).eval()
    x = images(16, 12)
    gm = mpcompile.transform(model, x, mpcompile.Config(score="magnitude"))
    batches = [(x, torch.zeros(16).long())]
    distill(gm, model, batches, epochs=1, lr=1e-9, bn_batches=1, progress=False)
    with torch.no_grad():
        expected = gm.get_submodule("0")(x).mean((0, 2, 3))
    torch.testing.assert_close(gm.get_submodule("1").running_mean, expected, atol=1e-5, rtol=1e-4)


def test_batchnorm_of_a_locked_graph_is_reestimated():
    """A model with different paths in training and evaluation is traced for one of them."""

    class Locked(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return (x + x) / 2 if self.training else x

    torch.manual_seed(0)
    model = Locked(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 5)).eval()
    gm = student(model)
    with pytest.raises(GraphError):
        gm.train()
    distill(gm, model, loader(), epochs=1, bn_batches=2, progress=False)
    norm = next(module for module in gm.modules() if isinstance(module, nn.BatchNorm1d))
    assert norm.num_batches_tracked == 2 and norm.momentum == 0.1 and not norm.training


def test_cached_logits_give_the_same_result_with_fewer_teacher_calls():
    class Counting(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    model = mlp()
    x, y = data()[:]
    dataset = TensorDataset(x, y, torch.arange(len(x)))
    results, calls = [], []
    for cache in (False, True):
        teacher = Counting(model)
        gm = student(model)
        distill(gm, teacher, DataLoader(dataset, 8, shuffle=True), epochs=3, cache=cache, progress=False)
        results.append(gm)
        calls.append(teacher.calls)
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert calls[0] == 18 and calls[1] <= 12


def test_labels_are_ignored_when_only_the_teacher_counts():
    x, y = data()[:]
    model, weights = mlp(), []
    for labels in (y, torch.full_like(y, -1), y.float()):
        weights.append(run(model, train=[(x, labels)], alpha=1.0, epochs=1))
    assert same(weights[0], weights[1]) and same(weights[0], weights[2])


@pytest.mark.parametrize("options", [{"method": "sr-ste"}, {"method": "gradual"}, {"method": "sr-ste", "ema": 0.9}])
def test_accuracy_with_moving_masks_is_that_of_the_result(options):
    model, val = mlp(), data_val()
    gm = student(model)
    gm.load_state_dict(model.state_dict(), strict=False)
    found = distill(gm, model, loader(), val, epochs=2, lr=3e-2, progress=False, **options)
    assert found.accuracy[-1] == evaluate(gm, val)
    broken = student(model)
    broken.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(Stop):
        distill(broken, model, Breaking(loader(), 7), progress=False, epochs=2, lr=3e-2, **options)
    assert not any("forward" in vars(module) for module in broken.modules())  # nothing of the method is left
    assert all(bool((weight[~mask] == 0).all()) for weight, mask, _ in masked_weights(broken).values())


def test_evaluation_counts_right_answers():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
        model.bias.zero_()
    batches = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])), (torch.eye(2)[:1], torch.tensor([0]))]
    assert evaluate(model, batches) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(model, [])


def test_training_options_round_trip():
    training = Training(lr=3e-4, features=1.0)
    assert Training.from_options(training.to_dict()) == training
    assert Training(warmup=500).warmup_steps(100) == 99 and Training(warmup=0.1).warmup_steps(100) == 10
