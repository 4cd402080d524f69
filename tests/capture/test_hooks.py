"""Hooks and replaced forwards are part of the graph, stay on their layer, or are refused by name."""

import copy
import functools
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from mpcompile import Config, MPCompileError, lower, transform
from mpcompile.errors import TraceError
from tests.support.helpers import relative

DENSE, HALF = Config(pattern="dense"), Config(pattern="2:4")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 8)

    def forward(self, x, scale=1.0):
        return self.head(self.body(x)) * scale

    def features(self, x):
        return self.body(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(4, 32)
RECORDED = []


def on_root(model):
    model.register_forward_pre_hook(lambda module, args: ((args[0] - 5) / 3,))
    model.register_forward_hook(lambda module, args, out: out.softmax(-1))


def on_inner_module(model):
    model.body.register_forward_hook(lambda module, args, out: out * 2, always_call=True)


def on_a_layer(model):
    model.body[2].register_forward_hook(lambda module, args, out: out + 1)
    model.body[1].register_forward_pre_hook(lambda module, args: (args[0].abs(),))


def with_keywords(model):
    model.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "scale": 3.0}), with_kwargs=True)
    model.register_forward_hook(lambda module, args, kwargs, out: out * kwargs["scale"], with_kwargs=True)


def in_order(model):
    model.body.register_forward_hook(lambda module, args, out: out + 1)
    model.body.register_forward_hook(lambda module, args, out: out * 2, prepend=True)


def reads_weights(model):
    model.body.register_forward_hook(lambda module, args, out: out + model.body[2].weight.sum())


def writes_in_place(model):
    def hook(module, args, out):
        out.mul_(2)

    model.body.register_forward_hook(hook)


def other_function(model):
    model.forward = model.features


def branch_beside_a_layer(model):
    layer = model.body[2]
    plain, down, up = layer.forward, torch.randn(64, 4), torch.randn(4, 64)
    layer.forward = lambda h: plain(h) + h @ down @ up


def method_of_another(model):
    def forward(self, h):
        return F.linear(h, self.weight * 2, self.bias)

    model.body[2].forward = types.MethodType(forward, model.body[2])


def partial_of_a_layer(model):
    def forward(layer, h, gain):
        return F.linear(h, layer.weight, layer.bias) * gain

    model.body[2].forward = functools.partial(forward, model.body[2], gain=3.0)


def callable_object(model):
    class Adapter:
        def __init__(self, layer):
            self.layer, self.plain = layer, layer.forward

        def __call__(self, h):
            return self.plain(h) - self.layer.weight.mean()

    model.body[2].forward = Adapter(model.body[2])


def activation_replaced(model):
    model.body[1].forward = torch.sigmoid


def helper_replaced(model):
    model.features = lambda x: model.body(x) + 1
    model.forward = lambda x: model.head(model.features(x))


AROUND = [
    on_root,
    on_inner_module,
    on_a_layer,
    with_keywords,
    in_order,
    reads_weights,
    writes_in_place,
    other_function,
    branch_beside_a_layer,
    method_of_another,
    partial_of_a_layer,
    callable_object,
    activation_replaced,
    helper_replaced,
]


@pytest.mark.parametrize("change", AROUND, ids=lambda change: change.__name__)
def test_hooks_and_replaced_forwards_are_computed(net, change):
    change(net)
    with torch.no_grad():
        gm = transform(net, X, DENSE)
        assert relative(gm(X), net(X)) < 1e-6
        expected = net(X)
        for parameter in net.parameters():  # the graph does not depend on the original
            parameter.zero_()
        assert relative(gm(X), expected) < 1e-6


@pytest.mark.parametrize("change", [on_root, branch_beside_a_layer, method_of_another, on_a_layer])
def test_the_same_when_masked_and_lowered(net, change):
    change(net)
    gm = transform(net, X, HALF)
    state = {k: v for k, v in gm.state_dict().items() if not k.endswith("mask")}
    net.load_state_dict(state)
    with torch.no_grad():
        assert relative(gm(X), net(X)) < 1e-5
        assert relative(lower(gm, X)(X), net(X)) < 1e-4


def test_a_forward_replaced_in_the_class_of_torch(net, monkeypatch):
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x) + 1)
    assert relative(transform(net, X, HALF)(X), net(X)) < 10  # entered, so that the graph contains the 1
    assert relative(transform(net, X, DENSE)(X), net(X)) < 1e-6


class Called(Net):
    def __call__(self, x):
        return super().__call__(x + 1).relu()


def test_a_class_with_its_own_call():
    net = Called().eval()
    with torch.no_grad():
        assert relative(transform(net, X, DENSE)(X), net(X)) < 1e-6


class Recorder:
    count = 0
    seen = []  # noqa: RUF012  of the class, as users have it

    def __call__(self, module, args, out):
        Recorder.count += 1
        Recorder.seen.append(out)
        RECORDED.append(out)


