"""Numbers that vary, autocast, empty batches, and graphs inside operators."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mpcompile
from mpcompile import Config
from mpcompile.backend import compiled_graphs, mpsparse
from mpcompile.errors import InputError, NotEligibleError
from tests.support.helpers import images, tiny_vit


def relative(a, b):
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def layered():
    return nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 8)).eval()


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def test_sizes_and_numbers_that_vary():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = layered()

        def forward(self, x, t: float = 1.0, double: bool = False):
            return self.net(x) / t * (2 if double else 1)

    model, x = Tempered().eval(), torch.randn(4, 32)
    with torch.no_grad():
        f = torch.compile(model.net, backend=mpsparse, options={"pattern": "dense"}, dynamic=True)
        assert all(relative(f(v), model.net(v)) < 1e-5 for v in (torch.randn(4, 32), torch.randn(7, 32)))
        g = torch.compile(model, backend=mpsparse, options={"pattern": "dense"})
        for t, double in ((1.0, False), (0.5, False), (0.25, True)):
            assert relative(g(x, t, double), model(x, t, double)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_layers_have_the_dtype_of_autocast(dtype, request):
    if dtype is torch.float16:  # the graph decides the dtype: code is generated for the other one
        request.getfixturevalue("no_inductor")
    x = images(2)
    gm = mpcompile.transform(tiny_vit(depth=1), x, Config(pattern="2:4", score="magnitude", tome_r=2)).eval()
    lowered = mpcompile.lower(gm, x, Config(engine="cpu"))
    compiled = torch.compile(gm, backend=mpsparse, options={"engine": "cpu"})
    with torch.no_grad():
        plain = gm(x)
        for f in (lowered, compiled):
            with torch.autocast("cpu", dtype):
                wanted, found = gm(x), f(x)
                with torch.autocast("cpu", enabled=False):
                    assert relative(f(x), plain) < 1e-5
            assert found.dtype == wanted.dtype == dtype and relative(found, wanted) < 8e-2


@pytest.mark.parametrize("config", [Config(), Config(mac_reduction=0.2), Config(score="ser")])
def test_calibration_under_autocast_is_that_without(config):
    x = torch.randn(16, 32)
    outside = mpcompile.transform(layered(), x, config, [x])
    model = layered()
    model.load_state_dict(dict(model.state_dict()))
    with torch.no_grad():
        same = mpcompile.transform(model, x, config, [x])
        with torch.autocast("cpu", torch.bfloat16):
            inside = mpcompile.transform(model, x, config, [x])
        assert torch.equal(inside(x), same(x)) and len(outside.plan.masked) == len(inside.plan.masked)


def test_empty_batches():
    x, none = torch.randn(8, 32), torch.randn(0, 32)
    with torch.no_grad():
        f = torch.compile(layered(), backend=mpsparse, options={"pattern": "2:4", "engine": "reference"})
        assert [f(v).shape for v in (none, x, none)] == [(0, 8), (8, 8), (0, 8)]
        torch.compile(layered(), backend=mpsparse, options={"mac_reduction": 0.2})(none)
        gm = mpcompile.transform(layered(), x, Config(), [none, x, none])
        assert relative(gm(x), mpcompile.transform(gm, x, Config(pattern="dense"))(x)) < 1e-6
        for engine in ("cpu", "reference", "dense"):
            assert mpcompile.lower(gm, x, Config(engine=engine))(none).shape == (0, 8)
        with pytest.raises(InputError, match="calibration is empty"):
            mpcompile.transform(layered(), x, Config(), [none])
        with pytest.raises(NotEligibleError, match="there are none"):
            mpcompile.transform(layered(), none, Config(mac_reduction=0.2))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_hides_no_layer(reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = checkpoint(lambda y: F.relu(self.a(y)), x, use_reentrant=reentrant)
            return self.c(checkpoint(lambda y: F.relu(self.b(y)), x, use_reentrant=reentrant))

    model, before = Net().train(), set(compiled_graphs())
    torch.compile(model, backend=mpsparse)(torch.randn(4, 32, requires_grad=True)).sum().backward()
    assert sorted(name for g in compiled_graphs() if g not in before for name in g.plan.masked) == ["a", "b"]
    assert float((model.a.weight.grad == 0).float().mean()) >= 0.5


def test_regions_are_traced_and_branches_are_reported():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (nn.Linear(32, 32) for _ in range(4))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.a(x)
            x = torch.cond(x.sum() > 0, lambda y: self.b(y) + 1, lambda y: self.b(y) - 1, (x.float(),))
            return self.head(torch.relu(self.c(x)))

    model, x = Net().eval(), torch.randn(4, 32)
    gm = mpcompile.transform(torch.export.export(model, (x,)).module(), x, Config(pattern="2:4"))
    assert gm.plan.masked == ["a", "c"]
    assert gm.plan.layers["b"].reason == "inside cond, which holds a graph of its own"


def test_a_mask_of_infinities_is_not_a_broken_weight():
    model = layered()
    model.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
    mpcompile.transform(model, torch.randn(4, 32), Config(pattern="2:4"))
    with torch.no_grad():
        model[0].weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"0\.weight: the weight is not finite"):
        mpcompile.transform(model, torch.randn(4, 32), Config(pattern="2:4"))
