"""Distillation: the loss, the masks, what comes back after an interruption, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import resource

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpcompile
from mpcompile.errors import ArtifactError, ConfigError, GraphError, InputError
from mpcompile.training import checkpoint, events
from mpcompile.training.distill import Training, distill, evaluate
from mpcompile.training.features import pair
from mpcompile.training.losses import distillation_loss, parameter_groups
from mpcompile.training.policies import masked_weights, masks_digest
from tests.support.helpers import images, tiny_vit


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


def data(count: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator)
    return TensorDataset(x, torch.randint(0, 5, (count,), generator=generator))


def loader(batch: int = 8, **kwargs) -> DataLoader:
    return DataLoader(data(), batch, shuffle=True, **kwargs)


def student(model: nn.Module, config: mpcompile.Config | None = None) -> nn.Module:
    return mpcompile.transform(model.eval(), torch.randn(2, 16), config or mpcompile.Config(score="magnitude"))


def run(model: nn.Module, **kwargs) -> nn.Module:
    gm = student(model)
    kwargs = {"lr": 1e-2, "progress": False, **kwargs}
    distill(gm, model, kwargs.pop("train", None) or loader(), **kwargs)
    return gm


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class Stop(BaseException):
    pass


class Raising(list):
    """A loader that says it has three batches, and raises when it is read, or yields nothing."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__([None] * 3)
        self.error = error

    def __iter__(self):
        if self.error is not None:
            raise self.error
        return iter(())


class Breaking:
    """A loader that breaks off after so many batches in all."""

    def __init__(self, inner: DataLoader, count: int) -> None:
        self.inner, self.left = inner, count

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self):
        for batch in self.inner:
            if not self.left:
                raise Stop
            self.left -= 1
            yield batch


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


def test_what_decays():
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


@pytest.mark.parametrize("stop", [1, 6, 13])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "accumulate": 2}, {"method": "gradual"}])
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, stop, options):
    model = mlp()
    options = {"epochs": 3, "lr": 1e-2, "checkpoint_steps": 2, "progress": False, **options}
    gm = student(model)
    whole = distill(gm, model, loader(), data_val(), out=tmp_path / "whole", **options)
    broken = student(model)
    with pytest.raises(Stop):
        distill(broken, model, Breaking(loader(), stop), data_val(), out=tmp_path / "run", **options)
    broken = student(model)
    found = distill(broken, model, loader(), data_val(), out=tmp_path / "run", resume="auto", **options)
    assert same(broken, gm)
    assert (found.losses, found.accuracy, found.images) == (whole.losses, whole.accuracy, whole.images)


def data_val() -> list:
    x, y = data(20, 1)[:]
    return list(zip(x.split(7), y.split(7), strict=True))


def test_a_finished_run_resumes_to_its_result(tmp_path):
    model = mlp()
    gm = student(model)
    distill(gm, model, loader(), out=tmp_path, epochs=1, progress=False)
    again = student(model)
    found = distill(again, model, loader(), out=tmp_path, epochs=1, resume="auto", progress=False)
    assert same(again, gm) and found.resumed == found.steps == 6


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


def test_batchnorm_is_estimated_anew():
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


def test_batchnorm_of_a_locked_graph_is_estimated_too():
    """A model that takes other paths in training than in evaluation is traced for one of them."""

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


def test_cached_logits_change_nothing_and_spare_the_teacher():
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


def refused(error, match, model=None, gm=None, **kwargs):
    model = model or mlp()
    with pytest.raises(error, match=match):
        distill(gm or student(model), kwargs.pop("teacher", model), progress=False, **{"train": loader(), **kwargs})


def test_bad_input_is_refused():
    x, y = data()[:]
    refused(InputError, "label is out of range.*0 to 4.*found 9", train=[(x, y), (x, torch.full_like(y, 9))])
    refused(InputError, "out of range.*found -1", train=[(x, torch.full_like(y, -1))])
    refused(InputError, "different classes", teacher=nn.Linear(16, 7))
    refused(InputError, "no masks", gm=mlp())
    refused(InputError, "nothing to train on", train=[])
    refused(InputError, "no length", train=iter([(x, y)]))
    refused(InputError, "no labels", train=[x])
    refused(InputError, "labels have the wrong", train=[(x, y.float())])
    refused(InputError, "batch is empty", train=[(x[:0], y[:0])])
    refused(InputError, r"teacher fails on a batch: mat1.*\(48, 4\)", train=[(x[:, :4], y)])
    refused(InputError, "fails on a batch.*uint8", train=[(x.byte(), y)])
    refused(InputError, "batch 0 of epoch 1 cannot be read: 'gone'", train=Raising(KeyError("gone")))
    refused(InputError, "yields nothing", train=Raising(None), features=1.0)
    refused(InputError, "batch 0 of epoch 1 cannot be read: lost", train=Raising(OSError("lost")), features=1.0)
    refused(InputError, "val cannot be.*no batch", val=[])
    refused(InputError, "val cannot be.*read once", val=iter([(x, y)]))
    refused(InputError, "evaluation failed.*out of range.*found 9", val=[(x, torch.full_like(y, 9))], epochs=1)
    refused(InputError, "0.weight: weights in half.*float32, found torch.float16", gm=student(mlp()).half())
    refused(InputError, "no parameter.*can be trained", gm=student(mlp()).requires_grad_(False))
    refused(InputError, "cache=True needs", cache=True)
    refused(ConfigError, "no option 'epoch'.*Did you mean 'epochs'", epoch=3)
    refused(ConfigError, "out of range", alpha=2.0)
    refused(ConfigError, "wrong type", epochs="3")
    refused(ConfigError, "needs a folder", resume="auto")
    refused(ConfigError, "fsdp", sharding="fsdp", ema=0.9)


