"""Transform leaves no trace in a user's model and process, and its result can be trained."""

import copy
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpcompile import Config, analyze, load, lower, save, transform
from mpcompile.errors import MPCompileError, TraceError
from mpcompile.ir.isolation import untouched
from tests.support.helpers import convolutional, images, mlp, relative

HALF, DENSE = Config(pattern="2:4"), Config(pattern="dense")
X = torch.randn(3, 32)
LOG = []
TOTAL = 0


class Stateful(nn.Module):
    """Stores parts of its inputs in every possible way; a leaf of the graph if it reads the mode."""

    table = None
    shared = []  # noqa: RUF012  of the class, as users have it
    calls = 0

    def __init__(self, keep):
        super().__init__()
        self.keep, self.history, self.cache = keep, [], {}

    def forward(self, x):
        global TOTAL  # noqa: PLW0603
        if self.keep == "attribute":
            if self.table is None:
                self.table = torch.ones(1, x.shape[1])
            x = x + self.table
        elif self.keep == "list":
            self.history.append(x)
        elif self.keep == "dict":
            self.cache["x"] = x
        elif self.keep == "class":
            Stateful.shared.append(x)
            Stateful.calls += 1
        elif self.keep == "global":
            LOG.append(x)
            TOTAL += 1
        return x * 2


class Leaf(Stateful):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


KINDS = ["attribute", "list", "dict", "class", "global"]


@pytest.mark.parametrize("cls", [Stateful, Leaf])
@pytest.mark.parametrize("keep", KINDS)
def test_tracing_leaves_nothing_behind(cls, keep):
    part = cls(keep)
    model = nn.Sequential(nn.Linear(32, 64), part, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    gm = transform(model, X, HALF)
    assert part.table is None and not part.history and not part.cache
    assert not Stateful.shared and not LOG and Stateful.calls == TOTAL == 0
    assert type(gm(X)) is torch.Tensor
    dense = transform(model, X, DENSE)
    assert dense.locked_mode is None
    assert torch.equal(dense(X), copy.deepcopy(model)(X))
    Stateful.shared.clear(), LOG.clear()
    Stateful.calls = globals()["TOTAL"] = 0


def test_generators_modes_and_statistics_stay():
    model, x = convolutional("resnet18"), images(2, 64)
    model.train()
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    model(x).sum().backward()
    flags = {name: m.training for name, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: p.grad for k, p in model.named_parameters()}
    held = {name: dict(vars(m)) for name, m in model.named_modules()}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    transform(model, x, HALF)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert flags == {name: m.training for name, m in model.named_modules()}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is grads[k] for k, p in model.named_parameters())
    assert not model.fc.weight.requires_grad
    for name, module in model.named_modules():
        assert all(vars(module)[key] is value for key, value in held[name].items())


class Counting(nn.Module):
    """Writes to a buffer in every call."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(32, 64), nn.Linear(64, 8)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return self.head(self.fc(x) + self.steps)


def test_a_buffer_that_forward_writes_to():
    model = Counting().eval()
    gm = transform(model, X, DENSE)
    assert gm.steps == model.steps == 0
    for count in (1, 2):
        assert relative(gm(X), model(X)) < 1e-6
        assert gm.steps == model.steps == count


class Frozen(nn.Module):
    def __init__(self, random):
        super().__init__()
        self.fc, self.random = nn.Linear(32, 8), random

    def forward(self, x):
        return self.fc(x) + self.random(x)


def test_random_numbers_are_not_frozen_into_the_graph():
    for draw, captured in ((torch.rand_like, "symbolic tracing"), (lambda x: torch.rand(8), "torch.export, strict")):
        gm = transform(Frozen(lambda x, draw=draw: draw(x[:, :8])).eval(), X, DENSE)
        assert gm.plan.captured.startswith(captured) and not torch.equal(gm(X), gm(X))


class Skipping(nn.Module):
    """A branch on a random number, only in training."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        keep = torch.rand(()) > 0.5
        return self.head(self.fc(x) if keep or not self.training else x)


