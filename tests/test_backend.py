"""The backend: real Inductor builds of small models, fresh weights without recompiling, one mask for all builds."""

import gc
import logging

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import mpcompile
from mpcompile import Config, audit, transform
from mpcompile.backend import compiled_graphs, mpsparse
from mpcompile.io import messages
from mpcompile.kernels import ops, schema
from tests.support.helpers import convolutional, images, mlp, relative, tiny_vit


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs():
    """The live graphs; only those of one test, because dynamo is reset between tests."""
    gc.collect()
    return compiled_graphs()


def test_vit_two_batch_sizes_one_function():
    gm = transform(tiny_vit(), images(), Config(tome_r=3, score="magnitude"))
    compiled = torch.compile(gm, backend=mpsparse)
    with torch.no_grad():
        for batch in (3, 1):
            assert relative(compiled(images(batch)), gm(images(batch))) < 1e-5
    assert all(g.lowered and len(g.slots) == 9 for g in graphs())


def test_weights_that_change_are_packed_again_without_recompiling():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    compiled, x = torch.compile(gm, backend=mpsparse), torch.randn(4, 32)

    def check():
        with torch.no_grad():
            assert relative(compiled(x), gm(x)) < 1e-5
        assert len(graphs()) == 1

    check()
    layer = gm.get_submodule("0")
    with torch.no_grad():
        layer.weight.mul_(2)
    check()
    gm.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in gm.state_dict().items()})
    check()
    gm.load_state_dict({k: v.clone() for k, v in gm.state_dict().items()}, assign=True)
    check()
    gm.get_submodule("0").weight = nn.Parameter(torch.randn(48, 32))
    check()
    optimizer = torch.optim.AdamW(gm.parameters(), lr=0.1, fused=True)
    gm(x).square().mean().backward()
    optimizer.step()
    check()
    with torch.no_grad():
        gm.get_submodule("0").mask.copy_(gm.get_submodule("0").mask.flip(1))
    check()
    gm.get_submodule("0").weight.data.mul_(3)  # leaves no trace
    with torch.no_grad():
        assert relative(compiled(x), gm(x)) > 1e-2
    mpcompile.refresh()
    check()


def test_frozen_skips_the_check():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    compiled, x = torch.compile(gm, backend=mpsparse, options={"frozen": True}), torch.randn(4, 32)
    with torch.no_grad():
        before = compiled(x)
        gm.get_submodule("0").weight.mul_(2)
        assert torch.equal(compiled(x), before)
    mpcompile.refresh()
    with torch.no_grad():
        assert relative(compiled(x), gm(x)) < 1e-5


def options_of_inductor(monkeypatch, refuse=lambda patches: None):
    """The config patches of every call of compile_fx from here on; it calls itself without any."""
    from torch._inductor import compile_fx

    original, seen = compile_fx.compile_fx, []

    def recorded(gm, inputs, *args, config_patches=None, **kwargs):
        seen.append(config_patches or {})
        refuse(seen[-1])
        return original(gm, inputs, *args, config_patches=config_patches, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", recorded)
    return seen


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_graphs_are_called_from_native_code(monkeypatch, frozen):
    seen = options_of_inductor(monkeypatch)
    gm, x = transform(mlp(), torch.randn(2, 32), Config(score="magnitude")), torch.randn(4, 32)
    with torch.no_grad():
        found = torch.compile(gm, backend=mpsparse, options={"frozen": frozen})(x)
        assert relative(found, gm(x)) < 1e-5
    assert [options.get("cpp_wrapper", False) for options in seen[:1]] == [frozen]


def test_a_graph_that_native_code_cannot_call_is_called_from_python(monkeypatch, caplog):
    def refuse(options):
        if options.get("cpp_wrapper"):
            raise NotImplementedError("no shim for this operator")

    seen = options_of_inductor(monkeypatch, refuse)
    gm, x = transform(mlp(), torch.randn(2, 32), Config(score="magnitude")), torch.randn(4, 32)
    with torch.no_grad():
        found = torch.compile(gm, backend=mpsparse, options={"frozen": True})(x)
        assert relative(found, gm(x)) < 1e-5
    assert [options.get("cpp_wrapper", False) for options in seen[:2]] == [True, False]
    assert "called from Python" in caplog.text and "no shim for this operator" in caplog.text


def test_training_through_the_backend():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude")).train()
    compiled, x = torch.compile(gm, backend=mpsparse), torch.randn(8, 32)
    compiled(x).square().mean().backward()
    layer = gm.get_submodule("2")
    ours = layer.weight.grad.clone()
    assert bool((ours[~layer.mask] == 0).all())
    gm.zero_grad()
    gm(x).square().mean().backward()
    assert relative(ours, layer.weight.grad) < 1e-5
    assert not any(g.lowered for g in graphs())


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("convnextv2_atto", 64)])
def test_convolutional_models(name, size):
    gm = transform(convolutional(name), images(2, size), Config(score="magnitude"))
    compiled = torch.compile(gm, backend=mpsparse)
    with torch.no_grad():
        for batch in (1, 3):
            assert relative(compiled(images(batch, size)), gm(images(batch, size))) < 1e-5
    assert all(len(g.slots) == len(gm.plan.masked) for g in graphs())


