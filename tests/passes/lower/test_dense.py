"""LowerDense: dense linear layers on the CPU engine in a frozen graph, and what it leaves to Inductor."""

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile import Config, transform
from mpcompile.backend import compiled_graphs, mpsparse
from mpcompile.kernels import ops, timing
from mpcompile.kernels.nm_linear.panels import PANELS
from mpcompile.kernels.schema import NmGemmArgs, NmMlpArgs
from mpcompile.passes.base import Context
from mpcompile.passes.fuse import Fuse
from mpcompile.passes.lower import Lower, LowerDense
from tests.support.helpers import images, relative, tiny_vit


@pytest.fixture(autouse=True)
def dense_kernel():
    """The engine's dense kernel counts as the fastest."""
    timing.set_cost_model(lambda name, spec, threads: {"cpu_dense": 1.0, "dense prepacked": None}.get(name, 2.0))
    torch._dynamo.reset()
    yield
    timing.set_cost_model(None)
    torch._dynamo.reset()


def lowered(gm, **options):
    context = Context(Config(**options), [], plan=gm.plan)
    result = LowerDense().run(gm, context)
    return result.decision


def natives(gm):
    return [node for node in gm.graph.nodes if node.target in ops.NATIVE]


def test_every_linear_layer_of_a_dense_vit_moves_and_nothing_changes():
    model, x = tiny_vit().eval(), images(2)
    gm = transform(model, x, Config("dense"))
    decision = lowered(gm)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # The last block's queries are those of the class token: its layer is split by rows.
    assert {name.partition(".weight_rows")[0] for name in decision.engines} == linear and not decision.left
    assert all(args.layout == PANELS for args in map(NmGemmArgs.bind, natives(gm)))
    with torch.no_grad():
        assert relative(gm(x), model(x)) < 1e-5


def test_activations_residuals_and_mlps_are_fused():
    model, x = tiny_vit().eval(), images(2)
    gm = transform(model, x, Config("dense"))
    context = Context(Config(), [], plan=gm.plan)
    LowerDense().run(gm, context)
    Fuse().run(gm, context)
    mlps = [NmMlpArgs.bind(node) for node in gm.graph.nodes if node.target is ops.nm_mlp]
    assert len(mlps) == len(model.blocks) and {args.activation for args in mlps} == {"gelu"}
    with torch.no_grad():
        assert relative(gm(x), model(x)) < 1e-5


def test_masked_layers_keep_their_own_engine():
    gm = transform(tiny_vit().eval(), images(2), Config("2:4", exclude=["*.mlp.*", "head"], score="magnitude"))
    context = Context(Config(engine="cpu"), [], plan=gm.plan)
    Lower().run(gm, context)
    decision = LowerDense().run(gm, context).decision
    assert decision.engines and all("mlp" in name or name == "head" for name in decision.engines)
    layouts = {NmGemmArgs.bind(node).layout for node in natives(gm) if node.target is ops.nm_gemm}
    assert PANELS in layouts and len(layouts) == 2


def test_a_shared_weight_is_packed_once():
    layer = nn.Linear(16, 16)
    gm = transform(nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(3, 16), Config("dense"))
    decision = lowered(gm)
    assert list(decision.engines) == ["0"] and len(natives(gm)) == 2
    assert len([name for name, _ in gm.named_buffers() if name.endswith(".values")]) == 1


@pytest.mark.parametrize("engine", ["dense", "reference"])
def test_an_engine_of_torch_leaves_them(engine):
    gm = transform(tiny_vit().eval(), images(2), Config("dense"))
    decision = lowered(gm, engine=engine)
    assert not decision.engines and set(decision.left.values()) == {f"engine {engine} was asked for"}
    assert not natives(gm)


def test_half_precision_and_slower_layers_stay():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    gm = transform(model.bfloat16(), torch.randn(3, 16).bfloat16(), Config("dense"))
    assert "bfloat16" in next(iter(lowered(gm).left.values()))
    timing.set_cost_model(lambda name, spec, threads: {"cpu_dense": 3.0, "dense prepacked": None}.get(name, 2.0))
    gm = transform(model.float(), torch.randn(3, 16), Config("dense"))
    decision = lowered(gm)
    assert not decision.engines and "only 0.67x" in decision.left["0"]


@torch.no_grad()
def test_only_frozen_graphs_are_lowered():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 8)).eval(), torch.randn(6, 32)
    with torch.enable_grad():
        gm = transform(model, x, Config("dense"))
    for frozen in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(gm, backend=mpsparse, options={"frozen": frozen}, dynamic=False)
        assert relative(compiled(x), model(x)) < 1e-6
        (graph,) = [graph for graph in compiled_graphs() if graph.calls]
        ran = [record for record in graph.plan.passes if record.name == "lower_dense"]
        assert len(ran) == frozen
        if frozen:
            assert len(ran[0].decision["engines"]) == 2
        del graph, compiled


def test_a_lowered_masked_module_is_saved_and_loaded(tmp_path):
    model, x = tiny_vit().eval(), images(2)
    gm = transform(model, x, Config("2:4", score="magnitude"))
    packed = mpcompile.lower(gm, x, Config("2:4", score="magnitude", engine="cpu_dense"))
    mpcompile.save(packed, tmp_path / "a.mpc")
    with torch.no_grad():
        assert torch.equal(mpcompile.load(tmp_path / "a.mpc")(x), packed(x))