def test_a_random_branch_locks_eval():
    model = Skipping().eval()
    gm = transform(model, X, DENSE)
    assert gm.locked_mode is False and torch.equal(gm(X), model(X))
    with pytest.raises(TraceError, match="draws random numbers"):
        transform(Skipping().train(), X, DENSE)


def ordinary(gm):
    return not any(t.is_inference() for t in [*gm.parameters(), *dict(gm.named_buffers()).values()])


@pytest.mark.parametrize("score", ["magnitude", "covariance"])
def test_made_in_inference_mode_and_trained_outside(tmp_path, score):
    model = mlp()
    with torch.inference_mode():
        data = torch.randn(16, 32)
        gm = transform(model, data, Config(pattern="2:4", score=score), calibration=[data])
        lowered = lower(gm, data)
        save(gm, tmp_path / "m.mpc")
        loaded = load(tmp_path / "m.mpc")
        analyze(gm, progress=False)
        inside = mlp()
    for made in (gm, loaded):
        assert ordinary(made)
        made.train()(X).sum().backward()
        made.load_state_dict(model.state_dict())
        assert all(p.grad is not None for p in made.parameters())
    assert ordinary(lowered)
    gm = transform(inside, data, HALF, calibration=[data])  # a model and data from inference mode
    assert ordinary(gm)
    gm.train()(X).sum().backward()


def test_made_without_gradients_and_trained_outside():
    with torch.no_grad():
        gm = transform(mlp(), X, HALF)
    gm.train()(X).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())


def test_untouched_restores_everything_reachable():
    total, seen, deep = 0, {"a": 1}, [[1], {2}]

    def write():
        nonlocal total
        total += 1
        seen["b"] = 2
        deep[0].append(3)
        deep[1].add(4)
        Stateful.shared.append(1)
        Stateful.new = 1

    with untouched(write, Stateful("list")):
        write()
    assert total == 0 and seen == {"a": 1} and deep == [[1], {2}]
    assert Stateful.shared == [] and not hasattr(Stateful, "new")


class Failing(nn.Module):
    def __init__(self, error, late=False):
        super().__init__()
        self.fc, self.error, self.late = nn.Linear(32, 8), error, late

    def forward(self, x):
        if self.late:
            return Late(self.fc(x), self.error)
        raise self.error


class Inner(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if self.training in (True, False):
            raise self.error
        return x


def Late(x, error):
    raise error


ERRORS = [AssertionError(), ValueError("a\nb"), KeyError("k"), IndexError(), RuntimeError("\x1b[31m"), Exception()]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("late", [False, True])
def test_errors_of_the_model_itself(error, late):
    model = nn.Sequential(nn.Linear(32, 32), Failing(error, late)).eval()
    with pytest.raises(MPCompileError) as raised:
        transform(model, X, HALF)
    text = str(raised.value)
    assert type(error).__name__ in text and "Failing" in text and "test_untouched.py" in text
    assert text.isprintable() and len(text) < 600


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_errors_of_a_leaf_are_raised_by_shape_propagation(error):
    model = nn.Sequential(nn.Linear(32, 32), Inner(error), nn.Linear(32, 8)).eval()
    with pytest.raises(MPCompileError) as raised:
        transform(model, X, HALF)
    text = str(raised.value)
    assert type(error).__name__ in text and "Inner" in text and text.startswith("1: ")
    assert text.isprintable() and len(text) < 600


class Instances(OrderedDict):
    """Stores classes and returns a new instance at every read, like the table of activations in transformers."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


def test_a_table_that_makes_its_values_at_every_read_keeps_what_it_stores():
    table = Instances(relu=nn.ReLU, gelu=nn.GELU)
    order = OrderedDict(b=1, a=2)
    with untouched(nn.Linear(1, 1), lambda: (table, order)):
        table["relu"] = nn.SiLU
        del order["b"]
    assert list(dict.items(table)) == [("relu", nn.ReLU), ("gelu", nn.GELU)]
    assert list(order) == ["b", "a"]