@pytest.mark.usefixtures("no_inductor")
def test_one_call_masks_and_merges_a_dense_model_with_one_plan():
    model = tiny_vit()
    x = images(4)
    expected = transform(model, x, Config(tome_r=3, score="magnitude"))
    compiled = torch.compile(model, backend=mpsparse, options={"pattern": "2:4", "tome_r": 3})
    with torch.no_grad():
        assert relative(compiled(x), expected(x)) < 1e-5
        assert relative(compiled(x[:2]), expected(x[:2])) < 1e-5
        # weights move so far that a mask chosen now would differ; builds made now must keep the first one
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    expected.load_state_dict(model.state_dict())
    trained = compiled(x)  # gradients wanted: another graph
    assert relative(trained, expected(x)) < 1e-5
    trained.square().sum().backward()
    mask = expected.get_submodule("blocks.0.mlp.fc1").mask
    assert bool((model.blocks[0].mlp.fc1.weight.grad[~mask] == 0).all())
    with torch.no_grad():
        assert relative(compiled(x[:1]), expected(x[:1])) < 1e-5
    assert {g.lowered for g in graphs()} == {True, False}
    plans = [g.plan for g in graphs()]
    assert all(p.masked == plans[0].masked and p.macs.executed == plans[0].macs.executed for p in plans)


@pytest.mark.usefixtures("no_inductor")
def test_remask_chooses_again():
    model, x = mlp(), torch.randn(4, 32)
    compiled = torch.compile(model, backend=mpsparse)
    with torch.no_grad():
        compiled(x)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        fresh = transform(model, x, Config(score="magnitude"))
        assert relative(compiled(x), fresh(x)) > 1e-2
        mpcompile.refresh(remask=True)
        assert relative(compiled(x), fresh(x)) < 1e-5


@pytest.mark.usefixtures("no_inductor")
def test_a_transformed_module_is_not_transformed_again():
    gm = transform(tiny_vit(), images(), Config("1:4", tome_r=2, score="magnitude"))
    compiled = torch.compile(gm, backend=mpsparse, options={"pattern": "2:4", "tome_r": 5})
    with torch.no_grad():
        assert relative(compiled(images()), gm(images())) < 1e-5
    (graph,) = graphs()
    assert {slot.spec.pattern for slot in graph.slots} == {(1, 4)}
    merges = [n for n in graph.run.graph.nodes if n.target is ops.token_merge]
    assert [schema.TokenMergeArgs.bind(n).r for n in merges] == [2]  # the head reads one token of the last block


def test_nothing_eligible_is_inductor_and_logged_once(caplog):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 6)
    messages._WARNED.clear()
    with caplog.at_level(logging.WARNING, "mpcompile"), torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            assert relative(torch.compile(model, backend=mpsparse)(x), model(x)) < 1e-6
    assert sum("compiled by Inductor alone" in r.message for r in caplog.records) == 1


def test_unknown_option_lists_the_valid_ones():
    compiled = torch.compile(mlp(), backend=mpsparse, options={"patern": "2:4"})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"unknown option 'patern'.*pattern, mac_"):
        compiled(torch.randn(2, 32))


@pytest.mark.usefixtures("no_inductor")
def test_the_audit_notices_that_dynamo_gave_up():
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    compiled = torch.compile(gm, backend=mpsparse, dynamic=False)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for batch in (2, 3, 4, 5):
            compiled(torch.randn(batch, 32))
        report = audit(mlp(), compiled, torch.randn(6, 32), rounds=0, dense_compiled=mlp())
    assert report.fell_back
    assert "recompile limit" in report.notes[0]
    assert report["compiled sparse"].macs == report["dense eager"].macs
    torch._dynamo.reset()
    good = audit(mlp(), torch.compile(gm, backend=mpsparse), torch.randn(6, 32), rounds=0, dense_compiled=mlp())
    assert not good.fell_back


def test_recompiles_are_counted_by_dynamo_not_by_us():
    counter = CompileCounterWithBackend("eager")
    gm = transform(mlp(), torch.randn(2, 32), Config(score="magnitude"))
    compiled = torch.compile(gm, backend=counter)
    with torch.no_grad():
        compiled(torch.randn(4, 32)), compiled(torch.randn(4, 32))
    assert counter.frame_count == 1  # none of our guards fails from call to call
