"""Training a student that computes its last block for one token: as one that computes all, with each kind of masks."""

import copy

import pytest
import torch

from mpcompile import Config, transform
from mpcompile.training.distill import distill
from mpcompile.training.features import pair
from mpcompile.training.policies import masked_weights, masks_digest
from tests.support.helpers import images, relative, tiny_vit

QKV = "blocks.1.attn.qkv"
METHODS = {"frozen": {}, "sr-ste": {"sr_ste_decay": 1e-2}, "gradual": {}}


@pytest.mark.parametrize("method", METHODS)
def test_equal_steps(method):
    model, x = tiny_vit(), images(2)
    options = {"pattern": "2:4", "score": "magnitude", "tome_r": 2}
    whole, parts = (transform(model, x, Config(skip_dead_tokens=skip, **options)) for skip in (False, True))
    batches = [images(4) for _ in range(3)]
    for student in (whole, parts):
        assert set(masked_weights(student)) == set(student.plan.masked)
        options = {"method": method, "optimizer": "sgd", "lr": 3e-2, "alpha": 1.0, **METHODS[method]}
        distill(student, model, batches, epochs=2, progress=False, **options)
    before = model.get_parameter(f"{QKV}.weight")
    assert relative(parts.get_parameter(f"{QKV}.weight"), before) > 1e-3
    for name, value in parts.named_parameters():
        torch.testing.assert_close(value, whole.get_parameter(name), rtol=1e-3, atol=1e-4)
    assert masks_digest(parts) == masks_digest(whole)
    weight, mask, _ = masked_weights(parts)[QKV]
    assert bool((weight[~mask] == 0).all()) and relative(parts(x), whole(x)) < 1e-3
    assert torch.equal(copy.deepcopy(parts)(x), parts(x))


@pytest.mark.parametrize("r", [0, 2])
def test_features_of_the_tokens_that_the_student_computes(r):
    model, x = tiny_vit(), images(2)
    student = transform(model, x, Config("2:4", score="magnitude", tome_r=r))
    matched = pair(student, model, (x,))
    assert matched.blocks == ["blocks.0", "blocks.1"] and matched.tokens == [None, slice(0, 1)]
    ours, theirs = matched.student(x)[1], matched.teacher(x)[1]
    assert ours[1][0].shape == (2, 1, 32) and theirs[1][0].shape == (2, 17, 32)
    if r == 0:
        targets = theirs[0][0], theirs[1][0][:, :1]
        errors = [(o - t).square().sum() / t.square().sum() for (o, _), t in zip(ours, targets, strict=True)]
        torch.testing.assert_close(matched.loss(ours, theirs), sum(errors) / 2)
    found = distill(
        student, model, [images(4)] * 3, epochs=3, lr=3e-3, features=1.0, method="sr-ste", alpha=1.0, progress=False
    )
    assert found.losses[-1] < found.losses[0]
