"""Checkpoints load as training scripts write them; nothing in a file is run, and a mismatch is reported in one line."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpcompile import Config, save, transform
from mpcompile.artifact.verify import read
from mpcompile.errors import ArtifactError
from mpcompile.io.checkpoints import load_checkpoint, read_checkpoint
from mpcompile.io.state_dicts import Ignored
from tests.support.helpers import mlp


@pytest.fixture(scope="module")
def pruned():
    return transform(mlp(), torch.randn(2, 32), Config(pattern="2:4")).eval()


class Lightning(dict):
    """Like a class of hyperparameters from a package that is not installed."""


class Metric:
    def __init__(self):
        self.best = 0.5


def layouts(state):
    """Files of common training scripts: their contents, and a word that the log has to contain."""
    under = {f"module.{k}": v for k, v in state.items()}
    compiled = {f"_orig_mod.{k}": v for k, v in state.items()}
    both = {f"module._orig_mod.{k}": v for k, v in state.items()}
    lightning = {f"model.{k}": v for k, v in state.items()} | {"criterion.weight": torch.ones(2)}
    old = {k: torch.zeros_like(v) for k, v in state.items()}
    args, epoch = argparse.Namespace(lr=0.1, out=Path("x")), {"epoch": 3, "best": np.float64(0.5)}
    return {
        "plain": (state, ""),
        "ddp": ({"state_dict": under, **epoch}, "module."),
        "compiled": (compiled, "_orig_mod."),
        "both": ({"model": both, "optimizer": {"state": {}, "param_groups": []}}, "_orig_mod."),
        "inner": ({f"{k.partition('.')[0]}._orig_mod.{k.partition('.')[2]}": v for k, v in state.items()}, "_orig_mod"),
        "timm": ({"state_dict": old, "state_dict_ema": state, "args": args, "arch": "x"}, "state_dict_ema"),
        "torchvision": ({"model": old, "model_ema": {"n_averaged": torch.tensor(3), **under}}, "model_ema"),
        "averaged": ({"n_averaged": torch.tensor(3), **under}, "module."),
        "state": ({"model_state": state, "rng": torch.get_rng_state()}, "model_state"),
        "net": ({"net": state}, "'net'"),
        "deepspeed": ({"module": state, "dp_world_size": 8}, "'module'"),
        "lightning": (
            {"state_dict": lightning, "hyper_parameters": Lightning(lr=1), "callbacks": {"best": Metric()}},
            "model.",
        ),
        "own entry": ({"checkpoint": {"model": state}, "optim": {"state": {0: {"m": torch.ones(2)}}}}, "'checkpoint'"),
        "ema": ({"ema": {"decay": 0.99, "module": state}, "state_dict": old}, "'ema'"),
    }


@pytest.mark.parametrize("name", list(layouts({"0.weight": torch.ones(1)})))
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_training_scripts_load(name, legacy, tmp_path, caplog):
    model, other = mlp(), mlp()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    value, word = layouts(model.state_dict())[name]
    path = tmp_path / f"{name}.pth.tar"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    load_checkpoint(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert word in caplog.text and caplog.text.isprintable() is ("\n" not in caplog.text)
    assert (not word) == (not caplog.records)
    assert set(read_checkpoint(path)) >= (set(model.state_dict()) if name != "lightning" else set())


def test_wrapped_models_keep_their_names(tmp_path):
    """A name that looks like a wrapper's is the model's own if the model has it."""
    model = nn.ModuleDict({"module": nn.Linear(4, 4)})
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "weights")  # known by its content, not by its name
    for name in ("a.pt", "weights"):
        other = nn.ModuleDict({"module": nn.Linear(4, 4)})
        load_checkpoint(other, tmp_path / name)
        assert torch.equal(other["module"].weight, model["module"].weight)


def test_an_artifact_is_a_checkpoint_too(pruned, tmp_path):
    save(pruned, f"{tmp_path}/a/")
    model = mlp()
    load_checkpoint(model, tmp_path / "a")
    x = torch.randn(4, 32)
    torch.testing.assert_close(model(x), pruned(x))


class Runs:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


class Shell:
    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize("value", [Runs(), Shell()])
def test_nothing_in_a_checkpoint_is_run(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2, 4)}, "x": value}, "a.pt")
    with pytest.raises(ArtifactError, match="cannot be read as a checkpoint"):
        read_checkpoint(Path("a.pt"))
    assert not Path("ran").exists()


def test_a_pickled_model_is_named(tmp_path):
    for value in (mlp(), {"model": mlp()}, [1], {"epoch": 1}, {}):
        torch.save(value, tmp_path / "whole.pth")
        with pytest.raises(ArtifactError, match=r"whole\.pth cannot be read as a checkpoint") as caught:
            read_checkpoint(tmp_path / "whole.pth")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert "torch.nn" in str(pickled(mlp(), tmp_path))
    assert Ignored(1, a=2).name == ""


def pickled(value, folder):
    torch.save(value, folder / "x.pth")
    with pytest.raises(ArtifactError) as caught:
        read_checkpoint(folder / "x.pth")
    return caught.value


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {f"what.{k}": v for k, v in s.items()},
        lambda s: {**s, "\x1b[31m\n\u202e": torch.ones(1)},
        lambda s: {**s, "x" * 5000: torch.ones(1)},
        lambda s: {k: v for k, v in s.items() if k != "0.weight"},
        lambda s: {**s, "0.weight": torch.ones(3, 3)},
        lambda s: {**s, "0.weight": s["0.weight"].to_sparse()},
        lambda s: {k: (127 * v).to(torch.int8) for k, v in s.items()},  # quantised: the scales are elsewhere
        lambda s: {**s, "0.weight": s["0.weight"].to(torch.complex64)},
        lambda s: {**s, "0.weight": s["0.weight"] > 0},
    ],
)
def test_a_mismatch_is_reported_in_one_line(change, tmp_path):
    torch.save(change(mlp().state_dict()), tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match=r"other\.pth does not fit the model; expected .*found ") as caught:
        load_checkpoint(mlp(), tmp_path / "other.pth")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 590


def test_odd_tensors_are_skipped(tmp_path, caplog):
    value = {
        ("a", 1): torch.ones(2, 4),
        3: torch.ones(2, 4),
        "sparse": torch.eye(4).to_sparse(),
        "meta": torch.ones(4, 4, device="meta"),
        "claims": torch.ones(1).expand(1 << 20, 1 << 20),
        "whole": torch.ones(4, 4),
    }
    torch.save(value, tmp_path / "a.pt")
    assert list(read(tmp_path / "a.pt")) == ["whole"] and "5 tensors" in caplog.text
