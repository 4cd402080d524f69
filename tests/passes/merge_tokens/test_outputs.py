"""The outputs that a user names are computed; the others are None, in every kind of graph."""

from collections import namedtuple

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile import Config, lower, transform
from mpcompile.backend import compiled_graphs, mpsparse
from mpcompile.errors import ConfigError

Out = namedtuple("Out", "logits features")


class Net(nn.Module):
    """Two outputs, in a structure that ``kind`` makes."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.body, self.extra = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head, self.kind = nn.Linear(16, 4), kind

    def forward(self, x):
        hidden = torch.relu(self.stem(x))
        logits = self.head(self.body(hidden))
        features = self.extra(hidden)
        return self.kind(logits=logits, features=features)


def nested(logits, features):
    return {"main": (logits,), "aux": {"features": features, "again": logits}}


def graphs(model, x):
    yield model
    yield torch.export.export(model, (x,)).module(check_guards=False)


@pytest.mark.parametrize("kind", [dict, Out])
def test_others_are_none_and_not_computed(kind):
    model, x = Net(kind).eval(), torch.randn(3, 16)
    for graph in graphs(model, x):
        gm = transform(graph, x, Config(outputs="logits", score="magnitude"))
        found = gm(x)
        logits, features = (found["logits"], found["features"]) if kind is dict else found
        assert features is None and isinstance(found, kind)
        assert not any("extra" in str(node.target) for node in gm.graph.nodes)
        assert gm.plan.macs.dense == 2 * 16 * 16 + 16 * 4
        assert gm.plan.notes[0] == "outputs that are None because only logits are asked for: features"
        assert {"extra.weight", "extra.bias"} <= gm.state_dict().keys()
        full = transform(graph, x, Config(score="magnitude"))(x)
        assert torch.equal(logits, full["logits"] if kind is dict else full.logits)


def test_names_in_nested_structures_and_globs():
    model, x = Net(nested).eval(), torch.randn(3, 16)
    for graph in graphs(model, x):
        gm = transform(graph, x, Config("dense", outputs=["aux.*"]))
        assert gm(x)["aux"]["features"].shape == (3, 16)
        assert gm(x)["main"][0] is not None  # the same value as aux.again, which is asked for
        only = transform(graph, x, Config("dense", outputs=["aux.f*"]))(x)
        assert only["main"] == (None,) and only["aux"]["again"] is None


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"nothing named 'logit'; expected outputs among logits, features"):
        transform(Net(dict).eval(), torch.randn(3, 16), Config(outputs=("logits", "logit")))


def test_stays_through_lowering_and_files(tmp_path):
    model, x = Net(dict).eval(), torch.randn(3, 16)
    gm = transform(model, x, Config(outputs=["logits"], score="magnitude"))
    mpcompile.save(gm, tmp_path / "net.mpc")
    loaded = mpcompile.load(tmp_path / "net.mpc")
    assert loaded(x)["features"] is None and torch.equal(loaded(x)["logits"], gm(x)["logits"])
    again = transform(loaded, x, Config(pattern="dense"))
    assert again.plan.config["outputs"] == ["logits"]
    lowered = lower(gm, x, Config(engine="reference"))
    assert lowered(x)["features"] is None and lowered.plan.config["outputs"] == ["logits"]


@pytest.mark.usefixtures("no_inductor")
def test_torch_compile():
    model, x = Net(dict).eval(), torch.randn(3, 16)
    with torch.no_grad():
        found = torch.compile(model, backend=mpsparse, options={"pattern": "dense", "outputs": ["logits"]})(x)
        assert found["features"] is None and torch.allclose(found["logits"], model(x)["logits"], atol=1e-5)
    assert any("features" in note for graph in compiled_graphs() for note in graph.plan.notes)


def test_a_statement_stays():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            y = self.b(x)
            self.seen.add_(1)
            return {"a": self.a(x), "b": y}

    gm = transform(Counting().eval(), torch.randn(2, 4), Config("dense", outputs=["a"]))
    gm(torch.randn(2, 4))
    assert float(gm.seen) == 1
