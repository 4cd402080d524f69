"""The contract of every pass: ``plan`` is pure, and its decision, read back from JSON, is all that ``apply`` needs."""

import copy
import importlib
import itertools
import json
import pkgutil
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import mpcompile.passes
from mpcompile import Config, Pipeline, Reconstruction
from mpcompile.capture.importers import import_model
from mpcompile.ir.effects import explicit
from mpcompile.ir.shapes import propagate
from mpcompile.passes.allocate import Allocate
from mpcompile.passes.analyze import Analyze
from mpcompile.passes.base import Calibration, Context, Pass, Request
from mpcompile.passes.dead_tokens import SkipDeadTokens
from mpcompile.passes.fold_norm import FoldNorm
from mpcompile.passes.fold_scale import FoldScale
from mpcompile.passes.fuse import Fuse
from mpcompile.passes.lower import Lower, LowerAttention, LowerDense, LowerMerges
from mpcompile.passes.mask import Mask
from mpcompile.passes.merge_tokens.insert import MergeTokens
from mpcompile.passes.permute import Permute
from mpcompile.passes.reconstruct import Reconstruct
from mpcompile.passes.restore import Restore
from tests.support.helpers import images, randomise, tiny_vit

EVERYTHING = frozenset(Request)


def convnet():
    """Convolutions with BatchNorm, and channels that two layers share."""
    torch.manual_seed(0)
    widths = [(3, 16), (16, 32), (32, 32)]
    blocks = [(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in widths]
    model = nn.Sequential(*itertools.chain(*blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    randomise(model)
    return model.eval()


def tied():
    """Two layers that share a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    model[2].weight = model[0].weight
    return model.eval()


def scaled():
    return tiny_vit(init_values=0.5)


@dataclass
class Case:
    """A pass and the run that it is part of.

    Attributes:
        step: type of the pass.
        model: function that makes the model.
        before: passes that run first.
        policy: calibration policy; None for a run without data.
        requests: requests of later passes.
        changes: False if the pass leaves graph and tensors as they are.
        options: arguments of the pass that plans, by position or by name.
    """

    step: type[Pass]
    model: object = convnet
    config: Config = field(default_factory=lambda: Config(engine="reference"))
    before: tuple = ()
    policy: str | None = None
    requests: frozenset = EVERYTHING
    changes: bool = True
    options: tuple | dict = ()


SER = Config(score="ser", exclude=("stem", "head"))
CASES = {
    "analyze": Case(Analyze, changes=False),
    "allocate": Case(
        Allocate, tiny_vit, Config(mac_reduction=0.3), before=(Analyze,), policy="pruned_to_dense", changes=False
    ),
    "allocate, off": Case(Allocate, changes=False),
    "permute": Case(Permute, policy="pruned_to_dense"),
    "permute heads": Case(Permute, tiny_vit, Config(permute=True)),
    "permute, off": Case(Permute, changes=False),
    "merge_tokens": Case(MergeTokens, tiny_vit, Config(tome_r=2)),
    "merge_tokens to a target": Case(MergeTokens, tiny_vit, Config(tome_r="auto", tome_reduction=0.45)),
    "merge_tokens, off": Case(MergeTokens, changes=False),
    "mask": Case(Mask, requests=frozenset()),
    "mask and refit": Case(Mask, policy="pruned_to_dense"),
    "mask from dense statistics": Case(Mask, tiny_vit, Config(score="wanda"), policy="dense"),
    "mask drawn to a source": Case(Mask, config=SER, before=(Analyze,), policy="pruned"),
    "mask a shared weight": Case(Mask, tied, Config(exclude=()), policy="pruned"),
    "restore in sequence": Case(Restore, before=(Mask,), policy="pruned_to_dense"),
    "restore afterwards": Case(Restore, before=(Mask,), policy="dense"),
    "restore, off": Case(Restore, before=(Mask,), changes=False),
    "reconstruct": Case(
        Reconstruct, before=(Mask, Restore), policy="pruned", options=(Reconstruction(views=2, epochs=2, batch=4),)
    ),
    "reconstruct, none": Case(Reconstruct, before=(Mask,), changes=False),
    "fold_norm": Case(FoldNorm, before=(Mask,)),
    "fold_scale": Case(FoldScale, scaled, before=(Mask,)),
    "skip_dead_tokens": Case(SkipDeadTokens, tiny_vit, Config(tome_r=2), before=(MergeTokens, Mask)),
    "skip_dead_tokens, none": Case(SkipDeadTokens, changes=False),
    "lower": Case(Lower, before=(Mask,)),
    "lower_dense": Case(LowerDense, tiny_vit, Config(engine="cpu_dense", exclude=["*.mlp.*"]), before=(Mask,)),
    "lower_attention": Case(
        LowerAttention, tiny_vit, Config(tome_r=2), before=(MergeTokens,), options={"timed": False}
    ),
    "lower_merges": Case(LowerMerges, tiny_vit, Config(tome_r=2), before=(MergeTokens,)),
    "lower_merges, none": Case(LowerMerges, changes=False),
    "lower_attention, none": Case(LowerAttention, changes=False),
    "fuse": Case(Fuse, tiny_vit, Config(engine="cpu"), before=(Mask, Lower)),
}


def begun(case):
    """The graph and the context in which a case's pass runs."""
    imported = import_model(case.model(), example(case))
    imported.gm.eval()
    batches = [example(case, seed) for seed in (6, 7, 8, 9)]
    data = None if case.policy is None else Calibration(batches, policy=case.policy)
    ctx = Context(case.config, imported.inputs, imported.lifted, calibration=data, requests=case.requests)
    propagate(imported.gm, ctx.inputs)
    if explicit(imported.gm):
        imported.gm.recompile()
    for step in case.before:
        if step().run(imported.gm, ctx).modified:
            propagate(imported.gm, ctx.inputs)
    return imported.gm, ctx


def example(case, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 32, generator=generator) if case.model is tied else images(4, seed=seed)


def snapshot(gm):
    """All of a graph that a pass could change: its code, its tensors, the flags of its modules."""
    state = {name: tensor.clone() for name, tensor in {**dict(gm.named_parameters()), **gm.state_dict()}.items()}
    metadata = [(node.name, sorted(map(str, node.meta))) for node in gm.graph.nodes]
    modules = [(name, type(module), module.training) for name, module in gm.named_modules() if name]
    return str(gm.graph), metadata, modules, state


def same(a, b):
    return a[:3] == b[:3] and a[3].keys() == b[3].keys() and all(identical(a[3][k], b[3][k]) for k in a[3])


def identical(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def result_of(gm, x):
    with torch.no_grad():
        return gm(x)


@pytest.mark.parametrize("name", CASES)
def test_plan_is_pure_and_its_decision_is_all_that_apply_needs(name):
    case = CASES[name]
    gm, ctx = begun(case)
    step = case.step(**case.options) if isinstance(case.options, dict) else case.step(*case.options)
    before, plan, results, attributes = snapshot(gm), ctx.plan.to_json(), dict(vars(ctx.results)), dict(vars(step))
    random = torch.random.get_rng_state()
    decision = step.plan(gm, ctx)
    assert same(snapshot(gm), before) and ctx.plan.to_json() == plan
    assert dict(vars(ctx.results)) == results and vars(step) == attributes
    assert torch.equal(torch.random.get_rng_state(), random)
    assert step.plan(gm, ctx) == decision

    text = json.dumps(decision.to_json())
    read = case.step.decision_type.from_json(json.loads(text))
    assert read == decision and read.record() == decision.record() == json.loads(json.dumps(decision.record()))
    assert step.summary(read) == step.summary(decision)

    gm, twin = copy.deepcopy(gm), copy.deepcopy(gm)  # names that earlier passes used are free in both
    fresh = Context(ctx.config, ctx.inputs, ctx.lifted, plan=copy.deepcopy(ctx.plan))
    changed = step.apply(gm, decision, ctx)
    assert case.step().apply(twin, read, fresh) == changed
    assert json.dumps(decision.to_json()) == text  # apply does not change the decision
    for graph in (gm, twin):
        graph.graph.lint()
        graph.recompile()
    after = snapshot(gm)
    assert same(snapshot(twin), after) and same(after, before) != case.changes
    assert gm.code == twin.code and fresh.plan.layers == ctx.plan.layers
    assert torch.equal(result_of(gm, example(case)), result_of(twin, example(case)))
    assert all(fresh.results.get(kind) is not None for kind in case.step.provides)


def test_every_pass_has_a_case():
    for module in pkgutil.walk_packages(mpcompile.passes.__path__, "mpcompile.passes."):
        importlib.import_module(module.name)
    passes, todo = set(), [Pass]
    while todo:
        subclasses = todo.pop().__subclasses__()
        passes |= {kind for kind in subclasses if kind.__module__.startswith("mpcompile.passes.")}
        todo += subclasses
    assert passes == {case.step for case in CASES.values()}
    assert all(kind.decision_type is not None for kind in passes)
    assert {type(step) for step in Pipeline()} <= passes
