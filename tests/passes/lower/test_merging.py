"""LowerMerges: merges of frozen graphs run on the kernel, with the outputs of the plain operator."""

import pytest
import torch

import mpcompile
from mpcompile import Config, backend
from mpcompile.capture.importers import import_model
from mpcompile.ir import spec
from mpcompile.ir.shapes import propagate
from mpcompile.kernels import ops
from mpcompile.kernels.cpu import build
from mpcompile.passes.base import Context, run_pass
from mpcompile.passes.lower import LowerMerges
from tests.support.helpers import images, tiny_vit
from tests.support.merging import merged


def run(model, x, engine="auto"):
    """A graph after the pass, and the record of its decision."""
    imported = import_model(model, x)
    gm, ctx = imported.gm, Context(Config(engine=engine), imported.inputs, imported.lifted)
    propagate(gm, imported.inputs)
    run_pass(LowerMerges(), gm, ctx)
    return gm, ctx.plan.passes[-1]


def targets(gm):
    return [node.target for node in gm.graph.nodes if node.target in (ops.token_merge, ops.nm_token_merge)]


@pytest.mark.parametrize("kind", [(), ("saliency",)], ids=["plain", "saliency"])
def test_models_keep_their_outputs(kind):
    x = images(3)
    model = merged(tiny_vit(), x, 3, *kind)
    gm, record = run(model, x)
    assert targets(gm) and set(targets(gm)) == {ops.nm_token_merge}
    assert record.summary == f"{len(targets(gm))} merges on nm_token_merge"
    spec.check(gm, spec.Stage.LOWERED)
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_the_kernel_does_not_run_is_left(monkeypatch):
    x = images(3)
    model = merged(tiny_vit(), x, 3)
    gm, record = run(model, x, "dense")
    assert set(targets(gm)) == {ops.token_merge} and "engine dense was asked for" in record.summary
    gm, record = run(merged(tiny_vit().double(), x.double(), 3), x.double())
    assert set(targets(gm)) == {ops.token_merge} and "not fp32 on the CPU" in record.summary
    monkeypatch.setattr(build, "unavailable", lambda: "no compiler")
    assert "no compiler" in run(model, x)[1].summary


def test_a_lowered_merge_is_not_legal_in_a_graph_that_is_not_lowered():
    gm, _ = run(merged(tiny_vit(), images(3), 3), images(3))
    with pytest.raises(mpcompile.MPCompileError, match="nm_token_merge"):
        spec.check(gm, spec.Stage.TRANSFORMED)


def test_frozen_graphs_use_it_and_others_do_not():
    x = images(3)
    model = mpcompile.transform(tiny_vit(), x, Config(pattern="dense", tome_r=2))
    results = {}
    for frozen in (False, True):
        torch._dynamo.reset()
        known = set(backend.compiled_graphs())
        compiled = torch.compile(model, backend="mpsparse", options={"frozen": frozen})
        with torch.no_grad():
            results[frozen] = compiled(x)
        (graph,) = set(backend.compiled_graphs()) - known
        assert ("lower_merges" in [record.name for record in graph.plan.passes]) is frozen
        if frozen:
            record = next(record for record in graph.plan.passes if record.name == "lower_merges")
            assert len(record.decision["merges"]) >= 1 and not record.decision["left"]
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-5)
