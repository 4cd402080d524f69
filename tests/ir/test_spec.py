"""The contents of a graph that are legal after each stage: real graphs pass, and every rule refuses its violation."""

import copy

import pytest
import torch
from torch import fx, nn

import mpcompile
from mpcompile import Config, Pipeline, lower, transform
from mpcompile.artifact.loading import assemble
from mpcompile.artifact.opset import Refusal
from mpcompile.artifact.saving import describe
from mpcompile.capture.importers import import_model
from mpcompile.errors import GraphError
from mpcompile.ir import spec
from mpcompile.ir.module import IRModule
from mpcompile.ir.spec import OPERATORS, Stage
from mpcompile.kernels import ops
from mpcompile.layers import MaskedLinear
from mpcompile.passes.base import Pass
from tests.support.helpers import capture, convolutional, images, mlp, tiny_vit

MODELS = {
    "vit": (lambda: tiny_vit(init_values=0.5), images, {"tome_r": 3}),
    "resnet18": (lambda: convolutional("resnet18"), lambda batch: images(batch, 64), {}),
    "mlp": (mlp, lambda batch: torch.randn(batch, 32), {}),
}


# --- Graphs from transform, lower, export, dynamo and the loader are legal ---


@pytest.mark.parametrize("name", MODELS)
def test_real_graphs_pass_at_their_stage(name, tmp_path):
    make, data, options = MODELS[name]
    gm = transform(make(), data(2), Config("2:4", **options)).eval()
    lowered = lower(gm, data(2), Config("2:4", engine="reference"))
    assert spec.stage_of(gm) is spec.recorded(gm.plan) is Stage.TRANSFORMED
    assert spec.stage_of(lowered) is Stage.LOWERED and spec.recorded(lowered.plan) is Stage.FUSED
    spec.check(gm, Stage.TRANSFORMED, plan=gm.plan)
    spec.check(lowered, Stage.FUSED, plan=lowered.plan)
    for module, stage in ((gm, Stage.TRANSFORMED), (lowered, Stage.LOWERED)):
        imported = capture(copy.deepcopy(module), data(2))
        spec.check(imported.gm, stage, lifted=imported.lifted)
        exported = import_model(torch.export.export(copy.deepcopy(module), (data(2),)).module())
        spec.check(exported.gm, stage)
        mpcompile.save(module, tmp_path / "model.mpc")
        spec.check(mpcompile.load(tmp_path / "model.mpc"), stage)


def test_every_operator_of_the_library_has_a_row():
    assert OPERATORS.keys() == ops.MASKED | ops.MERGING | ops.PACKED | {ops.nm_attention}
    names = {argument.name for row in OPERATORS.values() for argument in row.target._schema.arguments}
    for row in OPERATORS.values():
        assert row.stored | row.literal | {name for name, _ in row.epilogue} <= names
    native = {row.name for row in OPERATORS.values() if row.family == "native"}
    assert native == {"nm_gemm", "nm_conv", "nm_mlp"}


def test_a_pass_may_insert_any_torch_operator():
    class Double(Pass):
        name = "double"

        def plan(self, gm, ctx):
            return {}

        def apply(self, gm, decision, ctx):
            output = next(node for node in gm.graph.nodes if node.op == "output")
            with gm.graph.inserting_before(output):
                output.args = (gm.graph.call_function(torch.mul, (output.args[0], 2)),)
            return True

    x = torch.randn(2, 32)
    assert torch.equal(transform(mlp(), x, pipeline=Pipeline([Double()]))(x), 2 * mlp()(x))


# --- Every rule refuses its violation ---


