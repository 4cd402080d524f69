"""Interrupted distillation: the state that a checkpoint restores, and checkpoints that are refused."""

from __future__ import annotations

import copy
import json
import resource

import pytest
import torch

from mpcompile.errors import ArtifactError, InputError
from mpcompile.training import checkpoint, events
from mpcompile.training.distill import distill
from tests.support.distilling import Breaking, Raising, Stop, data, data_val, loader, mlp, refused, same, student


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


def test_a_finished_run_resumes_to_its_result(tmp_path):
    model = mlp()
    gm = student(model)
    distill(gm, model, loader(), out=tmp_path, epochs=1, progress=False)
    again = student(model)
    found = distill(again, model, loader(), out=tmp_path, epochs=1, resume="auto", progress=False)
    assert same(again, gm) and found.resumed == found.steps == 6


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
    logged = [[(e["event"], e["step"]) for e in log if e["event"] != "resume"] for log in logs]
    assert logged[0] == logged[1]
    again = student(model)  # resumes a finished run
    distill(again, model, loader(), val, out=tmp_path / "run", resume="auto", **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("end") == 1 and same(again, whole)


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """The operating system refuses a write in the middle of the second checkpoint, as on a full disk."""
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
    refused(ArtifactError, "room, found File too large.*is intact", model=model, out=tmp_path)
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
def test_weights_that_are_not_finite_are_not_saved(tmp_path, lr):
    """The loss was finite, but after the step the weights or their outputs are not."""
    x, y = data()[:]
    options = {"epochs": 1, "lr": lr, "warmup": 0, "optimizer": "sgd", "out": tmp_path}
    refused(InputError, "after step 1 the student's weights or outputs are not finite", train=[(x, y)], **options)
    assert not (tmp_path / checkpoint.NAME).exists()