def test_labels_do_not_count_where_the_teacher_alone_is_learnt_from():
    x, y = data()[:]
    model, weights = mlp(), []
    for labels in (y, torch.full_like(y, -1), y.float()):
        weights.append(run(model, train=[(x, labels)], alpha=1.0, epochs=1))
    assert same(weights[0], weights[1]) and same(weights[0], weights[2])


def test_a_loader_that_yields_less_than_it_says(tmp_path):
    class Short(Breaking):
        def __iter__(self):
            return itertools.islice(iter(self.inner), self.left)

    refused(InputError, "yields nothing", train=Short(loader(), 0))
    refused(InputError, "fewer batches", train=Short(loader(), 2), out=tmp_path)


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(tmp_path):
    x, y = data()[:]
    bad = [(x, y), (x, y), (x * float("nan"), y)]
    refused(
        InputError, "step 2 is not finite.*checkpoint is .*checkpoint.pt", train=bad, out=tmp_path, checkpoint_steps=1
    )
    assert checkpoint.read(tmp_path / checkpoint.NAME)["step"] == 2


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, clip):
    model = mlp()
    gm, calls = student(model), []

    def poison(grad):
        calls.append(1)
        return grad * float("nan") if len(calls) == 3 else grad

    next(gm.parameters()).register_hook(poison)
    refused(
        InputError,
        "gradient of step 2 is not finite.*last good checkpoint",
        model,
        gm=gm,
        out=tmp_path,
        checkpoint_steps=1,
        clip=clip,
    )
    assert all(bool(torch.isfinite(p).all()) for p in gm.parameters())
    assert checkpoint.read(tmp_path / checkpoint.NAME)["step"] == 2


@pytest.mark.parametrize("lr", [1e30, 1e38])
def test_weights_that_blow_up_are_no_good_checkpoint(tmp_path, lr):
    """The loss was finite; what the last step made of the weights is not, or gives outputs that aren't."""
    x, y = data()[:]
    options = {"epochs": 1, "lr": lr, "warmup": 0, "optimizer": "sgd", "out": tmp_path}
    refused(InputError, "after step 1 the student's weights or outputs are not finite", train=[(x, y)], **options)
    assert not (tmp_path / checkpoint.NAME).exists()


def test_an_evaluation_that_fails_costs_no_epoch(tmp_path):
    model, val = mlp(), data_val()
    options = {"epochs": 2, "lr": 1e-2, "progress": False}
    whole = student(model)
    wanted = distill(whole, model, loader(), val, out=tmp_path / "whole", **options)
    gm = student(model)
    with pytest.raises(
        InputError, match=r"evaluation failed: batch 0 of evaluation cannot be read: gone.*checkpoint.pt"
    ):
        distill(gm, model, loader(), Raising(OSError("gone")), out=tmp_path / "run", **options)
    gm = student(model)
    found = distill(gm, model, loader(), val, out=tmp_path / "run", resume="auto", **options)
    assert found.resumed == 6 and same(gm, whole)
    assert (found.losses, found.accuracy) == (wanted.losses, wanted.accuracy)
    logs = [events.read(tmp_path / name / "log.jsonl") for name in ("whole", "run")]
    told = [[(e["event"], e["step"]) for e in log if e["event"] != "resume"] for log in logs]
    assert told[0] == told[1]
    again = student(model)  # of a finished run
    distill(again, model, loader(), val, out=tmp_path / "run", resume="auto", **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("end") == 1 and same(again, whole)


@pytest.mark.parametrize("options", [{"method": "sr-ste"}, {"method": "gradual"}, {"method": "sr-ste", "ema": 0.9}])
def test_accuracy_with_moving_masks_is_of_what_the_result_would_be(options):
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


def test_a_file_that_can_not_grow_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """The operating system refuses a write in the midst of the second checkpoint, as it does on a full disk."""
    model = mlp()
    write, limits = checkpoint.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(path, state):
        most = (path.stat().st_size // 2, limits[1]) if path.exists() else limits
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        try:
            write(path, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(checkpoint, "write", limited)
    refused(ArtifactError, "room, found File too large.*is whole", model=model, out=tmp_path)
    monkeypatch.undo()
    assert checkpoint.read(tmp_path / checkpoint.NAME)["step"] == 6
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    gm = student(model)
    assert distill(gm, model, loader(), out=tmp_path, resume="auto", progress=False).resumed == 6


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    refused_by = {"epochs": 1, "out": tmp_path}
    model = mlp()
    distill(student(model), model, loader(), progress=False, **refused_by)
    refused(ArtifactError, "earlier run", model=model, **refused_by)
    refused(ArtifactError, "expected lr=0.0001, found lr=0.1", model=model, resume="auto", lr=0.1, **refused_by)
    path = tmp_path / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:1000])
    refused(ArtifactError, "cannot be read as a checkpoint.*a damaged file", model=model, resume="auto", **refused_by)


def test_other_images_or_another_teacher_are_another_run(tmp_path):
    model = mlp()
    options = {"epochs": 1, "out": tmp_path}
    distill(student(model), model, loader(), fingerprint="photos", progress=False, **options)
    refused(
        ArtifactError,
        "expected images photos, found images other",
        model,
        resume="auto",
        fingerprint="other",
        **options,
    )
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias += 1
    options |= {"fingerprint": "photos", "resume": "auto"}
    refused(ArtifactError, "another run.*teacher", model, teacher=other, **options)


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