def graph_of(target, *args, **kwargs):
    """A graph of one call. ``"x"`` is its input, another text the buffer or parameter of that name."""
    root = nn.Module()
    root.register_buffer("values", torch.ones(4, 2))
    root.register_buffer("index", torch.zeros(4, dtype=torch.uint8))
    root.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    root.weight = nn.Parameter(torch.ones(4, 4))
    graph = fx.Graph()
    x = graph.placeholder("x")
    held = dict(root.named_parameters()) | dict(root.named_buffers())

    def value(a):
        return x if a == "x" else graph.get_attr(a) if isinstance(a, str) and a in held else a

    args, kwargs = [value(a) for a in args], {k: value(v) for k, v in kwargs.items()}
    graph.output(graph.call_function(target, tuple(args), kwargs))
    return IRModule(root, graph)


GEMM = {
    "x": "x",
    "values": "values",
    "index": "index",
    "bias": None,
    "residual": None,
    "out": 4,
    "n": 2,
    "m": 4,
    "layout": 0,
    "activation": "none",
}


def gemm(**changes):
    return graph_of(ops.nm_gemm, *(GEMM | changes).values())


def test_native_operators_are_legal_after_lower():
    gm = gemm()
    assert spec.stage_of(gm) is Stage.LOWERED
    spec.check(gm, Stage.LOWERED)
    with pytest.raises(GraphError, match="node nm_gemm_default is not legal in a transformed graph; expected nm_gemm"):
        spec.check(gm, Stage.TRANSFORMED)


@pytest.mark.parametrize("change", [{"residual": "x"}, {"activation": "relu"}])
def test_epilogues_are_legal_after_fuse(change):
    gm = gemm(**change)
    assert spec.stage_of(gm) is Stage.FUSED
    spec.check(gm, Stage.FUSED)
    with pytest.raises(GraphError, match=f"expected '{next(iter(change))}' of nm_gemm to be .* before fuse"):
        spec.check(gm, Stage.LOWERED)


def test_mlps_are_legal_after_fuse():
    args = ("x", "values", "index", None, "values", "index", None, None, 4, 4, 2, 4, 2, 4, 0, 0, "gelu")
    gm = graph_of(ops.nm_mlp, *args)
    spec.check(gm, Stage.FUSED)
    with pytest.raises(GraphError, match="not legal in a lowered graph; expected nm_mlp at stage fused or later"):
        spec.check(gm, Stage.LOWERED)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"values": "weight"}, "a buffer of the graph, or one of its inputs as 'values'.* found get_attr weight"),
        ({"index": 3}, "a buffer of the graph, or one of its inputs as 'index'"),
        ({"index": None}, "a value as 'index'"),
        ({"x": 1.0}, "a node as 'x'"),
        ({"bias": 1.0}, "a node as 'bias'"),
        ({"n": "x"}, "literal numbers as 'n'"),
        ({"m": True}, "literal numbers as 'm'"),
        ({"out": [4]}, "literal numbers as 'out'"),
        ({"activation": "tanh"}, "one of none, .* as 'activation'.* found 'tanh'"),
    ],
)
def test_arguments_of_native_operators(change, expected):
    with pytest.raises(GraphError, match=expected):
        spec.check(gemm(**change), Stage.FUSED)


def test_packed_tensors_may_be_inputs_but_not_computed():
    gm = gemm(values="x")
    spec.check(gm, Stage.LOWERED)
    node = next(node for node in gm.graph.nodes if node.target is ops.nm_gemm)
    with gm.graph.inserting_before(node):
        node.update_arg(1, gm.graph.call_function(torch.neg, (node.args[1],)))
    with pytest.raises(GraphError, match=r"found call_function .*neg"):
        spec.check(gm, Stage.LOWERED)


def test_no_argument_is_missing_or_unknown():
    by_name = dict(list(GEMM.items())[1:])
    spec.check(graph_of(ops.nm_gemm, "x", **by_name), Stage.LOWERED)
    spec.check(graph_of(ops.token_size, x="x"), Stage.TRANSFORMED)
    with pytest.raises(GraphError, match="expected the arguments of masked_linear: x, weight, mask, bias, n, m, found"):
        spec.check(graph_of(ops.masked_linear, "x", "weight", "mask"), Stage.TRANSFORMED)
    with pytest.raises(GraphError, match=r"the arguments of token_size: x, mask, found .*'size'"):
        spec.check(graph_of(ops.token_size, "x", size="x"), Stage.TRANSFORMED)


