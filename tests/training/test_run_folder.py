"""The checkpoint that a run resumes from: the type and range of every field are checked."""

import copy
import functools
import operator
import os

import pytest
import torch

from mpcompile import Config, cli, distill, transform
from mpcompile.errors import ArtifactError
from mpcompile.training import checkpoint
from tests.support.helpers import labelled_images, mlp


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 32, generator=draw), torch.randint(0, 5, (8,), generator=draw)) for _ in range(3)]


class Stop(Exception):
    pass


def run(folder, stop=None, **options):
    """A run of 2 epochs of 3 steps; ``stop`` ends it after that many checkpoints."""
    model = mlp()
    student = transform(model, torch.randn(2, 32), Config(pattern="2:4"))
    write, count = checkpoint.write, [0]

    def counted(path, state):
        write(path, state)
        count[0] += 1
        if count[0] == stop:
            raise Stop

    checkpoint.write = counted
    try:
        return distill(
            student, model, batches(), epochs=2, checkpoint_steps=1, ema=0.9, out=folder, progress=False, **options
        )
    except Stop:
        return None
    finally:
        checkpoint.write = write


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """The state of a run interrupted after step 4 of 6."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, stop=4)
    return checkpoint.read(folder / checkpoint.NAME)


def test_a_run_resumes(broken_off, tmp_path):
    checkpoint.write(tmp_path / checkpoint.NAME, broken_off)
    assert run(tmp_path, resume="auto").resumed == broken_off["step"]


GONE = object()
TENSOR = torch.ones(3, 7)
CHANGES = [
    *[((name,), GONE) for name in checkpoint.State.__required_keys__],
    *[(("step",), value) for value in (-5, "x", 10**9, None, 1.5, True, float("nan"), 2)],
    *[(("evaluated",), value) for value in ("x", None, 3, False)],
    *[(("loss_sum",), value) for value in ("x", None, float("nan"), float("inf"), [])],
    *[(("result",), value) for value in ("x", None, {}, [])],
    *[(("result", name), value) for name in ("losses", "accuracy", "steps", "images") for value in ("x", -1, GONE)],
    *[(("result", "losses"), value) for value in ([], ["x"], [1.0, 2.0], [float("nan")])],
    *[(("student",), value) for value in ({}, [], None, {"0.weight": "x"}, {"x": TENSOR}, {1: TENSOR})],
    *[(("student", "0.weight"), value) for value in (TENSOR, "x", GONE)],
    *[(("ema",), value) for value in (None, {}, [], {"0.weight": TENSOR})],
    *[(("optimizer",), value) for value in ({}, [], {"state": {}, "param_groups": []})],
    *[(("optimizer", "param_groups", 0, name), value) for name in ("lr", "params") for value in ("x", GONE, None)],
    *[(("optimizer", "state", 0, "exp_avg"), value) for value in (TENSOR, "x", [])],
    (("optimizer", "state"), {}),
    *[(("optimizer", "state", 99), {"exp_avg": TENSOR}), (("optimizer", "state", "x"), {})],
    *[(("scheduler",), value) for value in ({}, None, {"x": 1})],
    *[(("scheduler", "t_initial"), value) for value in ("x", GONE, float("nan"), [])],
    *[(("scheduler", name), -5) for name in ("t_initial", "lr_min", "cycle_mul", "cycle_limit", "warmup_t")],
    *[(("optimizer", "param_groups", 0, name), -5.0) for name in ("weight_decay", "eps", "initial_lr")],
    (("optimizer", "param_groups", 0, "betas"), (2.0, -1.0)),
    *[(("format",), value) for value in (TENSOR, None, "x", 3.0)],
    *[(("random",), value) for value in ({}, [], [{}], [1], [{}, {}])],
    *[(("random", 0, name), value) for name in ("python", "numpy", "torch") for value in (GONE, "x", [], [3], TENSOR)],
    *[(("identity",), value) for value in ({}, None, "x")],
    *[(("identity", "options"), value) for value in ("x", {}, {"x": 1})],
    *[(("identity", "world"), value) for value in (2, "x", GONE)],
]


def test_every_field_of_a_checkpoint_is_checked(broken_off, tmp_path):
    path = tmp_path / checkpoint.NAME
    for place, value in CHANGES:
        state = copy.deepcopy(broken_off)
        owner = functools.reduce(operator.getitem, place[:-1], state)
        if value is GONE:
            del owner[place[-1]]
        else:
            owner[place[-1]] = value
        checkpoint.write(path, state)
        with pytest.raises(ArtifactError, match=r"checkpoint\.pt ") as caught:
            run(tmp_path, resume="auto")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600, place
        assert sorted(p.name for p in tmp_path.iterdir()) == [checkpoint.NAME], place


RECIPE = (
    "model: test_resnet\ncompile: {pattern: 2:4, score: magnitude, permute: false, restore: false}\n"
    "train: {epochs: 1, lr: 1e-4}\ndata: {batch: 8, size: 32, workers: 0}\ncalibration: {images: 4, batch: 4}\n"
)


def test_a_stamp_is_a_digest_and_a_foreign_run_is_named(tmp_path, capsys):
    data = labelled_images(tmp_path / "images")
    (tmp_path / "r.yaml").write_text(RECIPE)
    command = ["distill", f"{tmp_path}/r.yaml", "--data", str(data), "--num-classes", "3", "--quiet"]
    command += ["--resume", "auto", "--val-split", "none", "--out", f"{tmp_path}/run"]
    assert cli.main(command) == 0
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert not [name for name in names if name.startswith(".")]
    stamp = tmp_path / "run" / "student.stamp"
    for content in (b"\xff\xfe", b"x", b"0" * 5000):
        stamp.write_bytes(content)
        assert cli.main(command) == 2
        assert "student.stamp is damaged" in capsys.readouterr().err
    stamp.unlink()
    os.mkfifo(stamp)
    assert cli.main(command) == 2
    assert "student.stamp is damaged" in capsys.readouterr().err
