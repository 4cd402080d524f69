"""Contexts that passes of a run share, decisions as JSON, and declarations of passes."""

import dataclasses
import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mpcompile import Config, MPCompileError, Pipeline, transform
from mpcompile.errors import ConfigError
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.allocate import Allocate
from mpcompile.passes.base import UNRECORDED, Allocated, Calibration, Context, Decision, Pass, Request, Results
from mpcompile.passes.mask import Mask
from mpcompile.passes.restore import Restore
from tests.support.helpers import mlp

X = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Part:
    weight: Tensor | None
    pattern: Pattern


@dataclass(frozen=True, eq=False)
class Everything(Decision):
    parts: dict[str, Part]
    pairs: tuple[tuple[str, float], ...]
    pair: tuple[int, str]
    anything: dict
    tensors: list[Tensor] = field(default_factory=list, metadata=UNRECORDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.half, torch.bool, torch.int64])
def test_tensors_of_a_decision_survive_json_bit_for_bit(dtype):
    values = (torch.randn(3, 4) * 3).to(dtype)
    tensors = [values, values.t(), values[0, 0], values[:0]]
    part = Part(torch.tensor([float("nan"), -0.0, 1e-45]), Pattern(2, 4))
    parts = {"a": part, "b": Part(None, Pattern(1, 4))}
    decision = Everything(parts, (("x", 0.1), ("y", float("inf"))), (3, "z"), {"k": [1]}, tensors)
    read = Everything.from_json(json.loads(json.dumps(decision.to_json())))
    assert read == decision and type(read.parts["a"].pattern) is Pattern and read.pairs == decision.pairs
    for mine, its in zip(read.tensors, tensors, strict=True):
        assert mine.dtype == its.dtype and mine.shape == its.shape and torch.equal(mine, its)
    assert "tensors" not in decision.record() and decision.record()["pair"] == [3, "z"]
    assert decision != dataclasses.replace(decision, tensors=[])


@pytest.mark.parametrize("data", [{"x": 1}, {"parts": 3}, {"parts": {"a": {"weight": {"tensor": "float32"}}}}])
def test_objects_that_are_not_decisions_are_refused(data):
    with pytest.raises(MPCompileError, match="not the JSON of a Everything"):
        Everything.from_json(data)


def test_a_decision_holds_nothing_that_json_would_lose():
    with pytest.raises(TypeError, match="cannot hold a set"):
        Everything({}, (), (1, "a"), {"k": {1}}).to_json()
    with pytest.raises(TypeError, match="keys"):
        Everything({}, (), (1, "a"), {1: 2}).to_json()


def test_inputs_of_a_run_are_frozen():
    ctx = Context(Config(), [X], seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        ctx.run.seed = 4
    with pytest.raises(AttributeError):
        ctx.seed = 4
    assert ctx.seed == 3 and ctx.calibration is None and not ctx.refit and not ctx.renorm


def test_patterns_of_a_run_come_before_those_it_was_given():
    ctx = Context(Config(), [X], patterns={"a": None})
    assert ctx.patterns == {"a": None}
    ctx.results.put(Allocated({"a": Pattern(2, 4)}))
    assert ctx.patterns == {"a": Pattern(2, 4)} and ctx.results.get(Results) is None


def test_requests_of_later_passes():
    asked = Context(Config(), [X], calibration=[X], requests=Restore.requests)
    assert asked.refit and asked.renorm
    assert not Context(Config(restore=False), [X], calibration=[X], requests=[Request.REFIT]).refit
    assert not Context(Config(), [X], owned=False, calibration=[X], requests=Restore.requests).renorm


def test_earlier_names_of_a_context_still_work():
    ctx = Context(Config(), [X], calibration=Calibration([X], memory=5))
    with pytest.warns(DeprecationWarning, match=r"ctx\.memory has moved to ctx\.calibration\.memory"):
        assert ctx.memory == 5
    with pytest.warns(DeprecationWarning):
        assert ctx.again is True
    with pytest.warns(DeprecationWarning):
        assert Context(Config(), [X]).again is False
    with pytest.raises(AttributeError, match="nothing"):
        ctx.nothing  # noqa: B018


class Reader(Pass):
    """A pass as users have written them: a dict for a decision, and batches read from the context."""

    name = "reader"

    def plan(self, gm, ctx):
        names = [layer for layer in ("0", "2") if ctx.config.pattern != "dense"]
        return {"batches": sum(1 for _ in ctx.calibration), "inputs": len(ctx.inputs), "names": names}

    def apply(self, gm, decision, ctx):
        decision["applied"] = True
        ctx.plan.note("read")
        return False


def test_a_pass_with_a_dict_for_a_decision():
    gm = transform(mlp(), X, Config(permute=False), [X, X, X], pipeline=Pipeline([Reader()]))
    record = gm.plan.passes[0]
    assert record.decision == {"batches": 3, "inputs": 1, "names": ["0", "2"], "applied": True}
    assert record.summary.startswith("batches: 3, inputs: 1") and "read" in gm.plan.notes


def test_a_need_is_met_by_an_earlier_pass_only():
    config = Config(mac_reduction=0.2)
    for passes in ([Mask()], [Mask(), Allocate()]):
        with pytest.raises(ConfigError, match=r"needs the pass Allocate; expected Allocate\(\) before Mask"):
            transform(mlp(), X, config, pipeline=Pipeline(passes))
    assert transform(mlp(), X, config, pipeline=Pipeline([Allocate(), Mask()])).plan.masked
