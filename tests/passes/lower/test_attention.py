"""LowerAttention: the kernel takes the attention of whole models, and leaves every call that it cannot run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpcompile
from mpcompile import Config, backend, transform
from mpcompile.capture.importers import import_model
from mpcompile.ir import spec
from mpcompile.ir.macs import count
from mpcompile.ir.nodes import ATTENTION
from mpcompile.ir.shapes import propagate
from mpcompile.kernels import ops
from mpcompile.kernels.cpu import attention, build
from mpcompile.passes.base import Context, run_pass
from mpcompile.passes.lower import LowerAttention
from mpcompile.passes.lower import attention as lowering
from tests.support.helpers import images, relative, tiny_vit, transformer
from tests.support.merging import merged


def lowered(model, *inputs, engine="auto"):
    """A model before and after the pass, and its decision."""
    imported = import_model(model, inputs[0]) if len(inputs) == 1 else import_model(model, list(inputs))
    gm, ctx = imported.gm, Context(Config(engine=engine), imported.inputs, imported.lifted)
    propagate(gm, imported.inputs)
    before = copy.deepcopy(gm)
    run_pass(LowerAttention(timed=False), gm, ctx)
    gm.graph.lint()
    return before, gm, ctx.plan.passes[-1]


def calls(gm, target=ops.nm_attention):
    return [node for node in gm.graph.nodes if node.target is target]


MODELS = {
    "vit": tiny_vit,
    "vit with norms of queries and keys": lambda: tiny_vit(qk_norm=True),
    "merged tokens": lambda: merged(tiny_vit(), images(3), 3),
    "merged by saliency": lambda: merged(tiny_vit(), images(3), 3, "saliency"),
    "distilled": lambda: transformer("deit_tiny_distilled_patch16_224", 64),
    "registers and rotation": lambda: tiny_vit(reg_tokens=2, no_embed_class=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_keep_their_outputs(name):
    x = images(3, 64 if name == "distilled" else 32)
    before, gm, record = lowered(MODELS[name](), x)
    found = [node for node in before.graph.nodes if node.target in ATTENTION or node.target is ops.token_attention]
    assert len(calls(gm)) == len(found) == 2
    assert not any(node.target in ATTENTION or node.target is ops.token_attention for node in gm.graph.nodes)
    assert [call.args[3:4] != () for call in calls(gm)] == [node.target is ops.token_attention for node in found]
    assert record.name == "lower_attention" and record.summary == "2 on nm_attention"
    with torch.no_grad():
        assert relative(gm(x), before(x)) < 2e-6
    spec.check(gm, spec.Stage.LOWERED)


def test_multiply_accumulates_are_those_of_before():
    before, gm, _ = lowered(merged(tiny_vit(), images(3), 3), images(3))
    propagate(gm, [images(3)])
    assert count(gm) == count(before)
    assert sum(node.meta["macs"] for node in calls(gm)) > 0


class Attend(nn.Module):
    """One attention with its options; models without parameters cannot be captured."""

    def __init__(self, **options):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.options = options

    def forward(self, q, k, v):
        return self.gain * F.scaled_dot_product_attention(q, k, v, **self.options)


class Masked(Attend):
    def forward(self, q, k, v, mask):
        return self.gain * F.scaled_dot_product_attention(q, k, v, mask)


def heads(dtype=torch.float32, sizes=(2, 4, 5, 8)):
    return [torch.randn(sizes, dtype=dtype) for _ in range(3)]


def test_a_scale_is_kept():
    before, gm, _ = lowered(Attend(scale=0.5), *heads())
    (call,) = calls(gm)
    assert call.args[3:] == (None, 0.5)
    operands = heads()
    torch.testing.assert_close(gm(*operands), before(*operands), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sizes", [(5, 5), (1, 5), (4, 5, 5), (4, 1, 1), (2, 1, 5, 5), (2, 4, 1, 5)])
def test_masks_of_any_rank_are_broadcast(sizes):
    operands = [*heads(), torch.randn(sizes)]
    before, gm, _ = lowered(Masked(), *operands)
    assert len(calls(gm)) == 1
    torch.testing.assert_close(gm(*operands), before(*operands), atol=1e-6, rtol=0)


LEFT = {
    "causal": (Attend(is_causal=True), heads(), "it is causal"),
    "dropout": (Attend(dropout_p=0.5), heads(), "it has dropout"),
    "grouped": (Attend(enable_gqa=True), [torch.randn(2, n, 5, 8) for n in (4, 2, 2)], "several heads share keys"),
    "bf16": (Attend(), heads(torch.bfloat16), "dtype bfloat16"),
    "three axes": (Attend(), heads(sizes=(4, 5, 8)), "its operands are not"),
    "shared keys": (Attend(), [torch.randn(n, 4, 5, 8) for n in (2, 1, 1)], "its operands are broadcast"),
    "boolean": (Masked(), [*heads(), torch.ones(5, 5, dtype=torch.bool)], "its mask is not of the dtype"),
    "empty": (Attend(), [torch.randn(2, 4, n, 8) for n in (0, 5, 5)], "an empty tensor"),
}


@pytest.mark.parametrize("name", LEFT)
def test_calls_that_the_kernel_cannot_run_are_left_with_the_reason(name):
    model, operands, why = LEFT[name]
    before, gm, record = lowered(model, *operands)
    assert str(gm.graph) == str(before.graph)
    assert record.summary.startswith("1 left to torch: ") and why in record.summary


def test_autocast_keeps_torchs_attention():
    class Cast(Attend):
        def forward(self, q, k, v):
            with torch.autocast("cpu", torch.bfloat16):
                return self.gain * F.scaled_dot_product_attention(q, k, v)

    _, gm, record = lowered(Cast(), *heads())
    assert not calls(gm) and "cast" in record.summary


def test_an_engine_that_was_asked_for_keeps_torchs_attention():
    _, gm, record = lowered(tiny_vit(), images(), engine="reference")
    assert not calls(gm) and record.summary == "2 left to torch: engine reference was asked for"


@pytest.fixture
def untimed(monkeypatch):
    """The backend takes the kernel wherever it runs."""
    monkeypatch.setattr(lowering, "choose", lambda spec, timed: attention.choose(spec, timed=False))


def compiled(model, x, **options):
    """The result of a model in the backend, and the graph that the backend made."""
    torch._dynamo.reset()
    before = backend.compiled_graphs()
    with torch.no_grad():
        y = torch.compile(model, backend="mpsparse", options=options)(x)
    (graph,) = [graph for graph in backend.compiled_graphs() if graph not in before]
    return y, graph


@pytest.mark.parametrize("r", [0, 3])
def test_the_frozen_backend_runs_it(untimed, r):
    x = images(2)
    gm = transform(tiny_vit(), x, Config("2:4", score="magnitude", tome_r=r)).eval()
    y, graph = compiled(gm, x, frozen=True)
    (record,) = [record for record in graph.plan.passes if record.name == "lower_attention"]
    assert record.summary.startswith("2 on nm_attention")
    assert relative(y, gm(x)) < 1e-5
    _, graph = compiled(gm, x, frozen=False)
    assert not any(record.name == "lower_attention" for record in graph.plan.passes)


def test_without_a_compiler_torchs_attention_stays(monkeypatch):
    monkeypatch.setattr(build, "unavailable", lambda: "no C++ compiler")
    _, gm, record = lowered(tiny_vit(), images())
    assert not calls(gm) and record.summary == "2 left to torch: no C++ compiler"


def test_saved_lowered_modules_hold_torchs_attention():
    """Artifacts and exports do not depend on the kernel."""
    x = images(2)
    gm = transform(tiny_vit(), x, Config("2:4", score="magnitude", tome_r=2))
    assert not calls(mpcompile.lower(gm, x))
