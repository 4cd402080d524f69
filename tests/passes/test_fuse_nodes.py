"""Fusion into native operators, case by case: every form of an activation, addition and MLP, and every refusal."""

import operator

import pytest
import torch
import torch.nn.functional as F
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from torch import fx, nn

from mpcompile import Config
from mpcompile.capture.tracing import Tracer
from mpcompile.ir.module import IRModule
from mpcompile.ir.shapes import propagate
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import ByMode, MaskedConv2d, MaskedLinear
from mpcompile.passes.base import Context
from mpcompile.passes.fuse import Fuse, activation_of, does_nothing, writes
from tests.passes.test_fuse import counts, fuse, lower_natively, native_nodes
from tests.support.helpers import relative


def masked_linear(inputs, outputs):
    linear = nn.Linear(inputs, outputs)
    return MaskedLinear.from_linear(linear, torch.arange(inputs).expand(outputs, -1) % 4 < 2, Pattern(2, 4))


class Net(nn.Module):
    """Two masked layers, and a forward pass that the test supplies."""

    def __init__(self, body, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.body = masked_linear(8, 8), masked_linear(8, 8), body
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.body(self, x)


class Leaves(Tracer):
    def is_leaf_module(self, m, name):
        return isinstance(m, (GELU, GELUTanh, QuickGELU)) or super().is_leaf_module(m, name)


def check(body, expected, why=None, x=None, **modules):
    """Fuse a net; compare the numbers of fused nodes, and the values."""
    net = Net(body, **modules).eval()
    x = torch.randn(4, 8) if x is None else x
    gm = IRModule(net, Leaves().trace(net))
    gm.eval()
    lower_natively(gm)
    fused, decision, ctx = fuse(gm, [x])
    assert counts(decision) == expected
    assert relative(fused(x.clone()), gm(x.clone())) < 1e-6
    assert relative(fused(x.clone()), net(x.clone())) < 1e-6
    if why is not None:
        assert any(why in reason for reason in decision.left.values()), decision.left
    return fused, decision, ctx


aten = torch.ops.aten
ACTIVATIONS = {
    "relu": (lambda net, x: F.relu(net.fc1(x)), "relu"),
    "relu in place": (lambda net, x: F.relu(net.fc1(x), True), "relu"),
    "torch.relu": (lambda net, x: torch.relu(net.fc1(x)), "relu"),
    "aten.relu": (lambda net, x: aten.relu.default(net.fc1(x)), "relu"),
    "method": (lambda net, x: net.fc1(x).relu(), "relu"),
    "gelu": (lambda net, x: F.gelu(net.fc1(x)), "gelu"),
    "gelu tanh": (lambda net, x: F.gelu(net.fc1(x), approximate="tanh"), "gelu_tanh"),
    "aten.gelu": (lambda net, x: aten.gelu.default(net.fc1(x), approximate="tanh"), "gelu_tanh"),
    "silu": (lambda net, x: F.silu(net.fc1(x), inplace=True), "silu"),
    "aten.silu": (lambda net, x: aten.silu.default(net.fc1(x)), "silu"),
}
MODULES = [(m, "relu") for m in (nn.ReLU(), nn.ReLU(inplace=True))] + [(m, "gelu") for m in (nn.GELU(), GELU())]
MODULES += [(nn.GELU(approximate="tanh"), "gelu_tanh"), (GELUTanh(), "gelu_tanh"), (nn.SiLU(), "silu")]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions(name):
    body, activation = ACTIVATIONS[name]
    fused, _, ctx = check(body, (1, 0, 0))
    assert next(n for n in fused.graph.nodes if n.target is ops.nm_gemm).args[-1] == activation
    assert ctx.plan.layers["fc1"].notes["fuse"] == {"activation": activation}


@pytest.mark.parametrize("module, activation", MODULES, ids=str)
def test_activation_modules(module, activation):
    fused, _, _ = check(lambda net, x: net.act(net.fc1(x)), (1, 0, 0), act=module)
    assert next(n for n in fused.graph.nodes if n.target is ops.nm_gemm).args[-1] == activation


def empty(**modules):
    """Return a graph that yields its input, with modules that it does not call yet, and that input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(x)
    gm = fx.GraphModule(nn.Module(), graph)
    for name, module in modules.items():
        gm.add_module(name, module)
    return gm, x


class Doubled(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("module", [QuickGELU(), nn.LeakyReLU(), nn.Tanh()], ids=str)
def test_other_activations_are_left(module):
    check(lambda net, x: net.act(net.fc1(x)), (0, 0, 0), f"followed by {type(module).__name__}", act=module)


def test_subclasses_and_hooked_modules_are_left():
    gm, x = empty(a=Doubled(), b=nn.ReLU(), c=nn.Identity())
    for name in "bc":
        gm.get_submodule(name).register_forward_hook(lambda module, args, out: out + 1)
    nodes = [gm.graph.call_module(name, (x,)) for name in "abc"]
    assert [activation_of(gm, n) for n in nodes] == [None] * 3
    assert not any(does_nothing(gm, n) for n in nodes)


ADDITIONS = {
    "+": lambda net, x: x + net.fc1(x),
    "+ the other way": lambda net, x: net.fc1(x) + x,
    "torch.add": lambda net, x: torch.add(x, net.fc1(x), alpha=1),
    "torch.add by name": lambda net, x: torch.add(input=net.fc1(x), other=x),
    "aten.add": lambda net, x: aten.add.Tensor(net.fc1(x), x),
    "method": lambda net, x: net.fc1(x).add(x),
    "method in place": lambda net, x: net.fc1(x).add_(x),
    "the residual comes later": lambda net, x: net.fc1(x) + x.exp(),
    "dropout": lambda net, x: x + F.dropout(net.fc1(x), 0.5, False),
    "dropout p=0": lambda net, x: x + F.dropout(net.fc1(x), p=0.0),
    "torch.dropout": lambda net, x: x + torch.dropout(net.fc1(x), 0.5, train=False),
    "modules": lambda net, x: x + net.drop(net.idle(net.fc1(x))),
    "by mode": lambda net, x: x + F.dropout(net.fc1(x), 0.5, net.mode()),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_additions(name):
    modules = {"drop": nn.Dropout(0.5), "idle": nn.Identity(), "mode": ByMode(True, False)}
    fused, _, ctx = check(ADDITIONS[name], (0, 1, 0), **modules)
    assert not any(n.target in (F.dropout, torch.dropout) for n in fused.graph.nodes)
    assert ctx.plan.layers["fc1"].notes["fuse"] == {"residual": True}


def test_the_meta_of_the_sum_is_kept():
    x = torch.randn(4, 8)
    net = Net(lambda net, x: F.gelu(net.fc1(x)) + x)
    gm = IRModule(net, Leaves().trace(net)).eval()
    lower_natively(gm)
    propagate(gm, [x])
    next(n for n in gm.graph.nodes if n.target is operator.add).meta["example_value"] = "the sum's"
    Fuse().run(gm, Context(Config(), [x]))
    (node,) = (n for n in gm.graph.nodes if n.target is ops.nm_gemm)
    assert node.meta["example_value"] == "the sum's" and node.args[-1] == "gelu"


def two_users(net, x):
    y = net.fc1(x)
    return F.relu(y) + y


def read_between(net, x):
    y = net.fc1(x)
    z = F.relu_(x)
    return y + z


def overwritten(net, x):
    h = net.fc1(x)
    x.zero_()
    return net.fc2(h)


def accumulated(net, x):
    z = x * 2
    z.add_(net.fc1(x))
    return z


REFUSALS = {
    "two users": (two_users, "2 users"),
    "itself": (lambda net, x: operator.add(*[net.fc1(x)] * 2), "added to itself"),
    "number": (lambda net, x: net.fc1(x) + 1, "adds no tensor"),
    "alpha": (lambda net, x: torch.add(x, net.fc1(x), alpha=2), "scaled"),
    "broadcast": (
        lambda net, x: net.fc1(x) + x.mean(0, keepdim=True),
        "unlike tensors: (4, 8) torch.float32 and (1, 8)",
    ),
    "dtype": (lambda net, x: net.fc1(x) + x.double(), "float64"),
    "parameter": (lambda net, x: net.fc1(x) + net.fc2.weight[:4], "depend on the input"),
    "in place": (accumulated, "writes into its other operand"),
    "written in between": (read_between, "relu_ writes in place before add"),
    "the MLP's input is written": (overwritten, "zero_ writes in place before"),
    "subtraction": (lambda net, x: net.fc1(x) - x, "followed by sub"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name):
    body, why = REFUSALS[name]
    check(body, (0, 0, 0), why)


def test_unknown_shapes_are_refused():
    net = Net(ADDITIONS["+"]).eval()
    gm = IRModule(net, Leaves().trace(net))
    lower_natively(gm)
    decision = Fuse().plan(gm, Context(Config(), [torch.randn(4, 8)]))
    assert list(decision.left.values()) == ["shapes are not known"]


def test_a_sum_that_is_added_to_again():
    check(lambda net, x: x + (x + net.fc1(x)), (0, 1, 0))


def test_dropout_that_is_on_stays():
    net = Net(lambda net, x: x + F.dropout(net.fc1(x), 0.5, training=True)).eval()
    gm = IRModule(net, Leaves().trace(net))
    lower_natively(gm)
    _, decision, _ = fuse(gm, [torch.randn(4, 8)])
    assert counts(decision) == (0, 0, 0) and list(decision.left.values()) == ["followed by dropout"]


@pytest.mark.parametrize("body", [lambda net, x: x + net.drop(net.fc1(x)), ADDITIONS["by mode"]])
def test_dropout_of_a_graph_in_training_mode_stays(body):
    net = Net(body, drop=nn.Dropout(0.5), mode=ByMode(True, False))
    gm = IRModule(net, Leaves().trace(net)).train()
    lower_natively(gm)
    ctx = Context(Config(), [torch.randn(4, 8)])
    propagate(gm, ctx.inputs)
    assert counts(Fuse().plan(gm, ctx)) == (0, 0, 0)
    assert counts(Fuse().plan(gm.eval(), ctx)) == (0, 1, 0)


def hidden_is_read(net, x):
    h = F.relu(net.fc1(x))
    return net.fc2(h) * h


BEHIND = {
    "relu": (lambda net, x: F.relu(x + net.fc1(x)), (1, 1, 0), "add_relu"),
    "gelu and dropout": (lambda net, x: F.gelu(F.dropout(net.fc1(x), 0.1, False) + x), (1, 1, 0), "add_gelu"),
    "in place": (lambda net, x: F.silu(x + net.fc1(x), inplace=True), (1, 1, 0), "add_silu"),
    "both sides": (lambda net, x: F.relu(x + F.relu(net.fc1(x))), (1, 1, 0), "relu"),
    "the sum is read": (lambda net, x: F.relu(x + net.fc1(x)) * (x + net.fc1(x)), (1, 2, 0), "add_relu"),
    "no sum": (lambda net, x: F.relu(2 * net.fc1(x)), (0, 0, 0), "none"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_activations_after_the_addition(name):
    body, expected, epilogue = BEHIND[name]
    fused, _, _ = check(body, expected)
    assert next(n for n in fused.graph.nodes if n.target is ops.nm_gemm).args[-1] == epilogue


MLPS = {
    "an activation of the sum": (lambda net, x: F.relu(x + net.fc2(F.relu(net.fc1(x)))), (2, 1, 0)),
    "gelu": (lambda net, x: net.fc2(F.gelu(net.fc1(x))), (1, 0, 1)),
    "no activation": (lambda net, x: net.fc2(net.fc1(x)), (0, 0, 1)),
    "dropout and residual": (lambda net, x: x + net.fc2(F.dropout(F.relu(net.fc1(x)), 0.1, False)), (1, 1, 1)),
    "one weight twice": (lambda net, x: net.fc1(F.silu(net.fc1(x))), (1, 0, 1)),
    "three": (lambda net, x: net.fc1(net.fc2(net.fc1(x))), (0, 0, 1)),
    "an activation after it": (lambda net, x: F.relu(net.fc2(F.relu(net.fc1(x)))), (2, 0, 0)),
    "a residual in between": (lambda net, x: net.fc2(x + net.fc1(x)), (0, 1, 0)),
    "the hidden layer is read": (lambda net, x: operator.mul(*[net.fc1(x)] * 2) + net.fc2(net.fc1(x)), (0, 1, 1)),
    "the activation is read": (hidden_is_read, (1, 0, 0)),
    "it is the residual": (lambda net, x: net.fc2(x) + net.fc1(x), (0, 1, 0)),
    "the input is written": (lambda net, x: F.relu_(x) + net.fc2(net.fc1(x)), (0, 1, 1)),
}


@pytest.mark.parametrize("name", MLPS)
def test_mlps(name):
    body, expected = MLPS[name]
    fused, _, _ = check(body, expected)
    assert native_nodes(fused)[ops.nm_mlp] == expected[2]


def test_convolutions_make_no_mlp():
    torch.manual_seed(0)
    mask = (torch.arange(8).view(1, 8, 1, 1) % 4 < 2).expand(8, 8, 1, 1)
    convs = [MaskedConv2d.from_conv(nn.Conv2d(8, 8, 1), mask, Pattern(2, 4)) for _ in range(2)]
    x = torch.randn(2, 8, 5, 5)
    body = lambda net, x: x + net.conv2(F.relu(net.conv1(x)))  # noqa: E731
    fused, _, _ = check(body, (1, 1, 0), x=x, conv1=convs[0], conv2=convs[1])
    assert native_nodes(fused) == {ops.nm_conv: 2}


def test_writes():
    gm, x = empty(a=nn.ReLU(), b=nn.ReLU(inplace=True))
    yes = [
        gm.graph.call_module("b", (x,)),
        gm.graph.call_method("mul_", (x, 2)),
        gm.graph.call_function(operator.imul, (x, 2)),
        gm.graph.call_function(operator.setitem, (x, 0, 2)),
        gm.graph.call_function(F.relu, (x, True)),
        gm.graph.call_function(F.silu, (x,), {"inplace": True}),
        gm.graph.call_function(aten.relu_.default, (x,)),
        gm.graph.call_function(torch.add, (x, x), {"out": x}),
    ]
    no = [
        x,
        gm.graph.call_module("a", (x,)),
        gm.graph.call_method("mul", (x, 2)),
        gm.graph.call_function(operator.mul, (x, 2)),
        gm.graph.call_function(F.relu, (x,), {"inplace": False}),
        gm.graph.call_function(aten.relu.default, (x,)),
    ]
    assert all(writes(gm, n) for n in yes)
    assert not any(writes(gm, n) for n in no)
