"""In-place statements, weights that are read elsewhere, weights that the graph writes: none of them gets lost."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpcompile
from mpcompile import Config


class Body(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.register_buffer("scale", torch.tensor(0.5))
        self.relu = nn.ReLU(inplace=True)
        self.between = between

    def forward(self, x):
        return self.c(torch.relu(self.b(self.between(self, self.a(x)))))


def statement(write):
    def between(net, h):
        write(net, h)
        return h

    return between


def halves(net, h):
    h[:, :32] = h[:, 32:] * 2
    return h


def before_and_after(net, h):
    first = h * 1.0
    h.mul_(0.1)
    return h + first


def augmented(net, h):
    h *= 0.1


def augmented_view(net, h):
    first, second = h[:, :32], h.view(-1)
    first -= 1.0
    second /= 2.0


def held_twice(net, h):
    held = {"first": h, "second": torch.tanh(h)}
    held["first"] += held["second"]


IN_PLACE = {
    "method": statement(lambda net, h: h.mul_(0.1)),
    "two of them": statement(lambda net, h: h.mul_(0.1).add_(1.0)),
    "flag": statement(lambda net, h: F.relu(h, inplace=True)),
    "module": statement(lambda net, h: net.relu(h)),
    "out": statement(lambda net, h: torch.mul(h, net.scale, out=h)),
    "view": statement(lambda net, h: h[:, :32].mul_(0.1)),
    "view of a view": statement(lambda net, h: h.view(-1, 2, 32)[:, 0].zero_()),
    "copy": statement(lambda net, h: h.copy_(h * 0.1)),
    "index_put": statement(lambda net, h: h.index_put_((torch.tensor([0]),), torch.tensor(3.0))),
    "read before and after": before_and_after,
    "augmented": statement(augmented),
    "augmented view": statement(augmented_view),
    "augmented under another name": statement(held_twice),
}


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", IN_PLACE)
def test_statements_survive_lowering_and_calibration(kind):
    model, x = Body(IN_PLACE[kind]).eval(), torch.randn(6, 32)
    gm = mpcompile.transform(model, x, Config(pattern="2:4"), [torch.randn(16, 32)]).eval()
    dense = mpcompile.transform(model, x, Config(pattern="dense"))
    with torch.no_grad():
        assert torch.allclose(dense(x), model(x), atol=1e-6)
        assert relative(mpcompile.lower(gm, x, Config(engine="reference"))(x), gm(x)) < 1e-5


@pytest.mark.parametrize("between", [IN_PLACE["method"], halves])
@pytest.mark.parametrize("options", [{"pattern": "dense"}, {"pattern": "dense", "frozen": True}])
def test_statements_survive_the_backend(options, between):
    model, x = Body(between).eval(), torch.randn(6, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative(torch.compile(model, backend="mpsparse", options=options)(x), model(x)) < 1e-5


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x):
        x += 1.0
        size = x.shape[:-1]
        size += (8, 8)
        h = self.a(x)
        h += torch.tanh(h)
        h *= 2
        return self.b(h.reshape(size).flatten(1))


def test_augmented_assignments_that_nothing_else_reads_are_ordinary_arithmetic():
    model, x = Sums().eval(), torch.randn(3, 32)
    want = model(x.clone())
    gm = mpcompile.transform(model, x, Config(pattern="dense"))
    assert torch.equal(gm(x.clone()), want)
    assert not {"iadd", "imul"} & {getattr(node.target, "__name__", "") for node in gm.graph.nodes}


def test_calibration_data_is_left_as_it_was():
    class Shifted(Body):
        def forward(self, x):
            x.sub_(1.0)
            return super().forward(x)

    data = torch.randn(16, 32)
    copy = data.clone()
    mpcompile.transform(Shifted(IN_PLACE["method"]).eval(), torch.randn(6, 32), Config(pattern="2:4"), [data])
    assert torch.equal(data, copy)


class Reading(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.read = read

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.c(torch.relu(self.read(self, h)))


READS = {
    "dtype": lambda net, h: net.b(h.to(net.b.weight.dtype)),
    "device": lambda net, h: net.b(h.to(net.b.weight.device)),
    "shape": lambda net, h: net.b(h).reshape(-1, net.b.weight.shape[0]),
    "tied, transposed": lambda net, h: F.linear(net.b(h), net.b.weight.t()),
    "tied, as it is": lambda net, h: F.linear(net.b(h), net.b.weight),
    "regulariser": lambda net, h: net.b(h) + net.b.weight.square().sum(),
    "bias": lambda net, h: net.b(h) * net.b.bias,
    "written": lambda net, h: (net.b.weight.data.mul_(1.0), net.b(h))[1],
}


@pytest.mark.parametrize("kind", READS)
def test_weights_that_are_read_elsewhere_survive_lowering(kind):
    model, x = Reading(READS[kind]).eval(), torch.randn(5, 64)
    gm = mpcompile.transform(model, x, Config(pattern="2:4", score="magnitude")).eval()
    lowered = mpcompile.lower(gm, x, Config(engine="reference"))
    with torch.no_grad():
        assert relative(lowered(x), gm(x)) < 1e-5
    if kind in ("dtype", "shape"):  # the answer needs no dense copy
        assert "b.weight" not in lowered.state_dict()


def test_layers_that_share_a_weight_with_a_dense_one_stay_dense():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.head.weight = self.b.weight

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x)))))

    gm = mpcompile.transform(Tied().eval(), torch.randn(4, 64), Config(pattern="2:4"))
    assert gm.plan.masked == ["a"]
    assert gm.plan.layers["b"].reason == "its weight is that of head, which stays dense"
    assert not bool((gm.head.weight == 0).any())