def test_recording_hooks_do_not_run_on_placeholders(net):
    seen, order = {}, []
    net.body.register_forward_hook(lambda module, args, out: seen.__setitem__("body", out))
    net.body.register_forward_hook(lambda module, args, out: order.append(out.mean()))
    net.body[2].register_forward_hook(lambda module, args, out: seen.__setitem__("layer", out))
    net.register_forward_hook(Recorder())

    def attribute(module, args, out):
        module.last = out

    net.body.register_forward_hook(attribute)
    net(X)
    before = dict(seen)
    gm = transform(net, X, Config(pattern="2:4", include=["body.0"]))
    assert seen == before and len(order) == 1 and net.body.last.shape == (4, 64)
    assert Recorder.count == 1 and len(Recorder.seen) == 1 and len(RECORDED) == 1
    assert all(type(value) is torch.Tensor for value in (*seen.values(), *order, net.body.last, *RECORDED))
    assert any("hooks that return nothing" in note and "body" in note for note in gm.plan.notes)
    assert gm.plan.layers["body.2"].reason == "it has forward hooks"
    seen.clear()
    gm(X)
    assert type(seen["layer"]) is torch.Tensor  # a layer that the graph calls keeps its hooks
    assert not any(node.op == "call_method" and node.target == "mean" for node in gm.graph.nodes)


def test_hooks_of_layers_may_store_tensors(net):
    class Keeper:
        def __call__(self, module, args, out):
            self.seen = out.detach()

    keeper = Keeper()
    net.body[0].register_forward_hook(keeper)
    want = net(X)
    seen = keeper.seen
    gm = transform(net, X, DENSE)
    assert keeper.seen is seen and relative(gm(X), want) < 1e-6


def test_a_hook_that_cannot_be_traced_is_named(net):
    def stops_at_nan(module, args, out):
        if torch.isnan(out).any():
            raise ValueError

    handle = net.body.register_forward_hook(stops_at_nan)
    with pytest.raises(TraceError, match=r"^body: the forward hook .*stops_at_nan cannot be traced.*handle.remove"):
        transform(net, X, DENSE)
    handle.remove()
    transform(net, X, DENSE)


@pytest.mark.parametrize("where", ["", "body"])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_are_refused_by_name(net, where, register):
    getattr(net.get_submodule(where), register)(lambda *_: None)
    with pytest.raises(TraceError, match="backward hooks"):
        transform(net, X, DENSE)


def test_backward_hooks_of_a_layer_stay_on_it(net):
    seen = []
    net.body[2].register_full_backward_hook(lambda module, grads, outs: seen.append(grads))
    gm = transform(net, X, HALF)
    assert gm.plan.layers["body.2"].reason == "it has backward hooks" and not seen
    gm(X.clone().requires_grad_()).sum().backward()
    assert len(seen) == 1


def test_gradient_hooks_of_weights_are_kept(net):
    net.body[2].weight.register_hook(lambda gradient: gradient * 0)
    gm = transform(net, X, HALF)
    gm(X).sum().backward()
    assert not gm.get_parameter("body.2.weight").grad.any() and gm.get_parameter("body.0.weight").grad.any()


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hooks_of_all_modules_are_refused(net, register):
    seen = []
    handle = getattr(torch_module, register)(lambda *given: seen.append(given))
    try:
        with pytest.raises(TraceError, match="hooks on all modules"):
            transform(net, X, DENSE)
    finally:
        handle.remove()
    assert not seen


def test_state_dict_hooks_that_rename_are_refused(net):
    def rename(module, state, prefix, metadata):
        return OrderedDict((f"ema.{key}", value) for key, value in state.items())

    net._register_state_dict_hook(rename)
    with pytest.raises(TraceError, match="state-dict hooks"):
        transform(net, X, DENSE)


def test_hooks_on_a_transformed_module_are_not_dropped(net):
    gm = transform(net, X, HALF)
    handle = gm.register_forward_hook(lambda module, args, out: out * 2)
    twin = copy.deepcopy(gm)
    assert torch.equal(twin(X), gm(X))
    with pytest.raises(TraceError, match="hooks, which would be lost"):
        lower(gm, X)
    handle.remove()
    gm.get_submodule("body.2").register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(TraceError, match=r"^body.2: MaskedLinear has hooks"):
        lower(gm, X)


WEIGHTS = [
    lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    spectral_norm,
    weight_norm,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", WEIGHTS)
@pytest.mark.parametrize("graded", [False, True])
def test_computed_weights_stay_dense_and_listed(net, wrap, graded):
    wrap(net.body[2])
    with torch.set_grad_enabled(graded):
        net(X)
    held = dict(vars(net.body[2]))
    gm = transform(net, X, HALF)
    assert gm.plan.layers["body.2"].pattern == "dense" and gm.plan.layers["body.2"].reason
    assert all(vars(net.body[2])[key] is value for key, value in held.items())
    with torch.no_grad():
        assert relative(transform(net, X, DENSE)(X), net(X)) < 1e-6
        assert not any(type(value).__name__ == "FakeTensor" for value in vars(gm.get_submodule("body.2")).values())
        assert relative(lower(gm, X)(X), gm(X)) < 1e-4


def test_refusals_are_one_line(net):
    net.body.register_full_backward_hook(lambda *_: None)
    with pytest.raises(MPCompileError) as raised:
        transform(net, X, DENSE)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_a_region_of_autocast_is_not_lost():
    class Mixed(nn.Module):
        def __init__(self, enabled):
            super().__init__()
            self.body, self.head, self.enabled = nn.Linear(32, 64), nn.Linear(64, 8), enabled

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
                x = self.body(x)
            return self.head(x.float())

    x, config = torch.randn(2, 32), Config(pattern="dense")
    model = Mixed(True).eval()
    direct = transform(model, x, config)
    assert direct.plan.captured.startswith("torch.export")
    assert any("enters autocast" in note for note in direct.plan.notes)
    exported = transform(torch.export.export(model, (x,)).module(), x, config)
    with torch.no_grad():
        assert torch.equal(direct(x), model(x)) and torch.equal(exported(x), model(x))
    transform(Mixed(False).eval(), x, config)