@pytest.mark.parametrize("stage", [Stage.LOWERED, Stage.FUSED])
def test_masked_operators_are_gone_after_lower(stage):
    gm = graph_of(ops.masked_linear, "x", "weight", "mask", None, 2, 4)
    spec.check(gm, Stage.TRANSFORMED)
    with pytest.raises(GraphError, match=f"in a {stage} graph; expected packed layers.* found the masked layer weight"):
        spec.check(gm, stage)


class Counting(nn.Module):
    """A layer whose weight the forward pass itself writes to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(32, 32))
        self.body, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        y = nn.functional.linear(self.body(x), self.weight)
        self.weight.mul_(1.0)
        return self.head(y.relu())


def test_masked_layers_are_gone_after_lower_unless_the_plan_says_why():
    x = torch.randn(2, 32)
    gm = transform(Counting().eval(), x, Config("2:4"))
    assert isinstance(gm.get_submodule("body"), MaskedLinear)
    with pytest.raises(GraphError, match="found the masked layer body"):
        spec.check(gm, Stage.LOWERED)
    lowered = lower(gm, x, Config(engine="reference"))
    left = [node for node in lowered.graph.nodes if node.target is ops.masked_linear]
    assert len(left) == 1
    spec.check(lowered, Stage.LOWERED, plan=lowered.plan)
    with pytest.raises(GraphError, match="found the masked layer weight"):
        spec.check(lowered, Stage.LOWERED)


def test_structure():
    gm = gemm()
    values = next(node for node in gm.graph.nodes if node.target == "values")
    values.target = "nothing.here"
    with pytest.raises(GraphError, match=r"expected something at nothing\.here, found nothing"):
        spec.check(gm, Stage.LOWERED)

    gm = gemm()
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op == "output")):
        gm.graph.placeholder("late")
    with pytest.raises(GraphError, match=r"node late is not legal .* an input after a call"):
        spec.check(gm, Stage.LOWERED)

    gm = gemm()
    gm.graph.output(None)
    with pytest.raises(GraphError, match="has 2 outputs; expected one output, the last node"):
        spec.check(gm, Stage.LOWERED)

    gm = gemm()
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op == "output")):
        gm.graph.create_node("call_module", "values")
    with pytest.raises(GraphError, match="expected a module at values, found Tensor"):
        spec.check(gm, Stage.LOWERED)


# --- Where it is checked ---


class Insert(Pass):
    """A pass that puts a native operator into a graph that is not lowered."""

    name = "insert"

    def plan(self, gm, ctx):
        return {}

    def apply(self, gm, decision, ctx):
        gm.register_buffer("values", torch.ones(5, 2))
        gm.register_buffer("index", torch.zeros(5, dtype=torch.uint8))
        output = next(node for node in gm.graph.nodes if node.op == "output")
        with gm.graph.inserting_before(output):
            head = (gm.graph.get_attr("values"), gm.graph.get_attr("index"))
            gm.graph.call_function(ops.nm_gemm, (output.args[0], *head, None, None, 5, 2, 4, 0, "none"))
        return True


def test_a_pass_that_breaks_a_rule_is_named():
    with pytest.raises(GraphError, match="pass 'insert' broke the graph: node nm_gemm_default is not legal"):
        transform(mlp(), torch.randn(2, 32), pipeline=Pipeline([Insert()]))


def test_a_file_that_breaks_a_rule_is_refused():
    gm = lower(transform(mlp(), torch.randn(2, 32), Config("2:4")), torch.randn(2, 32), Config(engine="reference"))
    texts, tensors = describe(gm)
    masked = describe(transform(mlp(), torch.randn(2, 32), Config("2:4")))
    assemble(texts, tensors), assemble(*masked)
    with pytest.raises(Refusal, match=r"node .* is not legal in a fused graph"):
        assemble({**masked[0], "plan": texts["plan"]}, masked[1])
