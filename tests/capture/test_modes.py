"""A captured graph computes the mode in which it was captured, and refuses the other."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import fx, nn

from mpcompile import Config, load, lower, save, transform
from mpcompile.errors import GraphError
from tests.support.helpers import images, mlp

HALF = Config(pattern="2:4")
X = torch.randn(8, 32)


class Net(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.between = between(self) if isinstance(between, type(lambda: 0)) else between

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = self.between(h) if isinstance(self.between, nn.Module) else self.act(h)
        return self.c(torch.relu(self.b(h)))


class Dropping(Net):
    def act(self, h):
        return F.dropout(h, 0.5, self.training)


class ByKeyword(Net):
    def act(self, h):
        return F.dropout(h, training=self.training)


class Normed(Net):
    def __init__(self):
        super().__init__(nn.BatchNorm1d(64))


class Attending(Net):
    def act(self, h):
        h = h[None, None]
        rate = 0.5 if self.training else 0.0
        return F.scaled_dot_product_attention(h, h, h, dropout_p=rate)[0, 0]


class Depth(Net):
    """Stochastic depth, which leaves no trace in eval mode."""

    def act(self, h):
        return h * torch.bernoulli(torch.full_like(h[:, :1], 0.5)) if self.training else h


CLASSES = [lambda: Dropping(None), lambda: ByKeyword(None), Normed, lambda: Attending(None), lambda: Depth(None)]


def refuses(gm, mode):
    with pytest.raises(GraphError, match=rf"found {'train' if mode else 'eval'}\(\)") as raised:
        gm.train(mode)
    assert "original" in str(raised.value)


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("mode", [False, True])
def test_exported_graphs_keep_their_mode(make, mode, tmp_path):
    gm = transform(torch.export.export(make().train(mode), (X,)).module(), X, HALF)
    assert gm.locked_mode is mode and gm.training is mode
    gm.train(mode)
    refuses(gm, not mode)
    save(gm, tmp_path / "m.mpc")
    for twin in (copy.deepcopy(gm), copy.copy(gm), pickle.loads(pickle.dumps(gm)), load(tmp_path / "m.mpc")):
        assert twin.locked_mode is mode and twin.training is mode
        refuses(twin, not mode)
    with pytest.raises(GraphError):
        nn.ModuleDict({"student": gm}).train(not mode)
    if mode:
        with pytest.raises(GraphError, match=r"use in train\(\) mode"):
            lower(gm, X)
    else:
        assert lower(gm, X).locked_mode is False


@pytest.mark.parametrize("make", CLASSES)
def test_traced_modules_follow_the_mode_or_refuse(make):
    for start in (False, True):
        model = make().train(start)
        gm = transform(model, X, Config(pattern="dense"))
        for mode in (False, True):
            try:
                gm.train(mode)
            except GraphError:
                assert mode is not start
                continue
            torch.manual_seed(0)
            expected = copy.deepcopy(model).train(mode)(X)
            torch.manual_seed(0)
            assert torch.allclose(gm(X), expected)


@pytest.mark.parametrize("make", [CLASSES[0], CLASSES[1]])
@pytest.mark.parametrize("mode", [False, True])
def test_symbolic_graphs_with_the_flag_as_a_constant(make, mode):
    gm = transform(fx.symbolic_trace(make().train(mode)), X, HALF)
    assert gm.locked_mode is mode
    refuses(gm, not mode)


def test_symbolic_graphs_whose_layers_follow():
    gm = transform(fx.symbolic_trace(nn.Sequential(*mlp(), nn.Dropout(0.5))), X, HALF)
    assert gm.locked_mode is None
    assert not torch.equal(gm.train()(X), gm(X)) and torch.equal(gm.eval()(X), gm(X))


def test_a_frozen_norm_does_not_turn_a_training_graph_into_an_eval_graph():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = Normed(), nn.Linear(8, 8)

        def forward(self, x):
            return self.head(F.dropout(self.body(x), 0.5, self.training))

    model = Both().train()
    model.body.between.eval()
    gm = transform(torch.export.export(model, (X,)).module(), X, HALF)
    assert gm.locked_mode is True


def test_dynamo_graphs_keep_their_mode():
    found = []

    def backend(graph, inputs):
        found.append(transform(graph, inputs, HALF).locked_mode)
        return graph

    for mode in (False, True):
        torch._dynamo.reset()
        torch.compile(Dropping(None).train(mode), backend=backend)(X)
    assert found == [False, True]


def test_stochastic_depth_of_timm_exported():
    model = timm.create_model("convnext_atto", num_classes=4, drop_path_rate=0.5).eval()
    x = images(1, 32)
    gm = transform(torch.export.export(model, (x,)).module(), x, HALF)
    refuses(gm, True)
